"""Faster compiled decoding on CPUs, one image after the other."""

from typing import TypeVar

import torch
from torch import nn


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class RowSumLinear(nn.Linear):
    """
    An `nn.Linear` that torch.compile sees, for a single row on the CPU, as a sum over products in float32: one pass over
    the weight that reads it faster than the libraries' matrix products do (docs/performance.md).
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(..., in_features)` to `(..., out_features)`."""
        is_single_row = hidden_states.is_cpu and hidden_states.shape[:-1].numel() == 1
        if not (is_single_row and torch.compiler.is_compiling()):
            return super().forward(hidden_states)
        product = (hidden_states[..., None, :].float() * self.weight.float()).sum(-1).to(hidden_states.dtype)
        return product if self.bias is None else product + self.bias


def use_row_sums(model: ModuleT) -> ModuleT:
    """
    Have the linear layers of a generator on the CPU compute as [`RowSumLinear`] in compiled decode steps, in place.
    Weights and saved files stay as they are. Call it before `compile_decoding`.

    Args:
        model (`torch.nn.Module`): a generator with unpacked weights.

    Returns:
        `torch.nn.Module`: the argument.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.is_cpu:
            layer.__class__ = RowSumLinear
    return model


__all__ = ["use_row_sums"]
