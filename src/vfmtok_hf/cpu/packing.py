"""
Faster inference on CPUs with equal results: linear layers run in oneDNN with packed weights, and freed memory stays in the
process.

torch computes float32 matmuls with the BLAS library it was built with, which may not support the CPU well: MKL runs AVX2
code on AMD processors with AVX-512. oneDNN, which is also part of torch, uses AVX-512 there, and reads blocked weights at
nearly the speed of memory (measured in docs/performance.md).
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from vfmtok_hf.cpu.attention import fastest_attention
from vfmtok_hf.cpu.compiling import PLAIN_LINEARS
from vfmtok_hf.cpu.packed_layer import PackedLayer
from vfmtok_hf.cpu.quantization import packed_class
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARAttention, VFMTokARMLP
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARAttention


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class PackedLinear(PackedLayer):
    """
    A linear layer whose weight has oneDNN's blocked layout.

    Args:
        linear (`torch.nn.Linear`): in float32 or bfloat16 on the CPU.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        `hidden_states` `(..., in_features)` to `(..., out_features)`.

        Raises:
            RuntimeError: a gradient is wanted, or torch.compile or torch.export traces the layer.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("torch.compile cannot read packed weights: call unpack_weights(model) first.")
        self.refuse_gradients(hidden_states)
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, "none", [], "")

    def plain_weight(self) -> nn.Parameter:
        """The weight without blocks."""
        return nn.Parameter(self.weight.to_dense())


class JointProduct:
    """
    One matmul for several `nn.Linear` with the same input, using their stacked weights.

    Args:
        layers (`Sequence[torch.nn.Linear]`): all with or all without a bias.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        self.sizes = [layer.out_features for layer in layers]
        stacked = nn.Linear(layers[0].in_features, sum(self.sizes), bias=layers[0].bias is not None, device="meta")
        stacked.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
        if layers[0].bias is not None:
            stacked.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
        self.packed = PackedLinear(stacked)
        self._last: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def output(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Output of layer `index` for `hidden_states` `(..., in_features)`: a view of the shared result.

        The first layer computes it. The others, called next with the same tensor, reuse it.
        """
        last = self._last
        if index == 0 or last is None or last[0] is not hidden_states:
            last = hidden_states, self.packed.forward(hidden_states).split(self.sizes, dim=-1)
        self._last = None if index == len(self.sizes) - 1 else last
        return last[1][index]

    def to_linears(self) -> list[nn.Linear]:
        """The layers with their original weights, bit for bit."""
        stacked = self.packed.to_linear()
        layers, end = [], 0
        for size in self.sizes:
            start, end = end, end + size
            layer = nn.Linear(stacked.in_features, size, bias=stacked.bias is not None, device="meta")
            layer.weight = nn.Parameter(stacked.weight.detach()[start:end].clone())
            if stacked.bias is not None:
                layer.bias = nn.Parameter(stacked.bias.detach()[start:end].clone())
            layers.append(layer)
        return layers

    def __reduce__(self):
        return type(self), (self.to_linears(),)


