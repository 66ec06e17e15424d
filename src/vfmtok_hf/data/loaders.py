"""
Reproducible batches in training order. What a process sees at a step depends only on the seed and the position in the run,
so a resumed run continues exactly where it stopped.
"""

import signal
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vfmtok_hf.data.streams import Stream


class EpochSampler(Sampler[int]):
    """
    Order of one epoch, which depends only on (seed, epoch).

    Args:
        labels (`list[int]`): class of each item.
        balance_power (`float`): 0 is a plain shuffle. Otherwise items are sampled with replacement so that a class of
            n items has a weight of n ** (1 - balance_power): 0.5 softens imbalance, 1 makes all classes equally likely.
        seed (`int`): of the order.
    """

    def __init__(self, labels: list[int], balance_power: float = 0.0, seed: int = 0):
        self.num_items = len(labels)
        self.balance_power = balance_power
        self.seed = seed
        self.epoch = 0
        counts = Counter(labels)
        self.weights = torch.tensor([counts[label] ** -balance_power for label in labels], dtype=torch.float64)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        if self.balance_power == 0:
            order = torch.randperm(self.num_items, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.num_items, replacement=True, generator=generator)
        return iter(order.tolist())


class EpochBatches(Sampler[list[int]]):
    """Batches of one process: every `num_processes`-th complete batch of a sampler's order."""

    def __init__(self, sampler: EpochSampler, batch_size: int, num_processes: int = 1, process_index: int = 0):
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.first_batch = 0

    def set_position(self, epoch: int, first_batch: int) -> None:
        """Set where the next iteration starts."""
        self.sampler.set_epoch(epoch)
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.sampler) // (self.batch_size * self.num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for batch in range(self.first_batch, len(self)):
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            yield order[start : start + self.batch_size]


def leave_stopping_to_the_trainer(worker: int) -> None:
    """
    Ignore signals in a loader's workers (`worker_init_fn`). Slurm and Ctrl-C signal the whole process group, and a
    worker that dies would end the trainer before it has saved.
    """
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_IGN)


class Position(Protocol):
    """Position of a run in its data."""

    epoch: int
    batch: int  # finished batches of this epoch


class TrainingLoader:
    """
    Endless batches for one of several processes, from any position of the run, on its device.

    Args:
        data: a [`Stream`], or a map-style data set with `labels` and `set_epoch`.
        batch_size (`int`): of this process.
        num_processes, process_index (`int`): all processes together go through the data once an epoch.
        balance_power (`float`): as in [`EpochSampler`]; streams cannot be balanced.
        num_workers (`int`): number of processes that read and augment.

    Raises:
        ValueError: there are fewer items than one batch per process.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        balance_power: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.data = data
        self.device = torch.device(device)
        if isinstance(data, Stream):
            if balance_power:
                raise ValueError(
                    "The classes of a stream cannot be balanced: --balance_power needs --streaming false."
                )
            data.set_share(batch_size, num_processes, process_index, num_workers)
            self.order, length, batching = data, data.batches_per_epoch, {"batch_size": batch_size}
        else:
            sampler = EpochSampler(data.labels, balance_power, seed)
            self.order = EpochBatches(sampler, batch_size, num_processes, process_index)
            length, batching = len(self.order), {"batch_sampler": self.order}
        if length == 0:
            raise ValueError(
                f"The training data have fewer items than one batch of {batch_size} for {num_processes} process(es): "
                "lower --batch_size."
            )
        self.loader = DataLoader(
            data,
            num_workers=num_workers,
            worker_init_fn=leave_stopping_to_the_trainer,
            pin_memory=self.device.type == "cuda",
            # Starting an epoch samples from it; with the global generator, a resumed run would sample once more.
            generator=torch.Generator(),
            **batching,
        )

    def batches(self, position: Position) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from `position` on, which is advanced."""
        while True:
            if not isinstance(self.data, Stream):
                self.data.set_epoch(position.epoch)
            self.order.set_position(position.epoch, position.batch)
            for batch in self.loader:
                position.batch += 1
                yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            position.epoch, position.batch = position.epoch + 1, 0
