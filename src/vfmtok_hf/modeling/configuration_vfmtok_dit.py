"""Configuration of the diffusion transformer on VFMAE's latents."""

from transformers import PreTrainedConfig

from .loading_vfmtok import CheckedConfigMixin


class VFMTokDiTConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`VFMTokDiTForImageGeneration`]. The defaults are the released DiTDH-XL of VFMTok2.

    Args:
        latent_channels (`int`, defaults to 32):
            Channels of the latents.
        sample_size (`int`, defaults to 16):
            Side of the latents' grid; each position is a token.
        num_classes (`int`, defaults to 1000):
            Class labels, 0 to `num_classes - 1`. Label `num_classes` is the null class: no condition.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, depth, attention heads and SwiGLU width of the encoder, which computes the head's condition.
        head_hidden_size, head_num_hidden_layers, head_num_attention_heads, head_intermediate_size (`int`):
            The same of the head, which is wide and shallow.
        time_embedding_size (`int`, defaults to 256):
            Frequencies of the time embedding.
        rope_theta (`float`, defaults to 10000.0):
            Base of the 2-D rotary embedding and of the position table.
        rms_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the RMS norms.
        class_dropout (`float`, defaults to 0.1):
            Probability with which training replaces a label by the null class, which guidance needs.
        id2label (`dict[int, str]`, *optional*):
            Name of every class.
    """

    model_type = "vfmtok_dit"
    # One number under two names.
    attribute_map = {"num_labels": "num_classes"}

    latent_channels: int = 32
    sample_size: int = 16
    num_classes: int = 1000
    hidden_size: int = 1152
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    intermediate_size: int = 3072
    head_hidden_size: int = 2048
    head_num_hidden_layers: int = 2
    head_num_attention_heads: int = 16
    head_intermediate_size: int = 5461
    time_embedding_size: int = 256
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-6
    class_dropout: float | int = 0.1
    id2label: dict[int, str] | dict[str, str] | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def complete(self):
        """Convert the keys of `id2label` to integers, because JSON stores them as strings."""
        if self.id2label is not None:
            self.id2label = {int(label): name for label, name in self.id2label.items()}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of an image's latents."""
        return self.latent_channels, self.sample_size, self.sample_size

    def validate_architecture(self):
        """Validate relations between fields."""
        for prefix in ("", "head_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % (4 * heads):
                raise ValueError(
                    f"{prefix}hidden_size {width} must give each of {heads} {prefix}num_attention_heads a multiple of 4 "
                    "channels, two rotary axes of pairs."
                )
        if self.id2label is not None and sorted(self.id2label) != list(range(self.num_classes)):
            raise ValueError(
                f"id2label must name each class from 0 to {self.num_classes - 1} once, got {len(self.id2label)} names."
            )


__all__ = ["VFMTokDiTConfig"]
