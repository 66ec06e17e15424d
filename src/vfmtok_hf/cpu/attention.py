"""Fast causal attention on CPUs, for precisions in which torch's fused attention is slow."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface

from vfmtok_hf.modeling.attention_vfmtok import eager_attention_forward


BLOCKWISE_ATTENTION = "vfmtok_blockwise"  # the name for `set_attn_implementation`
BLOCK_LENGTH = 128  # queries; smaller blocks waste less masked compute, but need more and smaller matmuls


def blockwise_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Causal softmax attention in blocks of queries, each over the keys up to its end, so most masked pairs are not
    computed. With a mask or a single query, as in a decode step, and in non-causal modules it is [`eager_attention_forward`].

    Args:
        module (`torch.nn.Module`): dropout applies only if `module.training`, and the causal mask only if `is_causal`.
        query, key, value (`torch.Tensor` of shape `(batch_size, heads, length, head_dim)`).
        attention_mask (`torch.Tensor`, *optional*): added to the scores instead of the causal mask.
        scaling (`float`): scale of the scores.
        dropout (`float`): dropout rate of the attention weights.

    Returns:
        `(torch.Tensor, None)`: `(batch_size, length, heads, head_dim)`, and no weights.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast returns matmuls in another dtype than norms
    if query.shape[2] == 1 and not module.training:
        # As few operations as possible: they, not the arithmetic, take the time of a decode step.
        scores = (query * scaling) @ key.transpose(2, 3)
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), None
    if attention_mask is not None or query.shape[2] == 1 or not getattr(module, "is_causal", True):
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout)[0], None
    attended = [
        eager_attention_forward(
            module, query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask, scaling, dropout
        )[0]
        for start, end, mask in blocks(query)
    ]
    return torch.cat(attended, dim=1), None


def blocks(query: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Start and end of each block of `(..., length, head_dim)` queries, and the mask of its scores."""
    length = query.shape[-2]
    for start in range(0, length, BLOCK_LENGTH):
        end = min(start + BLOCK_LENGTH, length)
        hidden = torch.full((end - start, end), -torch.inf, dtype=query.dtype, device=query.device)
        yield start, end, hidden.triu(start + 1)


def fastest_attention(in_bfloat16: bool, dropout: float = 0.0, causal: bool = True) -> str:
    """
    Name of the fastest attention on CPUs: torch's fused `sdpa`, except in bfloat16, where it is slow, and with dropout, where it
    computes all pairs including masked ones. In these cases, causal attention is blockwise and other attention is `eager`.

    Args:
        in_bfloat16 (`bool`): whether the computation is in bfloat16.
        dropout (`float`): dropout rate of the attention weights.
        causal (`bool`): whether the attention is causal.
    """
    if not in_bfloat16 and dropout == 0:
        return "sdpa"
    return BLOCKWISE_ATTENTION if causal else "eager"


AttentionInterface.register(BLOCKWISE_ATTENTION, blockwise_attention_forward)


__all__ = ["BLOCKWISE_ATTENTION", "blockwise_attention_forward", "fastest_attention"]
