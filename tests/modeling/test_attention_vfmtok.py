"""Explicit attention against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.modeling.generators import tiny_ar
from vfmtok_hf.modeling.attention_vfmtok import causal_mask, eager_attention_forward


@pytest.mark.parametrize("causal", [True, False])
def test_explicit_attention_is_torchs(causal):
    states = [torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3)]
    config = tiny_ar().config
    config._attn_implementation = "eager"
    mask = causal_mask(config, states[0].transpose(1, 2)) if causal else None
    attended, weights = eager_attention_forward(nn.Identity(), *states, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(*states, is_causal=causal, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    assert (weights.triu(1) == 0).all() == causal
    gradients = torch.autograd.grad(attended.square().sum(), states)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), states), atol=1e-4, rtol=1e-4)


def test_other_implementations_hide_keys_themselves():
    config = tiny_ar().config
    assert config._attn_implementation == "sdpa"
    assert causal_mask(config, torch.zeros(2, 7, 8)) is None


def test_dropout_acts_in_training_only():
    states, module = [torch.randn(1, 2, 50, 8) for _ in range(3)], nn.Identity()
    weights = eager_attention_forward(module, *states, None, scaling=1.0, dropout=0.25)[1]
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (eager_attention_forward(module.eval(), *states, None, scaling=1.0, dropout=0.25)[1] > 0).all()
