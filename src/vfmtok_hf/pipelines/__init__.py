"""diffusers pipelines."""

from .pipeline_vfmtok import VFMTokPipeline
from .pipeline_vfmtok_dit import VFMTokDiTPipeline


__all__ = ["VFMTokDiTPipeline", "VFMTokPipeline"]
