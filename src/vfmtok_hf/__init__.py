"""
VFMTok for the Hugging Face ecosystem: image tokens from frozen vision foundation models, and autoregressive generators
that turn class labels into those tokens without classifier-free guidance (arXiv 2507.08441).

Importing the package registers its models with transformers' Auto classes and `image-tokens` as a task of its
`pipeline`. `VFMTokPipeline` needs diffusers, which is imported when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.auto_vfmtok import register_auto_classes
from .modeling.configuration_vfmtok import VFMTokConfig
from .modeling.configuration_vfmtok_ar import VFMTokARConfig
from .modeling.configuration_vfmtok_rar import VFMTokRARConfig
from .modeling.image_processing_vfmtok import VFMTokImageProcessor
from .modeling.image_tokens_vfmtok import VFMTokImageTokensPipeline
from .modeling.modeling_vfmtok import VFMTokModel
from .modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from .modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration


if TYPE_CHECKING:
    from .hub_kernels import disable_kernels, enable_kernels
    from .pipelines.pipeline_vfmtok import VFMTokPipeline

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "emoji")
"""Folder of the small pipeline that comes with the package: 64 x 64 emoji, fourteen classes."""

_LAZY_NAMES = {
    "VFMTokPipeline": ".pipelines.pipeline_vfmtok",
    "enable_kernels": ".hub_kernels",
    "disable_kernels": ".hub_kernels",
}

register_auto_classes()
PIPELINE_REGISTRY.register_pipeline("image-tokens", VFMTokImageTokensPipeline, pt_model=AutoModel, type="image")


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name], __name__), name)
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
