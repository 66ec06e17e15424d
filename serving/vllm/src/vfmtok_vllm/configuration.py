"""
Configurations of the generators, as vLLM reads them.

Fields are those of the checkpoints' config.json that the models here read, and the server's guidance. What is derived is a
property, because vLLM applies `--hf-overrides` to the fields after a configuration is created.
"""

import math
from typing import ClassVar

from transformers import PretrainedConfig


# Widths of attention heads for which vLLM's CPU kernels are built. Its GPU kernels have them, too.
KERNEL_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


class GeneratorConfig(PretrainedConfig):
    """
    What both configurations have in common.

    Args:
        codebook_size (`int`): number of different image tokens.
        num_classes (`int`): class labels; label `num_classes` is the null class, without a condition.
        num_image_tokens (`int`): tokens per image.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): sizes of the transformer.
        guidance_scale (`float`, defaults to 1.0): scale of classifier-free guidance, for all requests of a server; 1 is off.
        guidance_interval (`int`, *optional*): guidance ends after `guidance_interval + 2` tokens, as in `generate`.
    """

    # Positions before the first image token.
    num_condition_tokens: ClassVar[int]

    codebook_size: int = 16384
    num_classes: int = 1000
    num_image_tokens: int = 256
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    guidance_scale: float = 1.0
    guidance_interval: int | None = None

    @property
    def vocab_size(self) -> int:
        """Token ids: image tokens, then classes, then the null class."""
        return self.codebook_size + self.num_classes + 1

    @property
    def max_position_embeddings(self) -> int:
        """Length of a whole sequence."""
        return self.num_condition_tokens + self.num_image_tokens

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of an attention head in vLLM's cache, which is padded with zeros to that of a kernel."""
        return next(width for width in KERNEL_WIDTHS if width >= self.head_width)

    @property
    def num_streams(self) -> int:
        """Rows per token: with guidance, a second one without the class."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def guidance_scales(self) -> list[float]:
        """The guidance scale at each of the `max_position_embeddings` positions, 1 where it is off."""
        scales = [self.guidance_scale_at(step / self.num_image_tokens) for step in range(self.num_image_tokens)]
        if self.guidance_interval is not None:
            num_guided = min(self.guidance_interval + 2, self.num_image_tokens)
            scales[num_guided:] = [1.0] * (self.num_image_tokens - num_guided)
        # The last position of the condition predicts the first token, and the last token predicts nothing.
        return [1.0] * (self.num_condition_tokens - 1) + scales + [1.0]

    def guidance_scale_at(self, progress: float) -> float:
        """The guidance scale after a fraction `progress` in [0, 1) of the tokens."""
        return self.guidance_scale


class VFMTokARConfig(GeneratorConfig):
    """
    The next-token generator.

    Args:
        rope_theta (`float`): base of the 2-D rotary embedding.
        rms_norm_eps (`float`): epsilon of the RMS norms.
    """

    model_type = "vfmtok_ar"
    num_condition_tokens = 1

    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class VFMTokRARConfig(GeneratorConfig):
    """
    The randomized-order generator, here in raster order. Its guidance increases from 1 to `guidance_scale`.

    Args:
        layer_norm_eps (`float`): epsilon of the layer norms.
        num_position_embeddings, num_timestep_embeddings (`int`): rows of the tables.
        guidance_scale_pow (`float`, defaults to 1.0): power of the schedule. A larger one increases later, 0 is constant.
    """

    model_type = "vfmtok_rar"
    num_condition_tokens = 2

    layer_norm_eps: float = 1e-6
    num_position_embeddings: int = 1280
    num_timestep_embeddings: int = 356
    guidance_scale_pow: float = 1.0

    def guidance_scale_at(self, progress: float) -> float:
        """Power-cosine schedule (RAR, arXiv 2411.00776): 1 + (scale - 1) (1 - cos(pi progress^power)) / 2."""
        return 1 + (self.guidance_scale - 1) * (1 - math.cos(math.pi * progress**self.guidance_scale_pow)) / 2


__all__ = ["VFMTokARConfig", "VFMTokRARConfig"]
