"""
Entry point of a saved pipeline's own code, for `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)`.

This file runs in folders written by `VFMTokPipeline.save_pretrained`, next to copies of the modules it imports. It imports
all of them, because from a local folder diffusers copies only direct imports. If the package is installed, it is used
instead, so that classes do not exist twice; it is imported by name, because otherwise diffusers would warn if it is missing.
"""

import importlib
import importlib.util


if importlib.util.find_spec("vfmtok_hf") is not None:
    VFMTokPipeline = importlib.import_module("vfmtok_hf").VFMTokPipeline
else:
    from .anchor_encoder_vfmtok import VFMTokAnchorEncoder  # noqa: F401
    from .attention_vfmtok import eager_attention_forward  # noqa: F401
    from .auto_vfmtok import register_config, register_image_processor, register_model
    from .autoencoder_config_vfmtok import AutoencoderConfigMixin  # noqa: F401
    from .autoencoder_vfmtok import VFMTokAutoencoder  # noqa: F401
    from .cache_vfmtok import DecodeCache  # noqa: F401
    from .class_embeddings_vfmtok import ClassEmbeddingsMixin  # noqa: F401
    from .class_names_vfmtok import ClassNames  # noqa: F401
    from .configuration_vfmtok import VFMTokConfig
    from .configuration_vfmtok_ar import VFMTokARConfig
    from .configuration_vfmtok_rar import VFMTokRARConfig
    from .generation_vfmtok import VFMTokGenerationMixin  # noqa: F401
    from .handler import EndpointHandler  # noqa: F401
    from .image_processing_vfmtok import VFMTokImageProcessor
    from .image_reading_vfmtok import read_image  # noqa: F401
    from .loading_vfmtok import errors_naming  # noqa: F401
    from .modeling_vfmtok import VFMTokModel
    from .modeling_vfmtok_ar import VFMTokARForImageGeneration
    from .modeling_vfmtok_rar import VFMTokRARForImageGeneration
    from .outputs_vfmtok import VFMTokModelOutput  # noqa: F401
    from .pipeline_base_vfmtok import VFMTokPipelineBase  # noqa: F401
    from .pipeline_vfmtok import VFMTokPipeline
    from .pixel_decoder_vfmtok import VFMTokPixelDecoder  # noqa: F401
    from .portable_vfmtok import write_portable_code  # noqa: F401
    from .rotary_vfmtok import rotary_table  # noqa: F401
    from .vision_features_vfmtok import vision_features  # noqa: F401
    from .vit_decoder_vfmtok import VFMTokViTDecoderBase  # noqa: F401

    for config_class in (VFMTokConfig, VFMTokARConfig, VFMTokRARConfig):
        register_config(config_class)
    for model_class in (VFMTokModel, VFMTokARForImageGeneration, VFMTokRARForImageGeneration):
        register_model(model_class)
    register_image_processor(VFMTokImageProcessor, VFMTokConfig)

    from .component_vfmtok import MODEL_TYPES  # noqa: F401


__all__ = ["VFMTokPipeline"]
