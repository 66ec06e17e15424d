"""Faster compiled decoding on CPUs, one image after the other."""

from typing import TypeVar

import torch
from torch import nn


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class RowSumLinear(nn.Linear):
    """
    An `nn.Linear` that torch.compile sees, for a single row, as a sum over products in float32: one pass over the weight
    that reads it faster than the libraries' matrix products do (docs/performance.md).
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(..., in_features)` to `(..., out_features)`."""
        if not torch.compiler.is_compiling() or hidden_states.shape[:-1].numel() != 1:
            return super().forward(hidden_states)
        product = (hidden_states[..., None, :].float() * self.weight.float()).sum(-1).to(hidden_states.dtype)
        return product if self.bias is None else product + self.bias


def use_row_sums(model: ModuleT) -> ModuleT:
    """
    Have the linear layers of `model`, a generator, on the CPU compute as [`RowSumLinear`] in what `compile_decoding` translates, in
    place. Weights and what is saved stay as they are.

    Returns:
        `torch.nn.Module`: the argument.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.is_cpu:
            layer.__class__ = RowSumLinear
    return model


__all__ = ["use_row_sums"]
