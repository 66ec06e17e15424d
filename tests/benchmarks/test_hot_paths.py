"""Shares of the time by kind of operation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


def test_shares_name_what_takes_the_time_largest_first_and_add_up_to_it(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from hot_paths import shares

    images, weight = torch.randn(4, 64, 64, 64), torch.randn(64, 64, 3, 3)
    found = shares(lambda: F.conv2d(images, weight).softmax(-1))
    assert {"convolutions", "softmax and drawing"} <= found.keys()
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(1, abs=0.1)
