"""Configuration of VFMAE, the continuous image autoencoder of VFMTok2."""

from transformers import PreTrainedConfig

from .autoencoder_config_vfmtok import AutoencoderConfigMixin
from .loading_vfmtok import CheckedConfigMixin  # noqa: F401 - for the Hub, as CONTRIBUTING.md says


# Vision models whose blocks carry a class token, which VFMAE adds to the patches.
VISION_MODEL_TYPES_WITH_CLASS_TOKEN = ("clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit")


class VFMAEConfig(AutoencoderConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`VFMAEModel`]. The defaults are the released autoencoder on DINOv2-L.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The frozen vision model, one with a class token: DINOv2 with or without registers, CLIP vision or DINOv3
            ViT. Defaults to DINOv2-L/14 with 4 registers.
        vision_feature_layers (`list[int]`, defaults to `[6, 12, 18, 24]`):
            Feature levels, ascending: the 1-based number of the block whose output is read. A level that is the
            model's last block is read after the model's final norm, all others before it.
        vision_image_size (`int`, defaults to 224):
            Side, in pixels, to which the model resizes its input before the vision model sees it. It must give as many
            patches as the image decoder has positions.
        vision_image_mean, vision_image_std (`list[float]`, *optional*):
            Normalization of the vision model's input in [0, 1]. Unset: the vision model's own.
        save_vision_model (`bool`, defaults to `True`):
            Whether checkpoints contain the vision model. A light checkpoint (`False`) decodes as it is; `encode`
            needs `VFMAEModel.load_vision_model` first.
        vision_model_name_or_path, vision_model_revision (`str`, *optional*):
            Where a light checkpoint's vision model comes from.
        image_size (`int`, defaults to 256):
            Side, in pixels, of the images that the decoder generates.
        num_anchors (`int`, defaults to 256):
            Positions of the latents. A square number: they lie on a square grid.
        hidden_size (`int`, defaults to 512):
            Width of the anchor encoder and of the ViT decoder.
        encoder_num_layers, encoder_num_heads, encoder_num_points, encoder_intermediate_size (`int`):
            Deformable layers of the anchor encoder, attention heads, sampling points per head and level, MLP width.
        latent_channels (`int`, defaults to 32):
            Channels of the latents.
        bottleneck_num_groups (`int`, defaults to 32):
            Groups of the group norm in front of the latents.
        decoder_num_layers, feature_decoder_num_layers (`int`, defaults to 4 and 1):
            Layers of the ViT decoder's image branch and of its feature branch.
        decoder_num_heads, decoder_intermediate_size (`int`):
            Attention heads and SwiGLU width of both.
        decoder_dropout (`float`, defaults to 0.1):
            Dropout of their attention probabilities, in training only.
        feature_loss_weight (`float`, defaults to 1.0):
            Weight of the loss on reconstructed vision features.
        pixel_decoder_base_channels (`int`), pixel_decoder_channel_multipliers (`list[int]`):
            Channels of the CNN pixel decoder at full resolution and their multiples from fine to coarse. The image
            is upsampled `2 ** (len(multipliers) - 1)` times.
        pixel_decoder_num_res_blocks (`int`, defaults to 2):
            As the original counts them: each resolution has one residual block more.
        pixel_decoder_num_groups (`int`, defaults to 32):
            Groups of the pixel decoder's group norms.
    """

    model_type = "vfmae"
    # Of its attention, in encoder and decoder.
    is_causal = False

    vision_config: PreTrainedConfig | None = None
    vision_feature_layers: list[int] | tuple[int, ...] = (6, 12, 18, 24)
    vision_image_size: int = 224
    vision_image_mean: list[float] | tuple[float, ...] | None = None
    vision_image_std: list[float] | tuple[float, ...] | None = None
    save_vision_model: bool = True
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    image_size: int = 256
    num_anchors: int = 256
    hidden_size: int = 512
    encoder_num_layers: int = 6
    encoder_num_heads: int = 8
    encoder_num_points: int = 4
    encoder_intermediate_size: int = 1024
    latent_channels: int = 32
    bottleneck_num_groups: int = 32
    decoder_num_layers: int = 4
    feature_decoder_num_layers: int = 1
    decoder_num_heads: int = 8
    decoder_intermediate_size: int = 1368
    decoder_dropout: float | int = 0.1
    feature_loss_weight: float | int = 1.0
    pixel_decoder_base_channels: int = 128
    pixel_decoder_channel_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    pixel_decoder_num_res_blocks: int = 2
    pixel_decoder_num_groups: int = 32

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    @property
    def feature_grid_size(self) -> int:
        """Patches per side of the last feature level: both branches of the decoder share one position table."""
        return self.image_grid_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of an image's latents."""
        return self.latent_channels, self.anchor_grid_size, self.anchor_grid_size

    def validate_architecture(self):
        """Validate relations between fields."""
        super().validate_architecture()
        vision_config = self.vision_config
        if vision_config.model_type not in VISION_MODEL_TYPES_WITH_CLASS_TOKEN:
            raise ValueError(
                f"VFMAE adds the vision model's class token to its patches, and {vision_config.model_type!r} gives none. Use "
                f"one of {', '.join(VISION_MODEL_TYPES_WITH_CLASS_TOKEN)}."
            )
        if self.vision_image_size != self.image_grid_size * vision_config.patch_size:
            raise ValueError(
                f"Images of {self.image_size} pixels are decoded on a grid of side {self.image_grid_size}, and the vision "
                f"model must see as many patches of {vision_config.patch_size}: vision_image_size must be "
                f"{self.image_grid_size * vision_config.patch_size}, got {self.vision_image_size}."
            )
        if self.hidden_size % self.bottleneck_num_groups:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by bottleneck_num_groups {self.bottleneck_num_groups}."
            )


__all__ = ["VFMAEConfig"]
