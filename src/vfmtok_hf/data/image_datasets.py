"""Images for training, with random access or as a stream. An item depends only on seed, epoch and position."""

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vfmtok_hf.data.sources import ImageRecords, cell_bytes, find_column, without_decoding
from vfmtok_hf.data.streams import Stream
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.modeling.image_reading_vfmtok import UnreadableImage, read_image


logger = logging.getLogger("vfmtok_hf.data")


class ImageDataset(Dataset):
    """
    Images of records, augmented.

    An item depends only on (seed, epoch, index), so a resumed run sees the same items as an uninterrupted one, with
    any number of workers. An image that cannot be decoded is replaced by the next one that can; each such
    image is named once in the log.

    Args:
        records ([`ImageRecords`]): the images.
        augmentation ([`Augmentation`]): converts an image to `pixel_values`.
        cache_images (`bool`): keep the decoded images in memory, reduced to the size that the tightest crop needs.
        seed (`int`): of the augmentation.
    """

    def __init__(self, records: ImageRecords, augmentation: Augmentation, cache_images: bool = False, seed: int = 0):
        self.records = records
        self.labels = records.labels
        self.class_names = records.class_names
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0
        # Worker processes write to it as well.
        self.unreadable = torch.zeros(len(records), dtype=torch.bool).share_memory_()
        self.cache = [self._decoded(index, shrink=True) for index in range(len(records))] if cache_images else None

    @property
    def num_unreadable(self) -> int:
        """Number of distinct unreadable images so far, over all workers of this process, plus images without a label."""
        return int(self.unreadable.sum()) + len(self.records.unlabeled)

    def name(self, index: int) -> str:
        return self.records.name(index)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """`pixel_values` (3, image_size, image_size) in [-1, 1], `label`, and `index` of the image that was used."""
        rng = np.random.default_rng((self.seed, self.epoch, index))
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            image = self.cache[candidate] if self.cache else self._decoded(candidate)
            if image is not None:
                pixel_values = self.augmentation(image, rng)
                return {"pixel_values": pixel_values, "label": self.labels[candidate], "index": candidate}
        raise UnreadableImage(f"None of the {len(self)} images of {self.records.source} can be decoded.")

    def _decoded(self, index: int, shrink: bool = False) -> Image.Image | None:
        if self.unreadable[index]:
            return None
        try:
            image = self.records.read(index, self.augmentation.min_side)
        except UnreadableImage as error:
            logger.warning("skipping an image: %s", error)
            self.unreadable[index] = True
            return None
        return self.augmentation.shrunk(image) if shrink else image


class ImageStream(Stream):
    """
    A [`Stream`] of images, augmented. Its items are those of [`ImageDataset`].

    Args:
        source, split, image_column, label_column, class_names, labeled: as in
            [`~vfmtok_hf.data.sources.open_records`].
        augmentation ([`Augmentation`]): converts an image to `pixel_values`.
        epoch_images, shuffle_buffer, seed: as in [`Stream`].
    """

    def __init__(
        self,
        source: str,
        augmentation: Augmentation,
        split: str = "train",
        image_column: str | None = None,
        label_column: str | None = None,
        class_names: list[str] | None = None,
        epoch_images: int | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        labeled: bool = True,
    ):
        super().__init__(source, split, label_column, class_names, epoch_images, shuffle_buffer, seed, labeled)
        self.image_column = find_column("image_column", source, self.features, image_column)
        self.dataset = without_decoding(self.dataset, self.features, self.image_column)
        self.augmentation = augmentation

    def read(self, row: dict[str, Any], name: str) -> Image.Image:
        """The image of a row; raises as `read_image` does."""
        return read_image(cell_bytes(row[self.image_column], name), name, self.augmentation.min_side)

    def make_item(self, content: Image.Image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """`pixel_values` (3, image_size, image_size) in [-1, 1]."""
        return {"pixel_values": self.augmentation(content, rng)}
