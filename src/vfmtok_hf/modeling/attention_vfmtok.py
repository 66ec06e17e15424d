"""Explicit causal attention of the tokenizer's and the generators' layers."""

import torch
import torch.nn.functional as F
from torch import nn


BLOCK_LENGTH = 128  # queries: shorter blocks compute fewer hidden pairs, in more and smaller products


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """
    Causal softmax attention in blocks of queries, each over the keys up to its end: most of what is hidden is never
    computed. A single query, the newest of a cached sequence, sees all keys.

    Args:
        module (`torch.nn.Module`): whose training mode decides on dropout.
        query, key, value (`torch.Tensor` of shape `(batch_size, heads, length, head_dim)`).
        attention_mask (`torch.BoolTensor` of shape `(1, keys)`, *optional*): which keys a single query sees, instead of all.
        scaling (`float`): factor of the scores.
        dropout (`float`): share of the weights that is dropped.

    Returns:
        `(torch.Tensor, None)`: `(batch_size, length, heads, head_dim)`, as from `sdpa`, and no weights.
    """
    query = query * scaling
    length = query.shape[2]
    if length == 1:
        attended = _attend(module, query, key, value, attention_mask, dropout)
    else:
        blocks = []
        for start in range(0, length, BLOCK_LENGTH):
            end = min(start + BLOCK_LENGTH, length)
            visible = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
            parts = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
            blocks.append(_attend(module, *parts, visible, dropout))
        attended = torch.cat(blocks, dim=2)
    return attended.transpose(1, 2).contiguous(), None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout, training=module.training) @ value


__all__ = ["eager_attention_forward"]
