"""Entry point of a saved `VFMTokDiTPipeline`'s own code; see `pipeline.py`."""

import importlib
import importlib.util


if importlib.util.find_spec("vfmtok_hf") is not None:
    VFMTokDiTPipeline = importlib.import_module("vfmtok_hf").VFMTokDiTPipeline
else:
    from .anchor_encoder_vfmtok import VFMTokAnchorEncoder  # noqa: F401
    from .attention_vfmtok import eager_attention_forward  # noqa: F401
    from .auto_vfmtok import register_config, register_image_processor, register_model
    from .autoencoder_config_vfmtok import AutoencoderConfigMixin  # noqa: F401
    from .autoencoder_vfmtok import VFMTokAutoencoder  # noqa: F401
    from .class_embeddings_vfmtok import ClassEmbeddingsMixin  # noqa: F401
    from .class_names_vfmtok import ClassNames  # noqa: F401
    from .configuration_vfmae import VFMAEConfig
    from .configuration_vfmtok_dit import VFMTokDiTConfig
    from .handler import EndpointHandler  # noqa: F401
    from .image_processing_vfmtok import VFMTokImageProcessor
    from .image_reading_vfmtok import read_image  # noqa: F401
    from .loading_vfmtok import errors_naming  # noqa: F401
    from .modeling_vfmae import VFMAEModel
    from .modeling_vfmtok_dit import VFMTokDiTForImageGeneration
    from .outputs_vfmtok import VFMTokModelOutput  # noqa: F401
    from .pipeline_base_vfmtok import VFMTokPipelineBase  # noqa: F401
    from .pipeline_vfmtok_dit import VFMTokDiTPipeline
    from .pixel_decoder_vfmtok import VFMTokPixelDecoder  # noqa: F401
    from .portable_vfmtok import write_portable_code  # noqa: F401
    from .rotary_vfmtok import rotary_table  # noqa: F401
    from .vision_features_vfmtok import vision_features  # noqa: F401
    from .vit_decoder_vfmtok import VFMTokViTDecoderBase  # noqa: F401

    for config_class in (VFMAEConfig, VFMTokDiTConfig):
        register_config(config_class)
    for model_class in (VFMAEModel, VFMTokDiTForImageGeneration):
        register_model(model_class)
    register_image_processor(VFMTokImageProcessor, VFMAEConfig)

    from .component_vfmtok import MODEL_TYPES  # noqa: F401


__all__ = ["VFMTokDiTPipeline"]
