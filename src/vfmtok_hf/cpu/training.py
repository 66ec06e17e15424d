"""
Faster training on CPUs: the frozen part of a model from packed weights, and convolutions of large images in fewer
multiplications.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

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


# Below either, NNPACK is not faster: transforms outweigh few channels, and starting its threads outweighs little work.
MIN_CHANNELS, MIN_WORK = 64, 2**27  # work: input channels, output channels and positions multiplied


class WinogradConvolution:
    """
    What a 3 x 3 `nn.Conv2d` computes, of large float32 images by NNPACK, which is part of torch: 64 multiplications for
    each 6 x 6 outputs instead of 324 (F(6 x 6, 3 x 3) of Lavin and Gray, arXiv 1509.09308), at the cost of
    transforming inputs and outputs. The gradient of the images is computed in the same way, that of the weights is
    torch's.

    The transforms cost precision: outputs of deviation 1 are off by 1e-4 at most and by 3e-6 in the mean, where a plain
    float32 convolution is off by 2e-6 at most and TF32, in which GPUs convolve by default, keeps 10 bits (1e-3). NNPACK
    has threads of its own, as many as torch has when it is first used.

    Args:
        layer (`torch.nn.Conv2d`): on the CPU; see [`can_transform`].
    """

    def __init__(self, layer: nn.Conv2d):
        self.layer = layer

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`(batch_size, in_channels, height, width)` to `(batch_size, out_channels, height, width)`."""
        weight, bias = self.layer.weight, self.layer.bias
        is_large = len(weight) * images[0].numel() >= MIN_WORK
        if is_large and images.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return _Winograd.apply(images, weight, bias)
        return F.conv2d(images, weight, bias, padding=1)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        return convolve(images, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        of_images, *wanted = ctx.needs_input_grad
        by_images = convolve(gradient, weight.transpose(0, 1).contiguous().flip(2, 3), None) if of_images else None
        one, zero = [1, 1], [0, 0]  # stride, padding and dilation; no output padding
        _, by_weight, by_bias = torch.ops.aten.convolution_backward(
            gradient, images, weight, [len(weight)], one, one, one, False, zero, 1, [False, *wanted]
        )
        return by_images, by_weight, by_bias


def convolve(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 3 x 3 convolution with padding 1 by NNPACK."""
    # Image by image: for several at once it has another way, which is slower.
    outputs = [
        torch.ops.aten._nnpack_spatial_convolution(image, weight, bias, padding=[1, 1], stride=[1, 1])
        for image in images.split(1)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def can_transform(module: nn.Module) -> bool:
    """Whether a layer is a plain 3 x 3 convolution of as many channels as [`WinogradConvolution`] is made for."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.stride == module.padding == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= MIN_CHANNELS
    )


def use_winograd(model: nn.Module) -> None:
    """
    Have the convolutions of a model on the CPU compute as [`WinogradConvolution`], where this build of torch and this
    processor have NNPACK. Their parameters stay where they are.
    """
    if not torch.backends.nnpack.is_available():
        return
    for layer in model.modules():
        if can_transform(layer):
            layer.forward = WinogradConvolution(layer)


__all__ = ["pack_frozen_weights", "use_winograd"]
