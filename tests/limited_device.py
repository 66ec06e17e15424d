"""
A pretended device without float64, as Apple's MPS is one. Its tensors lie on the CPU and say that they are elsewhere; one
that would be float64 raises the error that MPS raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


DEVICE = torch.device("lazy", 0)  # a name that torch knows and has no code for


class ElsewhereTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        if on_cpu.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        layout = {"strides": on_cpu.stride(), "storage_offset": on_cpu.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, on_cpu.shape, dtype=on_cpu.dtype, device=DEVICE, **layout)

    def __init__(self, on_cpu: torch.Tensor):
        self.on_cpu = on_cpu

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """Run an operation on the CPU. Its results are on the device that it names, or else on that of its arguments."""
    elsewhere = []

    def on_cpu(value):
        if not isinstance(value, ElsewhereTensor):
            return value
        elsewhere.append(value)
        return value.on_cpu

    first = args[0] if args else None
    args, kwargs = tree_map(on_cpu, args), tree_map(on_cpu, kwargs)
    result_is_elsewhere = bool(elsewhere)
    if kwargs.get("device") is not None:
        result_is_elsewhere = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    results = function(*args, **kwargs)
    if function._schema.name.endswith("_") and isinstance(first, ElsewhereTensor):
        return first  # changed in place
    if not result_is_elsewhere:
        return results
    return tree_map(lambda value: ElsewhereTensor(value) if isinstance(value, torch.Tensor) else value, results)


@contextmanager
def limited_device(*modules: nn.Module) -> Iterator[torch.device]:
    """Within it the modules are on the pretended device. They stay there."""
    with torch.no_grad(), Dispatch():
        for module in modules:
            for part in module.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        part._parameters[name] = nn.Parameter(ElsewhereTensor(parameter.data), requires_grad=False)
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        part._buffers[name] = ElsewhereTensor(buffer)
        yield DEVICE
