"""
Makes the VFMTok classes known to transformers.

Two directions: Auto classes load VFMTok checkpoints with this code, and whatever `save_pretrained` writes carries the code
along, for `trust_remote_code=True` where it is not installed.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_vfmtok import VFMTokConfig


def register_config(config_class: type) -> None:
    """Have `AutoConfig` give `config_class` for its `model_type`."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()


def register_model(model_class: type) -> None:
    """Have `AutoModel` give `model_class` for its configuration's class."""
    AutoModel.register(model_class.config_class, model_class, exist_ok=True)
    model_class.register_for_auto_class("AutoModel")


def register_image_processor(image_processor_class: type) -> None:
    """Have `AutoImageProcessor` give `image_processor_class` for image tokenizers."""
    AutoImageProcessor.register(VFMTokConfig, image_processor_class, exist_ok=True)
    image_processor_class.register_for_auto_class()


def register_task(pipeline_class: type) -> None:
    """Have transformers' `pipeline` run the task `image-tokens` by `pipeline_class`."""
    from transformers.pipelines import PIPELINE_REGISTRY

    PIPELINE_REGISTRY.register_pipeline("image-tokens", pipeline_class, pt_model=AutoModel, type="image")


__all__ = ["register_config", "register_image_processor", "register_model", "register_task"]
