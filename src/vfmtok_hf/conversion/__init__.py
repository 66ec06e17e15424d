"""
Convert original VFMTok checkpoints to Hugging Face folders and back. Only this package uses the original's names.
"""

from .build_models import (
    export_diffusers_dit,
    export_latent_statistics,
    export_original_ar,
    export_original_dinov2,
    export_original_dit,
    export_original_rar,
    export_original_tokenizer,
    export_original_vfmae,
)
from .convert import ConversionReport, convert_ar, convert_dit, convert_rar, convert_tokenizer, convert_vfmae
from .errors import CheckpointError


__all__ = [
    "CheckpointError",
    "ConversionReport",
    "convert_ar",
    "convert_dit",
    "convert_rar",
    "convert_tokenizer",
    "convert_vfmae",
    "export_latent_statistics",
    "export_diffusers_dit",
    "export_original_ar",
    "export_original_dinov2",
    "export_original_dit",
    "export_original_rar",
    "export_original_tokenizer",
    "export_original_vfmae",
]
