"""Faster training on CPUs: the frozen part of a model from packed weights."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.cpu.packing import PackedLinear, can_pack, has_product


class FrozenProduct:
    """
    What an `nn.Linear` that is not trained computes: from a packed copy of its weights where no gradient is wanted and the
    precision is the copy's.

    Args:
        linear (`torch.nn.Linear`): in float32 on the CPU.
        dtype (`torch.dtype`): of the copy: float32, or bfloat16 for use under autocast, which converts weights each time.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        self.linear, self.dtype = linear, dtype
        self.packed = PackedLinear(copy.deepcopy(linear).to(dtype))

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(..., in_features)` to `(..., out_features)`."""
        wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
        if wanted != self.dtype or (torch.is_grad_enabled() and hidden_states.requires_grad):
            return F.linear(hidden_states, self.linear.weight, self.linear.bias)
        return self.packed(hidden_states.to(wanted))


def pack_frozen_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """
    Have the linear layers of a frozen part of a model that is trained compute as [`FrozenProduct`].

    Unlike after [`pack_weights`] the parameters stay where they are, for saving and for gradients that pass through, and
    their memory is needed twice. The part must not be moved, converted or given other weights afterwards.

    Args:
        model (`torch.nn.Module`): in float32 on the CPU.
        dtype (`torch.dtype`): as in [`FrozenProduct`]. Where oneDNN cannot multiply it nothing changes.
    """
    if not has_product(dtype):
        return
    for layer in model.modules():
        if can_pack(layer):
            layer.forward = FrozenProduct(layer, dtype)


__all__ = ["pack_frozen_weights"]
