"""Faster compiled decoding on CPUs at batch size 1."""

from typing import TypeVar

import torch
from torch import nn


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class RowSumLinear(nn.Linear):
    """
    An `nn.Linear` that computes a single row on the CPU as a sum of elementwise products, at least in float32, if it is
    compiled. torch.compile turns it into one pass over the weight, which is faster than the libraries' matmuls
    (docs/performance.md).
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(..., in_features)` to `(..., out_features)`."""
        is_single_row = hidden_states.is_cpu and hidden_states.shape[:-1].numel() == 1
        if not (is_single_row and torch.compiler.is_compiling()):
            return super().forward(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        product = (hidden_states[..., None, :].to(dtype) * self.weight).sum(-1).to(hidden_states.dtype)
        return product if self.bias is None else product + self.bias


def use_row_sums(model: ModuleT) -> ModuleT:
    """
    Replace the plain linear layers on the CPU with [`RowSumLinear`], in place. Eager results, weights and saved files do
    not change. `compile_decoding` of the generators calls it.

    Args:
        model (`torch.nn.Module`): a model; packed and quantized layers stay as they are.

    Returns:
        `torch.nn.Module`: the argument.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.is_cpu:
            layer.__class__ = RowSumLinear
    return model


# Linear layers without changes of their own to what they compute.
PLAIN_LINEARS = (nn.Linear, RowSumLinear)

__all__ = ["PLAIN_LINEARS", "use_row_sums"]
