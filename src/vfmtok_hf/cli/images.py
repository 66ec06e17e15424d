"""What `vfmtok evaluate` reads its images from: files and folders of them, or a data set of the `datasets` library."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from vfmtok_hf.data.token_files import find_images
from vfmtok_hf.evaluation.images import Picture
from vfmtok_hf.evaluation.linear_probe import LabeledImages
from vfmtok_hf.training.images import IMAGE_SUFFIXES
from vfmtok_hf.training.sources import (
    DATA_FILES,
    ImageRecords,
    encoded_bytes,
    find_image_column,
    load_dataset,
    open_records,
)


def is_data_set(source: str, split: str | None) -> bool:
    """
    Whether the `datasets` library is to read it: a split is named, or its files are parquet, arrow or `.tar`.

    Raises:
        ValueError: a folder that holds both images and data files.
    """
    path = Path(source)
    if split is not None or path.suffix in DATA_FILES or (path / "state.json").is_file():
        return True
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower() for file in path.rglob("*")}
    if suffixes & set(DATA_FILES) and suffixes & IMAGE_SUFFIXES:
        raise ValueError(f"{source} holds both images and data files: name the folders or files that you mean.")
    return bool(suffixes & set(DATA_FILES))


def decode_picture(encoded: Any, name: str) -> PIL.Image.Image:
    """
    An image of a data set, as `open_image` reads one from a file.

    Raises:
        ValueError: it is damaged, or no image.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded_bytes(encoded))) as image:
            image.load()
            return image
    except (OSError, SyntaxError, TypeError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


class DatasetPictures(Iterable[Picture]):
    """
    Pictures of a data set, in its order, decoded as they are read. A stream is read from its beginning each time.

    Args:
        source (`str`): as of `vfmtok_hf.training.sources.open_records`. It needs no labels.
    """

    def __init__(self, source: str, split: str, image_column: str | None, streaming: bool):
        dataset = load_dataset(source, split, streaming)
        import datasets  # not sooner: load_dataset says how to install it

        features = dataset.features or dataset._resolve_features().features
        self.column = find_image_column(source, features, image_column)
        self.dataset = dataset.select_columns([self.column])
        if isinstance(features[self.column], datasets.Image):
            self.dataset = self.dataset.cast_column(self.column, datasets.Image(decode=False))
        self.source = source
        self.count: int | None = None if streaming else len(dataset)

    def __iter__(self) -> Iterator[Picture]:
        for number, row in enumerate(self.dataset):
            yield decode_picture(row[self.column], f"{self.source}, row {number}")


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


class RecordPictures(Sequence[Picture]):
    """Pictures of labeled records, in any order, decoded as they are read."""

    def __init__(self, records: ImageRecords):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number):
        return decode_picture(self.records.images[number], self.records.name(number))


def open_labeled(
    source: str, split: str | None, default_split: str, image_column: str | None, label_column: str | None
) -> LabeledImages:
    """Images with classes: a folder of class folders, or a data set."""
    if not is_data_set(source, split):
        return LabeledImages.of_folder(Path(source))
    records = open_records(source, split or default_split, image_column, label_column)
    return LabeledImages(RecordPictures(records), records.labels, records.class_names, source)
