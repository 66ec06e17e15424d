"""
The models, their configurations and their image processor, in plain PyTorch.

Importing any of these modules registers all of their classes with transformers' Auto classes.
"""

from .auto_vfmtok import register_config, register_image_processor, register_model
from .configuration_vfmae import VFMAEConfig
from .configuration_vfmtok import VFMTokConfig
from .configuration_vfmtok_ar import VFMTokARConfig
from .configuration_vfmtok_dit import VFMTokDiTConfig
from .configuration_vfmtok_rar import VFMTokRARConfig
from .image_processing_vfmtok import VFMTokImageProcessor
from .modeling_vfmae import VFMAEModel
from .modeling_vfmtok import VFMTokModel
from .modeling_vfmtok_ar import VFMTokARForImageGeneration
from .modeling_vfmtok_dit import VFMTokDiTForImageGeneration
from .modeling_vfmtok_rar import VFMTokRARForImageGeneration


for config_class in (VFMTokConfig, VFMTokARConfig, VFMTokRARConfig, VFMAEConfig, VFMTokDiTConfig):
    register_config(config_class)
for model_class in (
    VFMTokModel,
    VFMTokARForImageGeneration,
    VFMTokRARForImageGeneration,
    VFMAEModel,
    VFMTokDiTForImageGeneration,
):
    register_model(model_class)
register_image_processor(VFMTokImageProcessor, VFMTokConfig, VFMAEConfig)
