"""Data sets that are read front to back, because they are too large to store or lie on the Hub."""

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from vfmtok_hf.data.sources import (
    ONE_CLASS,
    class_number,
    damage_named,
    data_files_of,
    features_of,
    find_column,
    known_class_names,
    label_of,
    load_dataset,
)
from vfmtok_hf.modeling.image_reading_vfmtok import UnreadableImage


logger = logging.getLogger("vfmtok_hf.data")

# This many unreadable images in a row mean a wrong column or format, not single damaged files.
MAX_UNREADABLE_IN_A_ROW = 10_000
MAX_WORKERS = 256


def shuffle_files(dataset: Any, seed: int) -> Any:
    """Shuffle only the files: the library's shuffle buffer reads ahead in threads, so `Stream` has its own."""
    # By default, datasets 5.0 and newer read from ten files at a time. This can go once 5.0 is the lowest version.
    has_option = "max_buffer_input_shards" in inspect.signature(dataset.shuffle).parameters
    options = {"max_buffer_input_shards": 1} if has_option else {}
    return dataset.shuffle(seed=seed, buffer_size=1, **options)


class Stream(IterableDataset):
    """
    Base class of streams of images and of image tokens. A subclass defines `read`, which reads a row, and `make_item`,
    which turns it into an item.

    An epoch has a fixed number of items. The files are reordered in each epoch, and the rows are shuffled in a buffer of
    `shuffle_buffer`. Every worker of every process reads its own part. A worker that reaches the end of its part
    early reads it again, so all processes take the same number of steps. After a resume, the part of the epoch
    that was seen is read again without decoding it.

    Args:
        source, split, label_column, class_names, labeled: as in [`~vfmtok_hf.data.sources.open_records`].
        epoch_items (`int`, *optional*): number of items in an epoch, over all processes. Defaults to the number of rows
            that the data set states.
        shuffle_buffer (`int`): number of rows in the buffer of each worker.
        seed (`int`): seed of the order and of random augmentations.

    Raises:
        ValueError: the size of an epoch or the class names are unknown and not passed.
    """

    def __init__(
        self,
        source: str | Path,
        split: str,
        label_column: str | None,
        class_names: list[str] | None,
        epoch_items: int | None,
        shuffle_buffer: int,
        seed: int,
        labeled: bool = True,
    ):
        dataset = load_dataset(source, split, streaming=True)
        self.source = source
        self.features = features_of(dataset)
        self.label_column = find_column("label_column", str(source), self.features, label_column) if labeled else None
        class_names = (class_names or known_class_names(self.features, self.label_column)) if labeled else ONE_CLASS
        if class_names is None:
            raise ValueError(
                f"The column {self.label_column} of {source} does not name its classes: pass --class_names."
            )
        stated = (dataset.info.splits or {}).get(split)
        if epoch_items is None and not (stated and stated.num_examples):
            raise ValueError(f"{source} does not state how many images it has: pass --epoch_images.")
        self.dataset = shuffle_files(dataset, seed)
        self.shuffle_buffer = shuffle_buffer
        self.class_names = class_names
        self.class_numbers = {name: number for number, name in enumerate(class_names)}
        self.epoch_items = epoch_items or stated.num_examples
        self.seed = seed
        # One entry per worker, because concurrent additions of several processes to one number can get lost.
        self.unreadable = torch.zeros(MAX_WORKERS, dtype=torch.int64).share_memory_()
        self.set_share(batch_size=1)
        self.set_position(0, 0)

    def read(self, row: dict[str, Any], name: str) -> Any:
        """
        Read a row, which `name` describes in messages.

        Raises:
            UnreadableImage: the row is damaged or empty; the next row takes its place.
        """
        raise NotImplementedError

    def make_item(self, content: Any, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Create an item, without its `label` and `index`, from what `read` returned."""
        raise NotImplementedError

    def set_share(self, batch_size: int, num_processes: int = 1, process_index: int = 0, num_workers: int = 0) -> None:
        """Set how items are divided: each worker of each process has a part, and yields it `batch_size` items at a time."""
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.workers = max(num_workers, 1)  # of each process
        self.parts = num_processes * self.workers

    def set_position(self, epoch: int, first_batch: int) -> None:
        """Set where the next iteration starts."""
        self.epoch = epoch
        self.first_batch = first_batch

    @property
    def batches_per_epoch(self) -> int:
        """Of each process."""
        return self.epoch_items // (self.batch_size * self.num_processes)

    @property
    def num_unreadable(self) -> int:
        """Number of images that could not be decoded so far, over all workers of this process."""
        return int(self.unreadable.sum())

    def name(self, index: int) -> str:
        place, part = divmod(index, self.parts)
        return f"{self.source}, image {place} of part {part + 1}/{self.parts} in epoch {self.epoch}"

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        """
        Items, with their `label` and with an `index` that counts what all parts have in turn; a worker yields those of its
        whole batches.
        """
        worker = get_worker_info()
        number = worker.id if worker else 0
        # A loader takes the batches of its workers in turn and always starts with the first worker.
        turn = (number + self.first_batch) % self.workers
        batches_before = len(range(turn, self.first_batch, self.workers))
        batches = len(range(turn, self.batches_per_epoch, self.workers))
        part = self.process_index * self.workers + turn
        yield from self._items(part, batches_before * self.batch_size, batches * self.batch_size, number)

    def _items(self, part: int, start: int, end: int, worker: int) -> Iterator[dict]:
        """
        Items `start` to `end` of a part. The next readable image replaces unreadable ones before it,
        so an item's position is the number of rows read before it.
        """
        places: list[int] = []
        for position, row in enumerate(self._rows_without_end(part)):
            if position >= end and not places:
                return
            if position < start:
                continue
            if position < end:
                places.append(position)
            name = self.name(position * self.parts + part) + (f" ({row['__key__']})" if "__key__" in row else "")
            try:
                label = self._label(row, name)
                content = self.read(row, name)
            except UnreadableImage as error:
                logger.warning("skipping an image: %s", error)
                self.unreadable[worker] += 1
                if position - places[0] >= MAX_UNREADABLE_IN_A_ROW:
                    raise UnreadableImage(f"{position - places[0]} images of {self.source} in a row.") from error
                continue
            for place in places:
                rng = np.random.default_rng((self.seed, self.epoch, part, place))
                yield {**self.make_item(content, rng), "label": label, "index": place * self.parts + part}
            places = []

    def _label(self, row: dict[str, Any], name: str) -> int:
        if self.label_column is None:
            return 0
        label = label_of(row[self.label_column], self.features[self.label_column], self.source, self.label_column)
        if label is None:
            raise UnreadableImage(f"{name} has no label.")
        return class_number(label, self.class_numbers, self.source, self.label_column)

    def _rows_without_end(self, part: int) -> Iterator[dict[str, Any]]:
        """Rows of a part in this epoch's order, repeated forever."""
        rng = np.random.default_rng((self.seed, self.epoch, part))
        while True:
            buffer: list[dict[str, Any]] = []
            for row in self._rows(part):
                buffer.append(row)
                if len(buffer) >= self.shuffle_buffer:
                    chosen = rng.integers(len(buffer))
                    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
                    yield buffer.pop()
            rng.shuffle(buffer)
            yield from buffer

    def _rows(self, part: int) -> Iterator[dict[str, Any]]:
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.dataset, rank=part, world_size=self.parts)
        rows.set_epoch(self.epoch)
        is_empty = True
        with damage_named(data_files_of(self.source)):
            # Plain iteration would divide the rows among the workers a second time.
            for batch in rows.iter(batch_size=1):
                is_empty = False
                yield {name: values[0] for name, values in batch.items()}
        if is_empty:
            raise ValueError(
                f"{self.source} has no images for part {part + 1} of {self.parts}: use fewer --num_workers."
            )
