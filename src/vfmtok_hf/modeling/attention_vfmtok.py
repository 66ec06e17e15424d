"""Explicit causal attention of the tokenizer's and the generators' layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


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
        dropout (`float`): share of the weights that is dropped, in steps of 1/65536; several queries only.

    Returns:
        `(torch.Tensor, None)`: `(batch_size, length, heads, head_dim)`, as from `sdpa`, and no weights.
    """
    query = query * scaling
    if query.shape[2] == 1:
        scores = query @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        attended = scores.softmax(dim=-1) @ value
    else:
        # Products of autocast may come in another type than what was computed on them since.
        states = (states.to(value.dtype).flatten(0, 1).contiguous() for states in (query, key, value))
        attended = CausalAttention.apply(*states, dropout if module.training else 0.0).unflatten(0, query.shape[:2])
    return attended.transpose(1, 2).contiguous(), None


class CausalAttention(torch.autograd.Function):
    """
    The blocks, of `(batch_size * heads, length, head_dim)` scaled queries, keys and values, and their gradients.

    Autograd would make, for each block, a gradient of all keys and one of all values to add them up.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        future = torch.full((BLOCK_LENGTH, BLOCK_LENGTH), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
        attended, saved = query.new_empty(*query.shape[:2], value.shape[2]), []
        for start, end in blocks(query.shape[1]):
            scores = torch.bmm(query[:, start:end], key[:, :end].mT)
            scores[..., start:] += future[: end - start, : end - start]
            weights = scores.softmax(dim=-1)
            kept = random_ones(weights, 1 - dropout) if dropout > 0 else None
            saved += [weights, kept]
            attended[:, start:end] = torch.bmm(weights if kept is None else weights * kept, value[:, :end])
        ctx.save_for_backward(query, key, value, *saved)
        ctx.dropout = dropout
        return attended.div_(1 - dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        gradient = gradient / (1 - ctx.dropout)
        for (start, end), weights, kept in zip(blocks(query.shape[1]), saved[::2], saved[1::2], strict=True):
            block = gradient[:, start:end]
            of_weights = torch.bmm(block, value[:, :end].mT)
            if kept is not None:
                of_weights *= kept
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, start:end] = torch.bmm(of_scores, key[:, :end])
            of_key[:, :end].baddbmm_(of_scores.mT, query[:, start:end])
            of_value[:, :end].baddbmm_((weights if kept is None else weights * kept).mT, block)
        return of_query, of_key, of_value, None


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of queries."""
    for start in range(0, length, BLOCK_LENGTH):
        yield start, min(start + BLOCK_LENGTH, length)


def random_ones(like: torch.Tensor, share: float) -> torch.Tensor:
    """A tensor of ones, a random `share` of it in steps of 1/65536, and zeros."""
    # torch's own dropout draws bit by bit on CPUs; here each 64-bit number decides on four weights.
    numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    numbers = numbers.view(torch.int16)[: like.numel()].view_as(like)
    return numbers.lt_(round(share * 2**16) - 2**15).to(like.dtype)


__all__ = ["eager_attention_forward"]
