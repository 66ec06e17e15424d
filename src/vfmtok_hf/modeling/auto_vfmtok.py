"""
Register the VFMTok classes with transformers.

Auto classes then load VFMTok checkpoints with this code, and `save_pretrained` also saves the code, for
`trust_remote_code=True` without this package.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel


def register_config(config_class: type) -> None:
    """Register `config_class` with `AutoConfig`."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()


def register_model(model_class: type) -> None:
    """Register `model_class` with `AutoModel`."""
    AutoModel.register(model_class.config_class, model_class, exist_ok=True)
    model_class.register_for_auto_class("AutoModel")


def register_image_processor(image_processor_class: type, *config_classes: type) -> None:
    """Register `image_processor_class` with `AutoImageProcessor` for models of these `config_classes`."""
    for config_class in config_classes:
        AutoImageProcessor.register(config_class, image_processor_class, exist_ok=True)
    image_processor_class.register_for_auto_class()


def register_task(pipeline_class: type) -> None:
    """Register `pipeline_class` for the task `image-tokens`."""
    from transformers.pipelines import PIPELINE_REGISTRY

    PIPELINE_REGISTRY.register_pipeline("image-tokens", pipeline_class, pt_model=AutoModel, type="image")


__all__ = ["register_config", "register_image_processor", "register_model", "register_task"]