class PackedPart(nn.Module):
    """
    One layer of a [`JointProduct`]. It is saved as the original layer.

    Args:
        joint_product (`JointProduct`): shared by all parts.
        index (`int`): index of this layer.
    """

    def __init__(self, joint_product: JointProduct, index: int):
        super().__init__()
        self.joint_product, self.index = joint_product, index

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(..., in_features)` to `(..., out_features)` of this layer."""
        return self.joint_product.output(self.index, hidden_states)

    def to_linear(self) -> nn.Linear:
        """The layer with the original weight, bit for bit."""
        return self.joint_product.to_linears()[self.index]

    def extra_repr(self) -> str:
        return f"out_features={self.joint_product.sizes[self.index]}, part {self.index} of {self.joint_product.sizes}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.to_linear()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        self.joint_product.packed._apply(fn, recurse)
        return self


# Layers that a module calls consecutively with the same input.
JOINT_LAYERS = {
    VFMTokARAttention: ("q_proj", "k_proj", "v_proj"),
    VFMTokARMLP: ("gate_proj", "up_proj"),
    VFMTokRARAttention: ("q_proj", "k_proj", "v_proj"),
}


def has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports matmuls of this dtype on this machine: float32, and usually bfloat16."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_pack(module: nn.Module) -> bool:
    """Whether a layer is an ordinary `nn.Linear` on the CPU, with a dtype that oneDNN supports."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward in [linear.forward for linear in PLAIN_LINEARS]
        and not isinstance(module, NonDynamicallyQuantizableLinear)  # nn.MultiheadAttention reads its weight
        and type(module.weight) is nn.Parameter  # quantized weights have other classes
        and module.weight.device.type == "cpu"
        and has_product(module.weight.dtype)
    )


def pack_weights(model: ModuleT) -> ModuleT:
    """
    Prepare a model for fast inference on the CPU, in place. Unsupported layers are left unchanged.

    Linear layers are replaced by [`PackedLinear`] one at a time, so memory grows by only one layer. Query, key and value of
    a generator become one [`JointProduct`], and so do gate and up. Convolutions use channels-last weights and activations.
    Layers quantized by torchao to 8 or 4 bits use torch's kernels for such weights. Results change only by rounding, for
    quantized layers by rounding to bfloat16. bfloat16 models use [`blockwise_attention_forward`], and the vision models
    inside use `eager` attention, because torch's fused attention is slow in bfloat16. Call [`unpack_weights`] before
    training and before `torch.compile`, which packs weights itself.

    Args:
        model (`torch.nn.Module`): a tokenizer or generator, in float32 or bfloat16.

    Returns:
        `torch.nn.Module`: the argument.
    """
    for parent in list(model.modules()):
        names = JOINT_LAYERS.get(type(parent), ())
        layers = [getattr(parent, name) for name in names]
        if layers and all(map(can_pack, layers)):
            product = JointProduct(layers)
            for index, name in enumerate(names):
                setattr(parent, name, PackedPart(product, index))
        for name, child in parent.named_children():
            if can_pack(child):
                setattr(parent, name, PackedLinear(child))
            elif quantized_layer := packed_class(child):
                setattr(parent, name, quantized_layer(child))
            elif isinstance(child, nn.Conv2d) and child.weight.is_cpu:
                child.to(memory_format=torch.channels_last)
    if isinstance(model, PreTrainedModel) and (model.device.type, model.dtype) == ("cpu", torch.bfloat16):
        parts = pretrained_parts(model)
        if not hasattr(model, "_unpacked_attention"):
            model._unpacked_attention = [part.config._attn_implementation for part in parts]
        for part in parts:
            part.set_attn_implementation({"": fastest_attention(in_bfloat16=True, causal=part is model)})
    return model


def pretrained_parts(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a model, including itself."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def unpack_weights(model: ModuleT) -> ModuleT:
    """Undo [`pack_weights`] of `model` in place, bit for bit. Returns the argument."""
    if hasattr(model, "_unpacked_attention"):
        for part, attention in zip(pretrained_parts(model), model._unpacked_attention, strict=True):
            part.set_attn_implementation({"": attention})
        del model._unpacked_attention
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (PackedLayer, PackedPart)):
                setattr(parent, name, child.to_linear())
            elif isinstance(child, nn.Conv2d):
                child.to(memory_format=torch.contiguous_format)
    return model


# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """
    Stop glibc from returning freed memory to the operating system.

    By default, glibc returns large blocks immediately. The next tensor then gets new pages, which the system must clear.
    The process does not shrink afterwards, so programs call this and the library does not; the `vfmtok` commands and the
    trainers do. It does nothing with other C libraries.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        return
    # No mmap for large blocks, no trimming of the heap, one heap for all threads.
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
        set_option(option, value)


__all__ = [
    "JointProduct",
    "PackedLinear",
    "PackedPart",
    "keep_freed_memory",
    "pack_weights",
    "unpack_weights",
]
