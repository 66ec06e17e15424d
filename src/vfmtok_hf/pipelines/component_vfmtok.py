"""
Where diffusers finds the classes of a saved pipeline's components.

It fetches one file per component and none that this would import. So this file lies in every component's folder and
takes the classes from the registries of transformers, where the pipeline's code, which diffusers loads before any
component, has entered them.
"""

from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name


VFMTokModel = MODEL_MAPPING[CONFIG_MAPPING["vfmtok"]]
VFMTokARForImageGeneration = MODEL_MAPPING[CONFIG_MAPPING["vfmtok_ar"]]
VFMTokRARForImageGeneration = MODEL_MAPPING[CONFIG_MAPPING["vfmtok_rar"]]
VFMTokImageProcessor = get_image_processor_class_from_name("VFMTokImageProcessor")
