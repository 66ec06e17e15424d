"""Shared parts of the autoencoders' configurations: vision model, anchor encoder and pixel decoder."""

import math

from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .loading_vfmtok import CheckedConfigMixin


# Mean and std of each family's image processor. timm models have theirs in `pretrained_cfg`.
IMAGENET_MEAN_STD = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
MEAN_STD_BY_VISION_MODEL_TYPE = {
    "dinov2": IMAGENET_MEAN_STD,
    "dinov2_with_registers": IMAGENET_MEAN_STD,
    "dinov3_vit": IMAGENET_MEAN_STD,
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "timm_wrapper": IMAGENET_MEAN_STD,
    "timm_backbone": IMAGENET_MEAN_STD,
}

# DINOv2-L/14 with 4 registers.
RELEASED_VISION_CONFIG = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
    "patch_size": 14,
    "num_register_tokens": 4,
}


class AutoencoderConfigMixin(CheckedConfigMixin):
    """
    Derived fields and validation for the configurations of autoencoders, which declare the fields.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*): the vision model. Defaults to the released DINOv2-L.
    """

    sub_configs = {"vision_config": AutoConfig}

    def __init__(self, vision_config: dict | PreTrainedConfig | None = None, **kwargs):
        if not isinstance(vision_config, PreTrainedConfig):
            fields = RELEASED_VISION_CONFIG if vision_config is None else vision_config
            vision_config = AutoConfig.for_model(**{"model_type": RELEASED_VISION_CONFIG["model_type"], **fields})
        super().__init__(vision_config=vision_config, **kwargs)

    def complete(self):
        """Derive missing fields, and convert tuples to lists, as JSON does."""
        self.vision_feature_layers = list(self.vision_feature_layers)
        self.pixel_decoder_channel_multipliers = list(self.pixel_decoder_channel_multipliers)
        mean, std = self._vision_model_mean_std()
        self.vision_image_mean = list(self.vision_image_mean or mean)
        self.vision_image_std = list(self.vision_image_std or std)

    @property
    def anchor_grid_size(self) -> int:
        """Anchors per side of the grid of reference points."""
        return math.isqrt(self.num_anchors)

    @property
    def upsampling_factor(self) -> int:
        """Upsampling factor of the pixel decoder."""
        return 2 ** (len(self.pixel_decoder_channel_multipliers) - 1)

    @property
    def image_grid_size(self) -> int:
        """Image mask tokens per side of the ViT decoder's grid."""
        return self.image_size // self.upsampling_factor

    def _vision_model_mean_std(self):
        vision_config = self.vision_config
        if vision_config.model_type not in MEAN_STD_BY_VISION_MODEL_TYPE:
            raise ValueError(
                f"Vision models of type {vision_config.model_type!r} are not supported. Use one of "
                f"{sorted(MEAN_STD_BY_VISION_MODEL_TYPE)}; for a two-tower model (CLIP, SigLIP), pass its vision config."
            )
        pretrained_cfg = getattr(vision_config, "pretrained_cfg", None) or {}
        mean, std = MEAN_STD_BY_VISION_MODEL_TYPE[vision_config.model_type]
        return pretrained_cfg.get("mean", mean), pretrained_cfg.get("std", std)

    def validate_architecture(self):
        """Validate relations between fields."""
        if self.anchor_grid_size**2 != self.num_anchors:
            raise ValueError(f"num_anchors must be a square number, got {self.num_anchors}.")
        for name in ("encoder_num_heads", "decoder_num_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size {self.hidden_size} must be divisible by {name} {getattr(self, name)}.")
        if self.image_size % self.upsampling_factor:
            raise ValueError(
                f"image_size {self.image_size} must be divisible by {self.upsampling_factor}, the upsampling factor of "
                f"{len(self.pixel_decoder_channel_multipliers)} pixel_decoder_channel_multipliers."
            )
        if self.pixel_decoder_base_channels % self.pixel_decoder_num_groups:
            raise ValueError(
                f"pixel_decoder_base_channels {self.pixel_decoder_base_channels} must be divisible by "
                f"pixel_decoder_num_groups {self.pixel_decoder_num_groups}."
            )
        for name, value in self.to_dict().items():
            if name.endswith("_loss_weight") and value < 0:
                raise ValueError(f"{name} must be 0 (off) or larger, got {value}.")
        layers = list(self.vision_feature_layers)
        if not layers or layers != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"vision_feature_layers must be ascending, distinct and not negative, got {layers}.")
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if depth is not None and not (layers[0] >= 1 and layers[-1] <= depth):
            raise ValueError(f"vision_feature_layers {layers} must be in 1..{depth}, the blocks of the vision model.")


__all__ = ["RELEASED_VISION_CONFIG", "AutoencoderConfigMixin"]
