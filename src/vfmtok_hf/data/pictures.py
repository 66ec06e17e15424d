"""Images to measure, in the order of their source: files and folders of them, or a data set of the `datasets` library."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import PIL.Image

from vfmtok_hf.data.files import DATA_FILES, find_images, holds_data_files
from vfmtok_hf.data.sources import cell_bytes, features_of, find_image_column, load_dataset, without_decoding
from vfmtok_hf.modeling.image_reading_vfmtok import read_image


# What the image processor reads: a file, or an image that is already decoded.
Picture: TypeAlias = Path | PIL.Image.Image


def batches_of(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Lists of `batch_size` pictures, the last one perhaps shorter."""
    remaining = iter(pictures)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def is_data_set(source: str, split: str | None) -> bool:
    """
    Whether the `datasets` library is to read it: a split is named, or its files are for that library.

    Raises:
        ValueError: a folder that holds both images and data files.
    """
    path = Path(source)
    return split is not None or path.suffix in DATA_FILES or (path.is_dir() and holds_data_files(path))


class DatasetPictures(Iterable[Picture]):
    """
    Pictures of a data set, in its order, decoded as they are read. A stream is read from its beginning each time.

    Args:
        source (`str`): as of `vfmtok_hf.data.sources.open_records`. It needs no labels.

    Raises (while reading):
        UnreadableImage: a damaged or missing image; the message names its row.
    """

    def __init__(self, source: str, split: str, image_column: str | None, streaming: bool):
        dataset = load_dataset(source, split, streaming)
        features = features_of(dataset)
        self.column = find_image_column(source, features, image_column)
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
    The images that a command's arguments mean.

    Raises:
        FileNotFoundError: a source does not exist, or holds no images.
        ValueError: several data sets, options of data sets for what is none, or a column that cannot be told.
    """
    if not any(is_data_set(source, split) for source in sources):
        if image_column is not None or streaming:
            raise ValueError("--image-column and --streaming are for data sets: name their --split too.")
        return list(find_images([Path(source) for source in sources]).values())
    if len(sources) > 1:
        raise ValueError(f"Of data sets one at a time can be measured, got {', '.join(sources)}.")
    return DatasetPictures(sources[0], split or "train", image_column, streaming)


def number_of(pictures: Sequence[Path] | DatasetPictures) -> int | None:
    """How many; of a stream it is not known."""
    return pictures.count if isinstance(pictures, DatasetPictures) else len(pictures)
