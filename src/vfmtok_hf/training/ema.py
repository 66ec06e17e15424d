"""Exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class EMA:
    """
    Float32 average of a model's trainable parameters and of its buffers: `average += (1 - decay) * (value - average)`.
    Frozen parameters are not copied, and integer buffers are copied from the model without averaging.

    The decay increases with the number of updates, `min(decay, (1 + updates) / (10 + updates))`, so the average of a short
    run is not dominated by its random initialization.

    With FSDP2, each process averages its own shard.

    Args:
        model (`nn.Module`): the model without wrappers, on its final device, already sharded if FSDP2 is used.
        decay (`float`): weight of the previous average in each update, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.updates = 0
        self.averages = {
            name: tensor.detach().clone().float() if tensor.is_floating_point() else tensor.detach().clone()
            for name, tensor in self._tracked()
        }

    def _tracked(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # A forward pass may leave whole weights behind, which would hide what is written.
        yield from ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        yield from self.model.named_buffers()

    @torch.no_grad()
    def update(self) -> None:
        """Update the average. Call it after each optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = [], []
        for name, value in self._tracked():
            if value.is_floating_point():
                averages.append(self.averages[name])
                values.append(value.detach().float())
            else:
                self.averages[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model has the averaged weights."""
        own = {name: value.detach().clone() for name, value in self._tracked()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: dict[str, torch.Tensor]) -> None:
        for name, value in self._tracked():
            value.copy_(weights[name])

    def state_dict(self) -> dict:
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])
