"""
How diffusers loads a component of a saved pipeline with the pipeline's own code.

diffusers reads one file per component and none that this would import, so it leaves the work to the Auto classes, with
which the pipeline's code has registered itself before any component is loaded.
"""

from transformers import AutoImageProcessor, AutoModel, PreTrainedModel


class VFMTokComponent(PreTrainedModel):
    """Any model. Being one itself makes diffusers pass `dtype`, `variant` and what else models take."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return AutoModel.from_pretrained(*args, **kwargs)


# The names that model_index.json gives.
VFMTokModel = VFMTokARForImageGeneration = VFMTokRARForImageGeneration = VFMTokComponent
VFMTokImageProcessor = AutoImageProcessor
