"""Configuration of the randomized-order image generator."""

from transformers import PreTrainedConfig

from .loading_vfmtok import CheckedConfigMixin


VARIANTS = {
    "L": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
    "XL": {"num_hidden_layers": 32, "hidden_size": 1280, "num_attention_heads": 16, "intermediate_size": 4096},
    "XXL": {"num_hidden_layers": 40, "hidden_size": 1408, "num_attention_heads": 16, "intermediate_size": 6144},
}


class VFMTokRARConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`VFMTokRARForImageGeneration`]. The defaults are the released VFMTok-RAR-L generator (arXiv
    2507.08441, after RAR, arXiv 2411.00776); [`~VFMTokRARConfig.from_variant`] creates the other sizes.

    Args:
        codebook_size (`int`, defaults to 16384):
            Rows of the image tokenizer's codebook, which is the number of different tokens.
        num_classes (`int`, defaults to 1000):
            Class labels, 0 to `num_classes - 1`. Label `num_classes` is the null class: no condition.
        num_image_tokens (`int`, defaults to 256):
            Tokens of one image.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Width, depth, attention heads and MLP width of the transformer.
        layer_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the layer norms.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of initial weights; modulation layers start at zero.
        num_position_embeddings, num_timestep_embeddings (`int`, defaults to 1280 and 356):
            Rows of the position tables and of the timestep table. Only `num_image_tokens + 2` of them are read, for the
            start token, the class and the image tokens; the defaults are the original's.
        dropout, attention_dropout (`float`):
            Dropout, in training only, of the branches' outputs and the MLP's activations, and of the attention
            probabilities.
        class_dropout (`float`, defaults to 0.1):
            Probability of replacing a label with the null class in training, which guidance requires.
        id2label (`dict[int, str]`, *optional*):
            Name of every class.
    """

    model_type = "vfmtok_rar"
    # Two names for the same number.
    attribute_map = {"num_labels": "num_classes"}

    codebook_size: int = 16384
    num_classes: int = 1000
    num_image_tokens: int = 256
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    num_position_embeddings: int = 1280
    num_timestep_embeddings: int = 356
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    class_dropout: float | int = 0.1
    id2label: dict[int, str] | dict[str, str] | None = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def complete(self):
        """Convert the keys of `id2label` to integers, because JSON stores them as strings."""
        if self.id2label is not None:
            self.id2label = {int(label): name for label, name in self.id2label.items()}

    @classmethod
    def from_variant(cls, variant: str, **overrides) -> "VFMTokRARConfig":
        """
        The configuration of a released size. XL has `intermediate_size` 4096 in VFMTok-RAR's settings, and 5120 in
        those of the RAR it comes from.

        Args:
            variant (`str`): "L", "XL" or "XXL".
            overrides: fields to change.

        Raises:
            ValueError: the variant does not exist.
        """
        if variant not in VARIANTS:
            raise ValueError(f"Unknown VFMTokRARConfig variant {variant!r}. Use one of {', '.join(VARIANTS)}.")
        return cls(**{**VARIANTS[variant], **overrides})

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Validate relations between fields."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by num_attention_heads {self.num_attention_heads}."
            )
        for name in ("num_position_embeddings", "num_timestep_embeddings"):
            if getattr(self, name) < self.num_image_tokens + 2:
                raise ValueError(
                    f"{name} must be at least num_image_tokens + 2 = {self.num_image_tokens + 2}, got {getattr(self, name)}."
                )
        if self.id2label is not None and sorted(self.id2label) != list(range(self.num_classes)):
            raise ValueError(
                f"id2label must name each class from 0 to {self.num_classes - 1} once, got {len(self.id2label)} names."
            )


__all__ = ["VFMTokRARConfig"]
