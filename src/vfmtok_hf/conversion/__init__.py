"""
Convert original VFMTok checkpoints to Hugging Face folders and back. Only this package uses the original's names.
"""

from .build_models import (
    export_original_ar,
    export_original_dinov2,
    export_original_rar,
    export_original_tokenizer,
)
from .convert import ConversionReport, convert_ar, convert_rar, convert_tokenizer
from .errors import CheckpointError


__all__ = [
    "CheckpointError",
    "ConversionReport",
    "convert_ar",
    "convert_rar",
    "convert_tokenizer",
    "export_original_ar",
    "export_original_dinov2",
    "export_original_rar",
    "export_original_tokenizer",
]
