"""Configuration of the VFMTok image tokenizer."""

from transformers import PreTrainedConfig

from .autoencoder_config_vfmtok import AutoencoderConfigMixin
from .loading_vfmtok import CheckedConfigMixin  # noqa: F401 - for the Hub, as CONTRIBUTING.md says


class VFMTokConfig(AutoencoderConfigMixin, PreTrainedConfig):
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
            Side, in pixels, to which the model resizes the vision model's input.
        vision_image_mean, vision_image_std (`list[float]`, *optional*):
            Normalization of the vision model's input in [0, 1]. Defaults to the vision model's own.
        save_vision_model (`bool`, defaults to `True`):
            Whether checkpoints contain the vision model. A light checkpoint (`False`) can decode; `encode` needs
            `VFMTokModel.load_vision_model` first.
        vision_model_name_or_path, vision_model_revision (`str`, *optional*):
            Source of a light checkpoint's vision model.
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
            Register tokens that the original appends to the ViT decoder's causal sequence. They have no effect, because
            they come last; they are kept for converting back.
        feature_grid_size (`int`, *optional*):
            Patches per side of the last feature level: the side of the ViT decoder's position table and of the
            features it reconstructs. By default it is derived from the vision model; any other value is refused.
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
            Residual blocks per resolution as counted by the original: there is one more.
        pixel_decoder_num_groups (`int`, defaults to 32):
            Groups of the pixel decoder's group norms.
    """

    model_type = "vfmtok"
    # Names of older configurations.
    attribute_map = {"commitment_cost": "commitment_loss_weight", "entropy_loss_ratio": "entropy_loss_weight"}
    # Attention of encoder and decoder.
    is_causal = True

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

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


__all__ = ["VFMTokConfig"]
