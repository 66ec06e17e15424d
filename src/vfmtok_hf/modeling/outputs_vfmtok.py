"""The base of the models' outputs."""

import torch
from transformers.utils import ModelOutput


class VFMTokModelOutput(ModelOutput):
    """A `ModelOutput` whose `repr` shows the shapes of its tensors, not their values."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={_described(value)}" for name, value in self.items())
        return f"{type(self).__name__}({fields})"


def _described(value: torch.Tensor | tuple[torch.Tensor, ...]) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


__all__ = ["VFMTokModelOutput"]
