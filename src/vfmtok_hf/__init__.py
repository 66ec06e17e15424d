"""
VFMTok for the Hugging Face ecosystem: image tokens from frozen vision foundation models, and autoregressive generators
that turn class labels into those tokens without classifier-free guidance (arXiv 2507.08441).

Importing the package makes its models known to transformers' Auto classes and `image-tokens` to its `pipeline`.
Names are imported when they are first used: torch, transformers and diffusers come with the first one that needs them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lazy_registration import register_when_needed


if TYPE_CHECKING:
    from .hub_kernels import disable_kernels, enable_kernels
    from .modeling.configuration_vfmtok import VFMTokConfig
    from .modeling.configuration_vfmtok_ar import VFMTokARConfig
    from .modeling.configuration_vfmtok_rar import VFMTokRARConfig
    from .modeling.image_processing_vfmtok import VFMTokImageProcessor
    from .modeling.image_tokens_vfmtok import VFMTokImageTokensPipeline
    from .modeling.modeling_vfmtok import VFMTokModel
    from .modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
    from .modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
    from .pipelines.pipeline_vfmtok import VFMTokPipeline

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "emoji")
"""Folder of the small pipeline that comes with the package: 64 x 64 emoji, fourteen classes."""

_MODULES = {
    "VFMTokARConfig": "vfmtok_hf.modeling.configuration_vfmtok_ar",
    "VFMTokARForImageGeneration": "vfmtok_hf.modeling.modeling_vfmtok_ar",
    "VFMTokConfig": "vfmtok_hf.modeling.configuration_vfmtok",
    "VFMTokImageProcessor": "vfmtok_hf.modeling.image_processing_vfmtok",
    "VFMTokImageTokensPipeline": "vfmtok_hf.modeling.image_tokens_vfmtok",
    "VFMTokModel": "vfmtok_hf.modeling.modeling_vfmtok",
    "VFMTokPipeline": "vfmtok_hf.pipelines.pipeline_vfmtok",
    "VFMTokRARConfig": "vfmtok_hf.modeling.configuration_vfmtok_rar",
    "VFMTokRARForImageGeneration": "vfmtok_hf.modeling.modeling_vfmtok_rar",
    "disable_kernels": "vfmtok_hf.hub_kernels",
    "enable_kernels": "vfmtok_hf.hub_kernels",
}

register_when_needed(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "DEFAULT_CHECKPOINT",
    "VFMTokARConfig",
    "VFMTokARForImageGeneration",
    "VFMTokConfig",
    "VFMTokImageProcessor",
    "VFMTokImageTokensPipeline",
    "VFMTokModel",
    "VFMTokPipeline",
    "VFMTokRARConfig",
    "VFMTokRARForImageGeneration",
    "disable_kernels",
    "enable_kernels",
]
