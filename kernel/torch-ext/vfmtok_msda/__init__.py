"""Multi-scale deformable attention with compiled CPU and CUDA implementations."""

from . import layers
from .deformable_attention import ms_deform_attn


__all__ = ["layers", "ms_deform_attn"]
