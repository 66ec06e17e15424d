"""Base class of the packed linear layers for inference on the CPU."""

import torch
from torch import nn


class PackedLayer(nn.Module):
    """
    An `nn.Linear` for inference on the CPU, with its weight in the layout of a faster matmul.

    It is saved, copied and pickled as the original layer. It has no backward pass.

    Args:
        linear (`torch.nn.Linear`): on the CPU.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear_class = type(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        # Neither this nor the weight is a parameter, because packed weights have no storage, which code for parameters expects.
        self.bias = None if linear.bias is None else linear.bias.detach()

    def plain_weight(self) -> nn.Parameter:
        """The layer's original weight."""
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """The layer with the original weight, bit for bit."""
        linear = self.linear_class(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = self.plain_weight()
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias)
        return linear

    @staticmethod
    def refuse_gradients(hidden_states: torch.Tensor) -> None:
        """
        Check that no gradient of `hidden_states` is required.

        Raises:
            RuntimeError: a gradient is required.
        """
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("Packed weights have no gradients: call unpack_weights(model) before training.")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def __reduce__(self):
        return type(self), (self.to_linear(),)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.to_linear()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        before = torch.empty(0, dtype=self.dtype)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise RuntimeError(
                f"This model's weights are packed for the CPU in {before.dtype}: call unpack_weights(model) before "
                "moving or converting it."
            )
        return self


__all__ = ["PackedLayer"]
