"""
VFMTok for the Hugging Face ecosystem: image tokens from frozen vision foundation models, and autoregressive generators
that sample such tokens from class labels without classifier-free guidance (arXiv 2507.08441).

Importing the package registers its models with transformers' Auto classes and `image-tokens` with its `pipeline`.
Names are imported on first use: torch, transformers and diffusers are imported with the first name that needs them.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported


if TYPE_CHECKING:
    from .hub_kernels import disable_kernels, enable_kernels
    from .modeling.configuration_vfmae import VFMAEConfig
    from .modeling.configuration_vfmtok import VFMTokConfig
    from .modeling.configuration_vfmtok_ar import VFMTokARConfig
    from .modeling.configuration_vfmtok_dit import VFMTokDiTConfig
    from .modeling.configuration_vfmtok_rar import VFMTokRARConfig
    from .modeling.image_processing_vfmtok import VFMTokImageProcessor
    from .modeling.image_tokens_vfmtok import VFMTokImageTokensPipeline
    from .modeling.modeling_vfmae import VFMAEModel
    from .modeling.modeling_vfmtok import VFMTokModel
    from .modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
    from .modeling.modeling_vfmtok_dit import VFMTokDiTForImageGeneration
    from .modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
    from .pipelines.pipeline_vfmtok import VFMTokPipeline
    from .pipelines.pipeline_vfmtok_dit import VFMTokDiTPipeline

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "emoji")
"""Folder of the small pipeline that ships with the package: 128 x 128 emoji in fourteen classes."""

_MODULES = {
    "VFMAEConfig": "modeling.configuration_vfmae",
    "VFMAEModel": "modeling.modeling_vfmae",
    "VFMTokARConfig": "modeling.configuration_vfmtok_ar",
    "VFMTokARForImageGeneration": "modeling.modeling_vfmtok_ar",
    "VFMTokConfig": "modeling.configuration_vfmtok",
    "VFMTokDiTConfig": "modeling.configuration_vfmtok_dit",
    "VFMTokDiTForImageGeneration": "modeling.modeling_vfmtok_dit",
    "VFMTokDiTPipeline": "pipelines.pipeline_vfmtok_dit",
    "VFMTokImageProcessor": "modeling.image_processing_vfmtok",
    "VFMTokImageTokensPipeline": "modeling.image_tokens_vfmtok",
    "VFMTokModel": "modeling.modeling_vfmtok",
    "VFMTokPipeline": "pipelines.pipeline_vfmtok",
    "VFMTokRARConfig": "modeling.configuration_vfmtok_rar",
    "VFMTokRARForImageGeneration": "modeling.modeling_vfmtok_rar",
    "disable_kernels": "hub_kernels",
    "enable_kernels": "hub_kernels",
}

# transformers takes seconds to import, and its registries require the actual classes. So ours are registered when
# transformers is imported, whichever of the two is imported first.
when_imported("transformers")(lambda _: import_module("vfmtok_hf.modeling"))
when_imported("transformers.pipelines")(lambda _: import_module("vfmtok_hf.modeling.image_tokens_vfmtok"))


@when_imported("vfmtok_hf.modeling.image_tokens_vfmtok")
def _register_task(module: ModuleType) -> None:
    import_module("vfmtok_hf.modeling.auto_vfmtok").register_task(module.VFMTokImageTokensPipeline)


@when_imported("vfmtok_hf.modeling.generation_vfmtok")
def _speed_up_compiled_steps(module: ModuleType) -> None:
    module.BEFORE_COMPILING.append(import_module("vfmtok_hf.cpu.compiling").use_row_sums)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "DEFAULT_CHECKPOINT",
    "VFMAEConfig",
    "VFMAEModel",
    "VFMTokARConfig",
    "VFMTokARForImageGeneration",
    "VFMTokConfig",
    "VFMTokDiTConfig",
    "VFMTokDiTForImageGeneration",
    "VFMTokDiTPipeline",
    "VFMTokImageProcessor",
    "VFMTokImageTokensPipeline",
    "VFMTokModel",
    "VFMTokPipeline",
    "VFMTokRARConfig",
    "VFMTokRARForImageGeneration",
    "disable_kernels",
    "enable_kernels",
]
