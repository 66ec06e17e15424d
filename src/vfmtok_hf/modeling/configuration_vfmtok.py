"""Configuration of the VFMTok image tokenizer."""

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


# What each family's own image processor normalizes with. timm models carry theirs in `pretrained_cfg`.
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


class VFMTokConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`VFMTokModel`]. The defaults are the released DINOv2-L tokenizer (arXiv 2507.08441).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The frozen vision model: DINOv2 with or without registers, CLIP vision, SigLIP vision, DINOv3 ViT, or a
            timm model through `TimmWrapperConfig` / `TimmBackboneConfig`. Defaults to DINOv2-L/14 with 4 registers.
        vision_feature_layers (`list[int]`, defaults to `[6, 12, 18, 24]`):
            Feature levels, ascending. For transformers models the 1-based number of the block whose output is read;
            for timm models timm's own 0-based `forward_intermediates` index. A level that is the model's last block
            is read after the model's final norm, all others before it.
        vision_image_size (`int`, defaults to 336):
            Side, in pixels, to which the model resizes its input before the vision model sees it.
        vision_image_mean, vision_image_std (`list[float]`, *optional*):
            Normalisation of the vision model's input in [0, 1]. Unset: the vision model's own.
        save_vision_model (`bool`, defaults to `True`):
            Whether checkpoints contain the vision model. A light checkpoint (`False`) decodes as it is; `encode`
            needs `VFMTokModel.load_vision_model` first.
        vision_model_name_or_path, vision_model_revision (`str`, *optional*):
            Where a light checkpoint's vision model comes from.
        image_size (`int`, defaults to 336):
            Side, in pixels, of the images that the decoder generates.
        num_anchors (`int`, defaults to 256):
            Image tokens per image. A square number: the anchors' reference points form a square grid.
        hidden_size (`int`, defaults to 512):
            Width of the anchor encoder and of the ViT decoder.
        encoder_num_layers, encoder_num_heads, encoder_num_points, encoder_intermediate_size (`int`):
            Deformable layers of the anchor encoder, attention heads, sampling points per head and level, MLP width.
        decoder_num_layers, decoder_num_heads, decoder_intermediate_size (`int`):
            The same for the ViT decoder; its MLP is a SwiGLU of `decoder_intermediate_size`.
        decoder_dropout (`float`, defaults to 0.1):
            Dropout of the ViT decoder's attention probabilities, in training only.
        num_register_tokens (`int`, defaults to 4):
            Register tokens that the original appends to the ViT decoder's causal sequence. Being last they influence
            nothing; they are kept so that conversion loses nothing.
        feature_grid_size (`int`, *optional*):
            Patches per side of the last feature level: the side of the ViT decoder's position table and of the
            features it reconstructs. The model derives it from its vision model where it is unset, and refuses another.
        codebook_size, codebook_dim (`int`, defaults to 16384 and 12):
            Number and width of the codebook's rows.
        codebook_loss_weight, commitment_loss_weight (`float`, defaults to 1.0 and 0.25):
            Weights of the codebook loss and of the commitment loss.
        entropy_loss_weight (`float`, defaults to 0.0):
            Weight of the entropy loss. At 0 it is not computed.
        feature_loss_weight (`float`, defaults to 1.0):
            Weight of the loss on reconstructed vision features.
        pixel_decoder_base_channels (`int`), pixel_decoder_channel_multipliers (`list[int]`):
            Channels of the CNN pixel decoder at full resolution and their multiples from fine to coarse. The image
            is upsampled `2 ** (len(multipliers) - 1)` times.
        pixel_decoder_num_res_blocks (`int`, defaults to 1):
            As the original counts them: each resolution has one residual block more.
        pixel_decoder_num_groups (`int`, defaults to 32):
            Groups of the pixel decoder's group norms.
    """

    model_type = "vfmtok"
    # Names of older configurations.
    attribute_map = {"commitment_cost": "commitment_loss_weight", "entropy_loss_ratio": "entropy_loss_weight"}
    sub_configs = {"vision_config": AutoConfig}

    vision_config: PreTrainedConfig | None = None
    vision_feature_layers: list[int] | tuple[int, ...] = (6, 12, 18, 24)
    vision_image_size: int = 336
    vision_image_mean: list[float] | tuple[float, ...] | None = None
    vision_image_std: list[float] | tuple[float, ...] | None = None
    save_vision_model: bool = True
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    image_size: int = 336
    num_anchors: int = 256
    hidden_size: int = 512
    encoder_num_layers: int = 6
    encoder_num_heads: int = 8
    encoder_num_points: int = 4
    encoder_intermediate_size: int = 1024
    decoder_num_layers: int = 6
    decoder_num_heads: int = 8
    decoder_intermediate_size: int = 1368
    decoder_dropout: float | int = 0.1
    num_register_tokens: int = 4
    feature_grid_size: int | None = None
    codebook_size: int = 16384
    codebook_dim: int = 12
    codebook_loss_weight: float | int = 1.0
    commitment_loss_weight: float | int = 0.25
    entropy_loss_weight: float | int = 0.0
    feature_loss_weight: float | int = 1.0
    pixel_decoder_base_channels: int = 128
    pixel_decoder_channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    pixel_decoder_num_res_blocks: int = 1
    pixel_decoder_num_groups: int = 32

    def __init__(self, vision_config: dict | PreTrainedConfig | None = None, **kwargs):
        if not isinstance(vision_config, PreTrainedConfig):
            fields = RELEASED_VISION_CONFIG if vision_config is None else vision_config
            vision_config = AutoConfig.for_model(**{"model_type": RELEASED_VISION_CONFIG["model_type"], **fields})
        super().__init__(vision_config=vision_config, **kwargs)

    def complete(self):
        """Derive the fields that are left out, and make lists of tuples, as JSON does."""
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
        """How many times the pixel decoder enlarges the ViT decoder's grid."""
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
                f"{sorted(MEAN_STD_BY_VISION_MODEL_TYPE)}; of a two-tower model (CLIP, SigLIP) pass the vision config."
            )
        pretrained_cfg = getattr(vision_config, "pretrained_cfg", None) or {}
        mean, std = MEAN_STD_BY_VISION_MODEL_TYPE[vision_config.model_type]
        return pretrained_cfg.get("mean", mean), pretrained_cfg.get("std", std)

    def validate_architecture(self):
        """Rules between fields."""
        if self.anchor_grid_size**2 != self.num_anchors:
            raise ValueError(f"num_anchors must be a square number, got {self.num_anchors}.")
        for name in ("encoder_num_heads", "decoder_num_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size {self.hidden_size} must be divisible by {name} {getattr(self, name)}.")
        if self.image_size % self.upsampling_factor:
            raise ValueError(
                f"image_size {self.image_size} must be divisible by {self.upsampling_factor}, the enlargement of "
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
            raise ValueError(f"vision_feature_layers {layers} must lie in 1..{depth}, the blocks of the vision model.")


__all__ = ["VFMTokConfig"]
