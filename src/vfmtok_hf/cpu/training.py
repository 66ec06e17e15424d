"""Faster training on CPUs: packed weights for the frozen part of a model."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.cpu.packing import PackedLinear, can_pack, has_product


class FrozenProduct:
    """
    A frozen `nn.Linear` that uses a packed copy of its weight if no gradient is required and the dtype is that of the
    copy.

    Args:
        linear (`torch.nn.Linear`): in float32 on the CPU.
        dtype (`torch.dtype`): dtype of the copy: float32, or bfloat16 for autocast, which otherwise converts weights each time.
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
    Replace the linear layers in the frozen part of a model with [`FrozenProduct`].

    Unlike [`pack_weights`], this keeps the parameters, for saving and for gradients that pass through, so their memory is
    needed twice. Afterwards, the part must not be moved or converted, and its weights must not change.

    Args:
        model (`torch.nn.Module`): in float32 on the CPU.
        dtype (`torch.dtype`): as in [`FrozenProduct`]. Does nothing if oneDNN does not support it.
    """
    if not has_product(dtype):
        return
    for layer in model.modules():
        if can_pack(layer):
            layer.forward = FrozenProduct(layer, dtype)


__all__ = ["pack_frozen_weights"]
