"""
Where diffusers enters a saved pipeline's own code: `DiffusionPipeline.from_pretrained(path, trust_remote_code=True)`.

This file works in the folders that `VFMTokPipeline.save_pretrained` writes, among copies of the modules it names. It
names every one of them, since from a local folder diffusers copies those and no further. An installed package comes
first, so that its classes do not exist twice; it is imported by name, lest diffusers warn where it is not installed.
"""

import importlib
import importlib.util


if importlib.util.find_spec("vfmtok_hf") is not None:
    VFMTokPipeline = importlib.import_module("vfmtok_hf").VFMTokPipeline
else:
    from .auto_vfmtok import register_auto_classes
    from .class_embeddings_vfmtok import ClassEmbeddingsMixin  # noqa: F401
    from .configuration_vfmtok import VFMTokConfig  # noqa: F401
    from .configuration_vfmtok_ar import VFMTokARConfig  # noqa: F401
    from .configuration_vfmtok_rar import VFMTokRARConfig  # noqa: F401
    from .generation_vfmtok import VFMTokGenerationMixin  # noqa: F401
    from .image_processing_vfmtok import VFMTokImageProcessor  # noqa: F401
    from .loading_vfmtok import one_line_errors  # noqa: F401
    from .modeling_vfmtok import VFMTokModel  # noqa: F401
    from .modeling_vfmtok_ar import VFMTokARForImageGeneration  # noqa: F401
    from .modeling_vfmtok_rar import VFMTokRARForImageGeneration  # noqa: F401
    from .pipeline_vfmtok import VFMTokPipeline
    from .portable_vfmtok import write_portable_code  # noqa: F401

    register_auto_classes()

    from .component_vfmtok import VFMTokModel as RegisteredVFMTokModel  # noqa: F401


__all__ = ["VFMTokPipeline"]
