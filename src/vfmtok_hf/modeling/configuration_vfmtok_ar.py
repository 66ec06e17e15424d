"""Configuration of the next-token image generator."""

import math

from transformers import PreTrainedConfig

from .loading_vfmtok import CheckedConfigMixin


VARIANTS = {
    "B": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048},
    "L": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2816},
    "XL": {"num_hidden_layers": 36, "hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 3584},
    "XXL": {"num_hidden_layers": 48, "hidden_size": 1536, "num_attention_heads": 24, "intermediate_size": 4096},
    "2B": {"num_hidden_layers": 48, "hidden_size": 1920, "num_attention_heads": 32, "intermediate_size": 5120},
    "3B": {"num_hidden_layers": 24, "hidden_size": 3200, "num_attention_heads": 32, "intermediate_size": 8704},
}


class VFMTokARConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`VFMTokARForImageGeneration`]. The defaults are the released VFMTok-L generator (arXiv
    2507.08441); [`~VFMTokARConfig.from_variant`] creates the other sizes.

    Args:
        codebook_size (`int`, defaults to 16384):
            Rows of the image tokenizer's codebook, which is the number of different tokens.
        num_classes (`int`, defaults to 1000):
            Class labels, 0 to `num_classes - 1`. Label `num_classes` is the null class: no condition.
        num_image_tokens (`int`, defaults to 256):
            Tokens per image. A square number, because they form a square grid in raster order.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, depth, attention heads and SwiGLU width of the transformer.
        rope_theta (`float`, defaults to 10000.0):
            Base of the 2-D rotary embedding.
        rms_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the RMS norms.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial weights; the output head starts at zero.
        token_dropout, residual_dropout, ffn_dropout, attention_dropout (`float`):
            Dropout, in training only, of the embedded sequence, the attention branch, the MLP branch and the
            attention probabilities.
        class_dropout (`float`, defaults to 0.1):
            Probability of replacing a label with the null class in training, which guidance requires.
        id2label (`dict[int, str]`, *optional*):
            Name of every class.
    """

    model_type = "vfmtok_ar"
    # Two names for the same number.
    attribute_map = {"num_labels": "num_classes"}

    codebook_size: int = 16384
    num_classes: int = 1000
    num_image_tokens: int = 256
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    rope_theta: float | int = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    token_dropout: float | int = 0.1
    residual_dropout: float | int = 0.1
    ffn_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    class_dropout: float | int = 0.1
    id2label: dict[int, str] | dict[str, str] | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def complete(self):
        """Convert the keys of `id2label` to integers, because JSON stores them as strings."""
        if self.id2label is not None:
            self.id2label = {int(label): name for label, name in self.id2label.items()}

    @classmethod
    def from_variant(cls, variant: str, **overrides) -> "VFMTokARConfig":
        """
        The configuration of a released size.

        Args:
            variant (`str`): "B", "L", "XL", "XXL", "2B" or "3B".
            overrides: fields to change.

        Raises:
            ValueError: the variant does not exist.
        """
        if variant not in VARIANTS:
            raise ValueError(f"Unknown VFMTokARConfig variant {variant!r}. Use one of {', '.join(VARIANTS)}.")
        return cls(**{**VARIANTS[variant], **overrides})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Image tokens per side of their grid."""
        return math.isqrt(self.num_image_tokens)

    def validate_architecture(self):
        """Validate relations between fields."""
        if self.grid_size**2 != self.num_image_tokens:
            raise ValueError(f"num_image_tokens must be a square number, got {self.num_image_tokens}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim % 4:
            raise ValueError(
                f"hidden_size / num_attention_heads must be a multiple of 4 (two rotary axes of pairs), got {self.head_dim}."
            )
        if self.id2label is not None and sorted(self.id2label) != list(range(self.num_classes)):
            raise ValueError(
                f"id2label must name each class from 0 to {self.num_classes - 1} once, got {len(self.id2label)} names."
            )


__all__ = ["VFMTokARConfig"]
