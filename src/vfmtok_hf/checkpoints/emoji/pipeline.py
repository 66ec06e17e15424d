"""Where `DiffusionPipeline.from_pretrained(vfmtok_hf.DEFAULT_CHECKPOINT, trust_remote_code=True)` finds the class."""

from vfmtok_hf import VFMTokPipeline


__all__ = ["VFMTokPipeline"]
