"""The loop that benchmarks compare ours to draws the same tokens, so that the comparison is one of speed alone."""

from pathlib import Path

import pytest
import torch

from tests.modeling.generators import tiny_ar


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_original_loop_draws_the_same_tokens(monkeypatch, guidance_scale):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from original_decode import OriginalDecoder

    model = tiny_ar().eval()
    original = OriginalDecoder(model)
    monkeypatch.setattr(original, "draw", lambda logits, scale: greedy(logits, scale))
    class_labels = torch.arange(3)
    expected = model.generate(class_labels, do_sample=False, guidance_scale=guidance_scale)
    assert original.generate(class_labels, model.config.num_image_tokens, guidance_scale).equal(expected)


def greedy(logits, scale):
    if scale > 1:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (conditional - unconditional) * scale
    return logits.argmax(-1, keepdim=True)
