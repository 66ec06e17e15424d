"""
Makes the VFMTok classes known to transformers.

Two directions: Auto classes load VFMTok checkpoints with this code, and whatever `save_pretrained` writes carries the code
along, for `trust_remote_code=True` where it is not installed.

Each function imports no more of transformers than its own registry, as it may run in the middle of transformers' imports.
"""


def register_config(config_class: type) -> None:
    """Have `AutoConfig` give `config_class` for its `model_type`."""
    from transformers import AutoConfig

    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    config_class.register_for_auto_class()


def register_model(model_class: type) -> None:
    """Have `AutoModel` give `model_class` for its configuration's class."""
    from transformers import AutoModel

    AutoModel.register(model_class.config_class, model_class, exist_ok=True)
    model_class.register_for_auto_class("AutoModel")


def register_image_processor(image_processor_class: type) -> None:
    """Have `AutoImageProcessor` give `image_processor_class` for image tokenizers."""
    from transformers import AutoImageProcessor

    from .configuration_vfmtok import VFMTokConfig

    # Its arithmetic is PIL's under either name; without the second, Auto classes warn about a missing backend.
    backends = {"pil": image_processor_class, "torchvision": image_processor_class}
    AutoImageProcessor.register(VFMTokConfig, image_processor_classes=backends, exist_ok=True)
    image_processor_class.register_for_auto_class()


__all__ = ["register_config", "register_image_processor", "register_model"]
