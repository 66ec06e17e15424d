"""Layers that compute faster in training on CPUs: equal results, and everything else about them stays."""

import copy
import pickle

import pytest
import torch
from torch import nn

from vfmtok_hf.cpu.training import pack_frozen_weights


@pytest.fixture
def linear():
    return nn.Linear(20, 30)


def test_frozen_products(linear, monkeypatch):
    inputs = torch.randn(2, 20)
    expected = linear(inputs)
    model = nn.Sequential(linear)
    with torch.autocast("cpu", torch.bfloat16):
        expected_half = model(inputs)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    pack_frozen_weights(model, torch.bfloat16)
    assert "forward" not in vars(linear)
    monkeypatch.undo()
    pack_frozen_weights(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    for module in (model, twin, pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(module(inputs), expected, rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(module(inputs), expected_half)
        assert module.state_dict().keys() == {"0.weight", "0.bias"}
    passing = inputs.clone().requires_grad_()
    model(passing).sum().backward()
    torch.testing.assert_close(passing.grad, linear.weight.sum(0).expand(2, -1))
