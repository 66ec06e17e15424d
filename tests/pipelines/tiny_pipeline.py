"""Tiny pipelines of the real classes, for the tests of the pipeline and of the command line."""

from tests.modeling.generators import tiny_ar, tiny_dit, tiny_rar
from tests.testing import tiny_model, tiny_vfmae
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.pipelines import VFMTokDiTPipeline, VFMTokPipeline
from vfmtok_hf.pipelines.pipeline_vfmtok_dit import released_scheduler


ID2LABEL = {0: "smiley, happy face", 1: "heart", 2: "crane", 3: "crane", 4: "Red Panda,  Ailurus"}


def tiny_generator(kind="ar", **overrides):
    """Of the codebook of `tiny_model`."""
    build = {"ar": tiny_ar, "rar": tiny_rar}[kind]
    return build(**{"codebook_size": 64, "id2label": ID2LABEL, **overrides})


def tiny_pipeline(kind="ar"):
    pipeline = VFMTokPipeline(tiny_model(), tiny_generator(kind), VFMTokImageProcessor(size=32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_dit_pipeline(guidance=False):
    pipeline = VFMTokDiTPipeline(
        tiny_vfmae(),
        tiny_dit(id2label=ID2LABEL),
        released_scheduler(),
        VFMTokImageProcessor(size=32),
        tiny_dit(num_hidden_layers=1) if guidance else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
