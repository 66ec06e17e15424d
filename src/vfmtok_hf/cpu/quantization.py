"""
Run layers quantized by torchao with torch's own CPU kernels.

torch has matmuls that read 8 or 4 bit weights directly, with bfloat16 activations. torchao's tensors do not use them on a CPU
(docs/performance.md compares both). `pack_weights` in `cpu.packing` is the entry point.
"""

import sys

import torch
from torch import nn

from vfmtok_hf.cpu.compiling import PLAIN_LINEARS
from vfmtok_hf.cpu.packed_layer import PackedLayer


class PackedQuantizedLinear(PackedLayer):
    """
    Base class of the 8 bit and 4 bit layers.

    It takes and returns activations of the dtype that the quantized layer had, and computes in bfloat16 with float32 sums.

    Args:
        linear (`torch.nn.Linear`): on the CPU, with a torchao tensor as weight that the class `accepts`.
    """

    def _product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """bfloat16 `(rows, in_features)` to `(rows, out_features)`, without the bias."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(..., in_features)` to `(..., out_features)`; raises as `refuse_gradients` does."""
        self.refuse_gradients(hidden_states)
        rows = hidden_states.reshape(-1, self.in_features).to(torch.bfloat16)
        output = self._product(rows).to(hidden_states.dtype).view(*hidden_states.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class PackedInt8Linear(PackedQuantizedLinear):
    """
    8 bit weights with one scale per output, read directly from torchao's tensor.

    Args:
        linear (`torch.nn.Linear`): its weight is a `torchao` `Int8Tensor` without quantized activations.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.weight = linear.weight.detach()
        self.scales = self.weight.scale.flatten().to(torch.bfloat16)

    @staticmethod
    def accepts(weight: torch.Tensor) -> bool:
        """Whether the kernel supports `weight`, an `Int8Tensor`."""
        return (
            weight.block_size == [1, weight.shape[1]]
            and weight.act_quant_kwargs is None
            and weight.act_pre_scale is None
            and (weight.zero_point is None or not weight.zero_point.any())
            and weight.shape[1] % 16 == 0  # the kernel reads whole vectors, past the end of other rows
        )

    def _product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(hidden_states, self.weight.qdata, self.scales)

    def plain_weight(self) -> nn.Parameter:
        """torchao's tensor."""
        return nn.Parameter(self.weight, requires_grad=False)


class PackedInt4Linear(PackedQuantizedLinear):
    """
    4 bit weights in groups along the inputs, two per byte; torchao's tensor uses a byte for each.

    Args:
        linear (`torch.nn.Linear`): its weight is a `torchao` `IntxUnpackedToInt8Tensor` of `torch.int4`.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight
        self.scale, self.zero_point, self.block_size = weight.scale, weight.zero_point, weight.block_size
        # The kernel's weight is (nibble - 8) * scale + offset, torchao's (value - zero point) * scale.
        nibbles = weight.qdata.to(torch.int32) + 8
        self.nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        scales = torch.stack([self.scale, -self.zero_point * self.scale], dim=-1)
        self.scales = scales.transpose(0, 1).to(torch.bfloat16).contiguous()

    @staticmethod
    def accepts(weight: torch.Tensor) -> bool:
        """Whether the kernel supports `weight`, an `IntxUnpackedToInt8Tensor`."""
        rows, group_size = weight.block_size
        return (
            weight.target_dtype is torch.int4
            and weight.activation_quantization is None
            and rows == 1
            and group_size in (32, 64, 128, 256)
            and weight.shape[0] % 16 == 0
        )

    def _product(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(hidden_states, self.nibbles, self.block_size[1], self.scales)

    def plain_weight(self) -> nn.Parameter:
        """torchao's tensor."""
        from torchao.quantization import IntxUnpackedToInt8Tensor

        # The layout of the nibbles is internal to the kernel: a matmul with the identity returns them.
        unit_scales = torch.zeros_like(self.scales)
        unit_scales[..., 0] = 1
        identity = torch.eye(self.in_features, dtype=torch.bfloat16)
        values = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, self.nibbles, self.block_size[1], unit_scales)
        weight = IntxUnpackedToInt8Tensor(
            values.T.to(torch.int8).contiguous(),
            self.scale,
            self.zero_point,
            torch.int4,
            self.block_size,
            self.dtype,
            None,
        )
        return nn.Parameter(weight, requires_grad=False)


def packed_class(module: nn.Module) -> type[PackedQuantizedLinear] | None:
    """The class for `module`, a quantized `nn.Linear`, on the CPU; None for others or if there is no kernel."""
    if type(module) not in PLAIN_LINEARS or not module.weight.is_cpu or "torchao" not in sys.modules:
        return None
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    for tensor_class, layer_class in ((Int8Tensor, PackedInt8Linear), (IntxUnpackedToInt8Tensor, PackedInt4Linear)):
        if isinstance(module.weight, tensor_class) and layer_class.accepts(module.weight):
            return layer_class
    return None


__all__ = ["PackedInt4Linear", "PackedInt8Linear", "PackedQuantizedLinear", "packed_class"]
