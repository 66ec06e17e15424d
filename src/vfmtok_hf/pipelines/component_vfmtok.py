"""
The classes of a saved pipeline's components.

diffusers imports them from this file, of which each component's folder has a copy, and does not fetch siblings that the
file would import. So it looks the classes up in transformers' registries, where the pipeline's code, which diffusers loads
first, has registered them.
"""

from importlib import import_module
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING


MODEL_TYPES = {
    "VFMTokModel": "vfmtok",
    "VFMTokARForImageGeneration": "vfmtok_ar",
    "VFMTokRARForImageGeneration": "vfmtok_rar",
    "VFMAEModel": "vfmae",
    "VFMTokDiTForImageGeneration": "vfmtok_dit",
}
AUTOENCODERS = ("vfmtok", "vfmae")


def __getattr__(name: str) -> Any:
    if name in MODEL_TYPES:
        return MODEL_MAPPING[CONFIG_MAPPING[MODEL_TYPES[name]]]
    if name == "VFMTokImageProcessor":
        # By a configuration's neighbor: what the registry of image processors holds changes between versions.
        config = next(CONFIG_MAPPING[model_type] for model_type in AUTOENCODERS if model_type in CONFIG_MAPPING)
        package = config.__module__.rpartition(".")[0]
        return import_module(f"{package}.image_processing_vfmtok").VFMTokImageProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
