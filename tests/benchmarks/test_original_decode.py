"""The loops that benchmarks compare ours to draw the same tokens, so that the comparison is one of speed alone."""

from pathlib import Path

import pytest
import torch

from tests.modeling.generators import tiny_ar, tiny_rar


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(("build", "decoder"), [(tiny_ar, "OriginalDecoder"), (tiny_rar, "OriginalRARDecoder")])
def test_original_loop_draws_the_same_tokens(monkeypatch, build, decoder, guidance_scale):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import original_decode

    monkeypatch.setattr(original_decode, "draw", lambda logits: logits.argmax(-1, keepdim=True))
    model = build()
    class_labels = torch.arange(3)
    expected = model.generate(class_labels, do_sample=False, guidance_scale=guidance_scale)
    original = getattr(original_decode, decoder)(model)
    assert original.generate(class_labels, model.config.num_image_tokens, guidance_scale).equal(expected)
