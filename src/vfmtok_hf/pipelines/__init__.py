"""diffusers pipelines."""

from .pipeline_vfmtok import VFMTokPipeline


__all__ = ["VFMTokPipeline"]
