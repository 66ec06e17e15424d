"""Eager attention for the layers of the tokenizer and the generators."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig


def causal_mask(config: PreTrainedConfig, states: torch.Tensor) -> torch.Tensor | None:
    """
    Causal mask `(length, length)` for the attention scores of `(batch_size, length, ...)` states: -inf if a key comes after
    its query. None if the attention in `config` uses the module's `is_causal` instead.
    """
    if config._attn_implementation != "eager":
        return None
    length = states.shape[1]
    return torch.full((length, length), -torch.inf, dtype=states.dtype, device=states.device).triu(1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention.

    Args:
        module (`torch.nn.Module`): dropout applies only if `module.training`.
        query, key, value (`torch.Tensor` of shape `(batch_size, heads, length, head_dim)`).
        attention_mask (`torch.Tensor`, *optional*): added to the `(batch_size, heads, queries, keys)` scores.
        scaling (`float`): scale of the scores.
        dropout (`float`): dropout rate of the attention weights.

    Returns:
        `tuple(torch.Tensor)`: `(batch_size, queries, heads, head_dim)`, and the weights `(batch_size, heads, queries, keys)`.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


__all__ = ["causal_mask", "eager_attention_forward"]
