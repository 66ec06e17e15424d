"""Tiny pipelines of the real classes, for the tests of the pipeline and of the command line."""

from tests.modeling.generators import tiny_ar, tiny_rar
from tests.testing import tiny_model
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.pipelines import VFMTokPipeline


ID2LABEL = {0: "smiley, happy face", 1: "heart", 2: "crane", 3: "crane", 4: "Red Panda,  Ailurus"}


def tiny_generator(kind="ar", **overrides):
    """Of the codebook of `tiny_model`."""
    build = {"ar": tiny_ar, "rar": tiny_rar}[kind]
    return build(**{"codebook_size": 64, "id2label": ID2LABEL, **overrides})


def tiny_pipeline(kind="ar"):
    pipeline = VFMTokPipeline(tiny_model(), tiny_generator(kind), VFMTokImageProcessor(size=32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
