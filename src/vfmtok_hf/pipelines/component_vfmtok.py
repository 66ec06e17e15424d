"""
Where diffusers finds the classes of a saved pipeline's components.

It fetches one file per component and none that this would import. So this file lies in every component's folder and
finds the classes by the registries of transformers, where the pipeline's code, which diffusers loads before any
component, has entered them.
"""

from importlib import import_module

from transformers import CONFIG_MAPPING, MODEL_MAPPING


VFMTokModel = MODEL_MAPPING[CONFIG_MAPPING["vfmtok"]]
VFMTokARForImageGeneration = MODEL_MAPPING[CONFIG_MAPPING["vfmtok_ar"]]
VFMTokRARForImageGeneration = MODEL_MAPPING[CONFIG_MAPPING["vfmtok_rar"]]
# By its configuration's neighbor: what the registry of image processors holds changes between versions.
image_processing = CONFIG_MAPPING["vfmtok"].__module__.replace("configuration_vfmtok", "image_processing_vfmtok")
VFMTokImageProcessor = import_module(image_processing).VFMTokImageProcessor
