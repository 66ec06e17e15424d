from pathlib import Path
from transformers import AutoConfig, AutoModel
from .modeling.configuration_vfmtok import VFMTokConfig
from .modeling.modeling_vfmtok import VFMTokModel
__version__ = "0.1.0"
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "emoji")
AutoConfig.register("vfmtok", VFMTokConfig, exist_ok=True)
AutoModel.register(VFMTokConfig, VFMTokModel, exist_ok=True)
try:
    from .modeling.configuration_vfmtok_ar import VFMTokARConfig
    from .modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
    AutoConfig.register("vfmtok_ar", VFMTokARConfig, exist_ok=True)
    AutoModel.register(VFMTokARConfig, VFMTokARForImageGeneration, exist_ok=True)
except Exception as e:
    print("AR not ready", e)
try:
    from .modeling.configuration_vfmtok_rar import VFMTokRARConfig
    from .modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
    AutoConfig.register("vfmtok_rar", VFMTokRARConfig, exist_ok=True)
    AutoModel.register(VFMTokRARConfig, VFMTokRARForImageGeneration, exist_ok=True)
except Exception:
    pass
try:
    from .modeling.image_processing_vfmtok import VFMTokImageProcessor
except Exception:
    pass
def __getattr__(name):
    if name == "VFMTokPipeline":
        from .pipelines.pipeline_vfmtok import VFMTokPipeline
        return VFMTokPipeline
    raise AttributeError(name)
