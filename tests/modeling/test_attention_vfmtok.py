"""Explicit attention in blocks against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.modeling import attention_vfmtok
from vfmtok_hf.modeling.attention_vfmtok import BLOCK_LENGTH, eager_attention_forward


def heads(length: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("length", [2, BLOCK_LENGTH - 1, BLOCK_LENGTH, BLOCK_LENGTH + 1, 2 * BLOCK_LENGTH + 5])
def test_blocks_are_plain_causal_attention(length):
    states, weight = heads(length), torch.randn(2, length, 3, 8)
    attended, _ = eager_attention_forward(nn.Identity(), *states, None, scaling=8**-0.5)
    expected = F.scaled_dot_product_attention(*states, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((attended * weight).sum(), states)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), states), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_newest_query_sees_what_the_mask_allows(with_mask):
    query, key, value = heads(BLOCK_LENGTH + 3)
    query, mask = query[:, :, -1:], torch.arange(BLOCK_LENGTH + 3)[None] < 5 if with_mask else None
    attended, _ = eager_attention_forward(nn.Identity(), query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


def test_dropout_takes_its_share_of_the_weights_and_only_in_training():
    query, key, _ = heads(2 * BLOCK_LENGTH)
    # Weights that are all equal, and values that show them: position i sees i + 1 of them.
    query, value = torch.zeros_like(query), torch.eye(2 * BLOCK_LENGTH).expand(2, 3, -1, -1)
    module = nn.Identity()
    attended = eager_attention_forward(module, query, key, value, None, scaling=1.0, dropout=0.25)[0]
    counts = torch.arange(1, 2 * BLOCK_LENGTH + 1)
    shown = attended.transpose(1, 2).tril()
    torch.testing.assert_close(attended.transpose(1, 2), shown)
    kept = (shown > 0).sum(-1) / counts
    assert kept[..., 100:].mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(shown.sum(-1)[..., 100:].mean().item(), 1.0, atol=0.02, rtol=0)
    whole = eager_attention_forward(module.eval(), query, key, value, None, scaling=1.0, dropout=0.25)[0]
    torch.testing.assert_close(whole.sum(-1), torch.ones(whole.shape[:-1]))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_weights_that_were_kept(dropout, monkeypatch):
    monkeypatch.setattr(attention_vfmtok, "BLOCK_LENGTH", 3)
    states = [torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(*states: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)  # the same weights each time
        return eager_attention_forward(nn.Identity(), *states, None, scaling=0.7, dropout=dropout)[0]

    assert torch.autograd.gradcheck(attend, states)
