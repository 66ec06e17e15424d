"""
Registration with transformers that does not import it.

transformers takes seconds to import and knows no way to announce a class without its code. So the package's modules are
imported along with transformers' registries, and their classes are entered there as soon as they exist, however their
modules came to be imported.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

from wrapt import when_imported

from .modeling.auto_vfmtok import register_config, register_image_processor, register_model


def register_task(pipeline_class: type) -> None:
    """Have transformers' `pipeline` run the task `image-tokens` by `pipeline_class`."""
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    PIPELINE_REGISTRY.register_pipeline("image-tokens", pipeline_class, pt_model=AutoModel, type="image")


REGISTER: dict[str, Callable[[type], None]] = {
    "VFMTokConfig": register_config,
    "VFMTokARConfig": register_config,
    "VFMTokRARConfig": register_config,
    "VFMTokModel": register_model,
    "VFMTokARForImageGeneration": register_model,
    "VFMTokRARForImageGeneration": register_model,
    "VFMTokImageProcessor": register_image_processor,
    "VFMTokImageTokensPipeline": register_task,
}

# What is imported when another module has been: each at a point where all that it imports itself can be imported.
IMPORTED_ALONG_WITH = {
    "transformers.models.auto.configuration_auto": (
        "vfmtok_hf.modeling.configuration_vfmtok",
        "vfmtok_hf.modeling.configuration_vfmtok_ar",
        "vfmtok_hf.modeling.configuration_vfmtok_rar",
    ),
    # The models' registry is imported in the middle of modeling_layers, which the models need whole.
    "transformers.models.auto.modeling_auto": ("transformers.modeling_layers",),
    "transformers.modeling_layers": (
        "vfmtok_hf.modeling.modeling_vfmtok",
        "vfmtok_hf.modeling.modeling_vfmtok_ar",
    ),
    "vfmtok_hf.modeling.modeling_vfmtok_ar": ("vfmtok_hf.modeling.modeling_vfmtok_rar",),
    "transformers.models.auto.image_processing_auto": ("vfmtok_hf.modeling.image_processing_vfmtok",),
    "transformers.pipelines": ("vfmtok_hf.modeling.image_tokens_vfmtok",),
}


def register_when_needed(modules: dict[str, str]) -> None:
    """
    Args:
        modules: name of the module by name of the class that it defines.
    """
    for class_name, register in REGISTER.items():
        when_imported(modules[class_name])(partial(_register_class, class_name, register))
    for trigger, module_names in IMPORTED_ALONG_WITH.items():
        when_imported(trigger)(partial(_import_modules, module_names))


def _register_class(class_name: str, register: Callable[[type], None], module: ModuleType) -> None:
    register(getattr(module, class_name))


def _import_modules(module_names: tuple[str, ...], _: ModuleType) -> None:
    for module_name in module_names:
        import_module(module_name)
