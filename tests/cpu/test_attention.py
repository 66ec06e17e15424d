"""Causal attention in blocks against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.modeling.generators import tiny_ar, tiny_batch, tiny_rar
from vfmtok_hf.cpu.attention import BLOCK_LENGTH, BLOCKWISE_ATTENTION, blockwise_attention_forward
from vfmtok_hf.modeling.attention_vfmtok import eager_attention_forward


def heads(length: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 2, BLOCK_LENGTH - 1, BLOCK_LENGTH, BLOCK_LENGTH + 1, 2 * BLOCK_LENGTH + 5])
def test_blocks_are_plain_causal_attention(length):
    states, weight = heads(length), torch.randn(2, length, 3, 8)
    attended, _ = blockwise_attention_forward(nn.Identity(), *states, None, scaling=8**-0.5)
    expected = F.scaled_dot_product_attention(*states, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((attended * weight).sum(), states)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weight).sum(), states), atol=1e-4, rtol=1e-4)


def test_a_mask_takes_the_place_of_the_causal_one():
    query, key, value = heads(BLOCK_LENGTH + 3)
    query, mask = query[:, :, -1:], torch.zeros(1, 1, 1, BLOCK_LENGTH + 3)
    mask[..., 5:] = -torch.inf
    attended, _ = blockwise_attention_forward(nn.Identity(), query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


def test_dropout_takes_its_share_of_the_weights_and_only_in_training():
    query, key, _ = heads(2 * BLOCK_LENGTH)
    # Weights that are all equal, and values that show them: position i sees i + 1 of them.
    query, value = torch.zeros_like(query), torch.eye(2 * BLOCK_LENGTH).expand(2, 3, -1, -1)
    module = nn.Identity()
    attended = blockwise_attention_forward(module, query, key, value, None, scaling=1.0, dropout=0.25)[0]
    counts = torch.arange(1, 2 * BLOCK_LENGTH + 1)
    shown = attended.transpose(1, 2).tril()
    torch.testing.assert_close(attended.transpose(1, 2), shown)
    kept = (shown > 0).sum(-1) / counts
    assert kept[..., 100:].mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(shown.sum(-1)[..., 100:].mean().item(), 1.0, atol=0.02, rtol=0)
    whole = blockwise_attention_forward(module.eval(), query, key, value, None, scaling=1.0, dropout=0.25)[0]
    torch.testing.assert_close(whole.sum(-1), torch.ones(whole.shape[:-1]))


@pytest.mark.parametrize("training", [True, False])
def test_a_single_query_sees_all_keys(training):
    query, key, value = heads(5)
    module = nn.Identity().train(training)
    arguments = (module, query[:, :, -1:], key, value, None, 0.3)
    torch.testing.assert_close(blockwise_attention_forward(*arguments)[0], eager_attention_forward(*arguments)[0])


@pytest.mark.parametrize("tiny", [tiny_ar, tiny_rar])
@torch.no_grad()
def test_models_know_it_by_name(tiny):
    model = tiny()
    labels, tokens = tiny_batch(model)
    expected, drawn = model(labels, tokens).logits, model.generate(labels, do_sample=False)
    model.set_attn_implementation(BLOCKWISE_ATTENTION)
    torch.testing.assert_close(model(labels, tokens).logits, expected, atol=1e-5, rtol=0)
    assert model.generate(labels, do_sample=False).equal(drawn)
