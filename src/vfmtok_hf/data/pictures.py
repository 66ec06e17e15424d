"""Images for evaluation, in the order of their source: files, folders, or a data set of the `datasets` library."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import PIL.Image

from vfmtok_hf.data.files import DATA_FILES, find_images, holds_data_files
from vfmtok_hf.data.sources import cell_bytes, features_of, find_column, load_dataset, without_decoding
from vfmtok_hf.modeling.image_reading_vfmtok import read_image


# An input of the image processor: a file or a decoded image.
Picture: TypeAlias = Path | PIL.Image.Image


def batches_of(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Lists of `batch_size` images; the last one may be shorter."""
    remaining = iter(pictures)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def is_data_set(source: str, split: str | None) -> bool:
    """
    Whether a source is read by the `datasets` library: a split is passed, or its files are data files.

    Raises:
        ValueError: a folder contains both images and data files.
    """
    path = Path(source)
    return split is not None or path.suffix in DATA_FILES or (path.is_dir() and holds_data_files(path))


class DatasetPictures(Iterable[Picture]):
    """
    Images of a data set in its order, decoded when they are read. A stream starts from its beginning each time.

    Args:
        source (`str`): as in `vfmtok_hf.data.sources.open_records`. Labels are not needed.

    Raises (while reading):
        UnreadableImage: an image is damaged or missing; the error names its row.
    """

    def __init__(self, source: str, split: str, image_column: str | None, streaming: bool):
        dataset = load_dataset(source, split, streaming)
        features = features_of(dataset)
        self.column = find_column("image_column", source, features, image_column)
        self.dataset = without_decoding(dataset.select_columns([self.column]), features, self.column)
        self.source = source
        self.count: int | None = None if streaming else len(dataset)

    def __iter__(self) -> Iterator[Picture]:
        for number, row in enumerate(self.dataset):
            name = f"{self.source}, row {number}"
            yield read_image(cell_bytes(row[self.column], name), name)


def open_pictures(
    sources: Sequence[str], split: str | None = None, image_column: str | None = None, streaming: bool = False
) -> Sequence[Path] | DatasetPictures:
    """
    Open the images that a command's arguments select.

    Raises:
        FileNotFoundError: a source does not exist or contains no images.
        ValueError: several data sets, data set options without a data set, or an ambiguous column.
    """
    if not any(is_data_set(source, split) for source in sources):
        if image_column is not None or streaming:
            raise ValueError("--image-column and --streaming are for data sets: pass --split as well.")
        return list(find_images([Path(source) for source in sources]).values())
    if len(sources) > 1:
        raise ValueError(f"Only one data set can be measured at a time, got {', '.join(sources)}.")
    return DatasetPictures(sources[0], split or "train", image_column, streaming)


def number_of(pictures: Sequence[Path] | DatasetPictures) -> int | None:
    """The number of images, or None for a stream."""
    return pictures.count if isinstance(pictures, DatasetPictures) else len(pictures)
