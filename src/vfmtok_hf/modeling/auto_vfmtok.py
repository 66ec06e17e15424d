"""Makes the VFMTok classes known to transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .configuration_vfmtok import VFMTokConfig
from .configuration_vfmtok_ar import VFMTokARConfig
from .configuration_vfmtok_rar import VFMTokRARConfig
from .image_processing_vfmtok import VFMTokImageProcessor
from .modeling_vfmtok import VFMTokModel
from .modeling_vfmtok_ar import VFMTokARForImageGeneration
from .modeling_vfmtok_rar import VFMTokRARForImageGeneration


MODEL_CLASSES = {
    VFMTokConfig: VFMTokModel,
    VFMTokARConfig: VFMTokARForImageGeneration,
    VFMTokRARConfig: VFMTokRARForImageGeneration,
}


def register_auto_classes() -> None:
    """
    Two directions: Auto classes load VFMTok checkpoints with this code, and whatever `save_pretrained` writes carries
    the code along, for `trust_remote_code=True` where it is not installed.
    """
    for config_class, model_class in MODEL_CLASSES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModel")
    # Its arithmetic is PIL's under either name; without the second, Auto classes warn about a missing backend.
    backends = {"pil": VFMTokImageProcessor, "torchvision": VFMTokImageProcessor}
    AutoImageProcessor.register(VFMTokConfig, image_processor_classes=backends, exist_ok=True)
    VFMTokImageProcessor.register_for_auto_class()


__all__ = ["MODEL_CLASSES", "register_auto_classes"]
