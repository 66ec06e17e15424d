"""Which dtype this CPU computes faster."""

import pytest
import torch

from vfmtok_hf.cpu import precision
from vfmtok_hf.cpu.precision import MANY_ROWS, is_bfloat16_faster


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, True), (0.9, False), (11.0, False)])
def test_bfloat16_has_to_be_a_fifth_faster(seconds, expected, monkeypatch):
    times = {(torch.bfloat16, 8): seconds, (torch.float32, 8): 1.0}
    monkeypatch.setattr(precision, "seconds_of_linear", lambda *key: times[key])
    assert is_bfloat16_faster(8) == expected


@pytest.mark.parametrize("can_pack", [True, False])
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_layers_are_timed_packed_or_not(rows, can_pack, monkeypatch):
    """On a machine without bfloat16 products, layers stay as they are."""
    packed = []
    monkeypatch.setattr(precision, "can_pack", lambda linear: can_pack)
    monkeypatch.setattr(precision, "PackedLinear", lambda linear: packed.append(linear.weight.dtype) or linear)
    assert all(precision.seconds_of_linear(dtype, rows) > 0 for dtype in (torch.float32, torch.bfloat16))
    assert packed == ([torch.float32, torch.bfloat16] if can_pack else [])
