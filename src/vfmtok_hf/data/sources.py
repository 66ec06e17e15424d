"""
Sources of images: class folders, and everything that the `datasets` library reads (parquet, arrow, WebDataset tars,
`imagefolder` with metadata, repositories on the Hub), with random access or as a stream.
"""

import copy
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vfmtok_hf.data.files import (
    DATA_FILES,
    check_source,
    data_files_of,
    files_below,
    has_metadata,
    holds_data_files,
    image_suffixes,
)
from vfmtok_hf.data.fingerprints import json_sha256
from vfmtok_hf.modeling.image_reading_vfmtok import encoded_bytes, read_image


logger = logging.getLogger("vfmtok_hf.data")

# Type and usual names of the columns that arguments name.
COLUMNS = {
    "image_column": ("Image", ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")),
    "label_column": (
        "ClassLabel",
        ("label", "labels", "cls", "class", "class_name", "category", "target", "fine_label"),
    ),
}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
ONE_CLASS = ["image"]  # for images whose labels are not read
END_OF_TAR = 1024  # bytes
NAMED_AT_MOST = 5  # maximum number of rows in one message


class ImageRecords(Sequence):
    """
    Labeled images with random access. An item is the image as read by [`read_image`].

    Args:
        images (sequence): paths, bytes or cells of a data set.
        labels (`list[int]`): class of each record.
        class_names (`list[str]`): name of each class.
        source (`str`): the source, for messages.
        fingerprint (`str`): changes with the images.
        rows (`list[int]`, *optional*): index in `images` of each record. Defaults to all.
        unlabeled (`list[str]`, *optional*): names of images that were left out because they have no label.
    """

    def __init__(
        self,
        images: Sequence,
        labels: list[int],
        class_names: list[str],
        source: str,
        fingerprint: str,
        rows: list[int] | None = None,
        unlabeled: Sequence[str] = (),
    ):
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.source = source
        self.fingerprint = fingerprint
        self.rows = list(range(len(labels))) if rows is None else rows
        self.unlabeled = unlabeled

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> PIL.Image.Image:
        return self.read(index)

    def read(self, index: int, min_side: int | None = None) -> PIL.Image.Image:
        """
        One image; `min_side` as in [`read_image`].

        Raises:
            UnreadableImage: the image is damaged or empty.
            FileNotFoundError: the file is missing, which is not treated as damage.
        """
        return read_image(self.encoded(index), self.name(index), min_side)

    def encoded(self, index: int) -> bytes:
        """The content of an image's file. Raises the errors of `read`."""
        return cell_bytes(self.images[self.rows[index]], self.name(index))

    def name(self, index: int) -> str:
        """Path of the image, or its row if it has no path."""
        return _name_of(self.images[self.rows[index]], self.source, self.rows[index])

    def hold_out(self, share: float, seed: int) -> tuple["ImageRecords", "ImageRecords"]:
        """
        Split into two disjoint parts: the rest, and `share` of each class (at least one image of classes with two or more).

        Raises:
            ValueError: no class has two images.
        """
        rng = np.random.default_rng(seed)
        labels = np.array(self.labels)
        held_out: list[int] = []
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            count = min(max(round(share * len(members)), 1), len(members) - 1)
            held_out += members[:count].tolist()
        if not held_out:
            raise ValueError(
                f"No class of {self.source} has two images, so none can be held out: pass --validation_data."
            )
        chosen = set(held_out)
        rest = self._selected([index for index in range(len(self)) if index not in chosen])
        rest.unlabeled = self.unlabeled
        return rest, self._selected(sorted(chosen))

    def _selected(self, indices: list[int]) -> "ImageRecords":
        selected = copy.copy(self)
        selected.labels = [self.labels[index] for index in indices]
        selected.rows = [self.rows[index] for index in indices]
        selected.fingerprint = json_sha256([self.fingerprint, indices])
        selected.unlabeled = ()
        return selected


def _name_of(image: Any, source: str, row: int) -> str:
    if isinstance(image, Path):
        return str(image)
    path = image.get("path") if isinstance(image, dict) else None
    return f"{source}, row {row}" + (f" ({path})" if path else "")


def cell_bytes(cell: Any, name: str | None = None) -> bytes:
    """[`encoded_bytes`] of a data set's cell, which may also name a file on the Hub or inside an archive."""
    path = cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else None
    if path is not None and "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as file:
            return file.read()
    return encoded_bytes(cell, name)


class _Column(Sequence):
    """Encoded images in a column of a `datasets.Dataset`."""

    def __init__(self, dataset, column: str):
        self.dataset = dataset.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index][self.column]


def read_class_names(file: str | Path | None) -> list[str] | None:
    """
    Read class names from a JSON file with `id2label`, such as a model's config.json.

    Raises:
        ValueError: the file does not number its classes from 0.
    """
    if file is None:
        return None
    names = {
        int(number): name for number, name in json.loads(Path(file).read_text(encoding="utf-8"))["id2label"].items()
    }
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{file} must name the classes from 0 to {len(names) - 1}, got {sorted(names)[:10]}...")
    return [names[number] for number in range(len(names))]


# ---------------------------------------------------------------------------------------------------------------
# Opening


def open_records(
    source: str | Path,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: list[str] | None = None,
    labeled: bool = True,
) -> ImageRecords:
    """
    Open all images of a source with random access.

    Args:
        source: a folder with one folder of images per class; a folder of images with a `metadata.jsonl`, `.csv` or
            `.parquet`; a folder or file (pattern) of parquet, arrow or `.tar` (WebDataset) files; a folder written by
            `Dataset.save_to_disk`; or the name of a data set on the Hub.
        split (`str`): split of a data set of the `datasets` library.
        image_column, label_column (`str`, *optional*): by default, they are found by type and name.
        class_names (`list[str]`, *optional*): for sources that only number their classes. In an image folder, subfolders are
            the classes, in alphabetical order.
        labeled (`bool`): if False, labels are not read and not required, images may be in nested folders, and all images
            have the same class.

    Raises:
        FileNotFoundError: the source does not exist or contains no images.
        ValueError: columns are ambiguous, labels do not match `class_names`, a folder contains images and data files or
            images outside of class folders, or a data file is damaged.
    """
    folder = Path(source)
    if folder.is_dir() and not holds_data_files(folder):
        return _folder_records(folder, class_names, labeled)
    dataset = load_dataset(source, split, streaming=False)
    image_column = find_column("image_column", str(source), dataset.features, image_column)
    images = _Column(without_decoding(dataset, dataset.features, image_column), image_column)
    fingerprint = json_sha256([images.dataset._fingerprint, image_column, len(dataset)])
    if not labeled:
        return ImageRecords(images, [0] * len(dataset), ONE_CLASS, str(source), fingerprint)
    label_column = find_column("label_column", str(source), dataset.features, label_column)
    labels, class_names = _numbered(str(source), dataset, label_column, class_names)
    rows = [row for row, label in enumerate(labels) if label is not None]
    unlabeled = [_name_of(images[row], str(source), row) for row, label in enumerate(labels) if label is None]
    if unlabeled:
        named = ", ".join(unlabeled[:NAMED_AT_MOST]) + (", ..." if len(unlabeled) > NAMED_AT_MOST else "")
        logger.warning("skipping %d images without a label in the column %s: %s", len(unlabeled), label_column, named)
    labels = [labels[row] for row in rows]
    return ImageRecords(images, labels, class_names, str(source), fingerprint, rows, unlabeled)


def _folder_records(folder: Path, class_names: list[str] | None, labeled: bool) -> ImageRecords:
    files = files_below(folder, image_suffixes())
    stray = [file for file in files if file.parent == folder]
    if labeled and stray:
        raise ValueError(
            f"{folder} must contain one folder of images per class ({folder}/class_name/image.png), but {stray[0]} is outside "
            "of them."
        )
    if not files:
        raise FileNotFoundError(
            f"No images in {folder}: expected files like {folder}/class_name/image.png, or {'/'.join(DATA_FILES)} files."
        )
    fingerprint = json_sha256([(str(file.relative_to(folder)), file.stat().st_size) for file in files])
    if not labeled:
        return ImageRecords(files, [0] * len(files), ONE_CLASS, str(folder), fingerprint)
    class_of_file = [file.relative_to(folder).parts[0] for file in files]
    folders = sorted(set(class_of_file))
    if SPLITS.issuperset(name.lower() for name in folders):
        raise ValueError(f"{folder} contains splits ({', '.join(folders)}), not classes: pass one of them.")
    if class_names is not None and len(class_names) != len(folders):
        raise ValueError(f"Got {len(class_names)} class names for the {len(folders)} classes of {folder}: {folders}.")
    numbers = {name: number for number, name in enumerate(folders)}
    labels = [numbers[name] for name in class_of_file]
    return ImageRecords(files, labels, class_names or folders, str(folder), fingerprint)


def load_dataset(source: str | Path, split: str, streaming: bool) -> Any:
    """
    Load a source with the `datasets` library.

    Raises:
        ImportError: the library is not installed.
        FileNotFoundError: the file does not exist, or the folder contains no data.
        ValueError: a data file is truncated or damaged; the error names it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is not a folder of class folders with images. Other sources need the `datasets` library: "
            'pip install "vfmtok-hf[train]".'
        ) from error

    path = Path(source)
    if (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        return dataset.to_iterable_dataset(num_shards=len(dataset.cache_files) or 1) if streaming else dataset
    check_source(source)
    files = data_files_of(source)
    with damage_named(files):
        for file in files:
            if file.suffix == ".tar":
                _check_end_of_tar(file)
        if path.suffix in DATA_FILES:
            kind = DATA_FILES[path.suffix]
            return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
        if path.is_dir() and has_metadata(path):
            _check_metadata(path)
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split, streaming=streaming)
        try:
            return datasets.load_dataset(str(source), split=split, streaming=streaming)
        except (FileNotFoundError, ConnectionError) as error:
            if path.is_dir():
                raise
            raise FileNotFoundError(
                f"There is no folder {source}, and no such data set could be loaded: {error}"
            ) from error


def features_of(dataset: Any) -> Any:
    """Features of a data set. A stream whose source does not state them reads its first rows for it."""
    return dataset.features or dataset._resolve_features().features


@contextmanager
def damage_named(files: Sequence[Path]) -> Iterator[None]:
    """
    Add the name of the damaged file to errors of the `datasets` library.

    Raises:
        ValueError: one of `files` is truncated or damaged.
    """
    try:
        yield
    except Exception as error:
        for file in files:
            try:
                _check_data_file(file)
            except Exception as reason:
                raise ValueError(f"The data file {file} is truncated or damaged: {reason}") from error
        raise


def _check_data_file(file: Path) -> None:
    """Raise unless the structure of a data file is complete. Its values are not read."""
    import pyarrow.ipc
    import pyarrow.parquet

    if file.suffix == ".tar":
        _check_end_of_tar(file)
        with tarfile.open(file) as archive:
            archive.getmembers()
    elif file.suffix == ".parquet":
        pyarrow.parquet.ParquetFile(file).close()
    elif file.suffix == ".arrow":
        with pyarrow.OSFile(str(file)) as opened:
            for _ in pyarrow.ipc.open_stream(opened):
                pass


def _check_metadata(folder: Path) -> None:
    """Raise unless the rows of each `metadata.jsonl` of an `imagefolder` name their files. The library's errors name none."""
    for file in [*folder.glob("metadata.jsonl"), *folder.glob("*/metadata.jsonl")]:
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        except ValueError as error:
            raise ValueError(f"{file} is not JSON, one object a line: {error}") from error
        if not rows or not all(isinstance(row, dict) and any(map(names_files, row)) for row in rows):
            raise ValueError(f"{file} must name an image in the `file_name` of each line.")


def names_files(column: str) -> bool:
    """Whether `imagefolder` takes a column of `metadata.jsonl` for names of files."""
    return column in ("file_name", "file_names") or column.endswith(("_file_name", "_file_names"))


def _check_end_of_tar(file: Path) -> None:
    """Raise unless an archive ends with two zero blocks. Otherwise an archive cut between two members would look complete."""
    with file.open("rb") as opened:
        opened.seek(-min(file.stat().st_size, END_OF_TAR), os.SEEK_END)
        if opened.read() != bytes(END_OF_TAR):
            raise tarfile.ReadError("its end is missing")


def find_column(argument: str, source: str, features: Any, column: str | None) -> str:
    """
    Name of the column that `argument`, `image_column` or `label_column`, means: as passed, else found by type, else by
    name.

    Raises:
        ValueError: the column does not exist, or there are no or several candidates. The error lists all columns.
    """
    type_name, usual_names = COLUMNS[argument]
    types = {name: type(feature).__name__ for name, feature in features.items()}
    columns = ", ".join(
        f"{name} ({features[name].dtype if kind == 'Value' else kind})" for name, kind in types.items()
    )
    if column is not None:
        if column not in features:
            raise ValueError(f"{source} has no column {column!r}: its columns are {columns}. Correct --{argument}.")
        return column
    found = [name for name, kind in types.items() if kind == type_name]
    found = found or [name for name in features if name.lower() in usual_names]
    if len(found) != 1:
        what = "no column" if not found else f"several columns ({', '.join(found)})"
        raise ValueError(f"{source} has {what} for --{argument}: pass one of {columns}.")
    return found[0]


def without_decoding(dataset: Any, features: Any, image_column: str) -> Any:
    """Read images as bytes and decode them ourselves, so that a damaged image does not end the run."""
    import datasets

    if isinstance(features[image_column], datasets.Image):
        return dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def known_class_names(features: Any, label_column: str) -> list[str] | None:
    """The data set's own class names."""
    return getattr(features[label_column], "names", None)


def _numbered(
    source: str, dataset: Any, column: str, class_names: list[str] | None
) -> tuple[list[int | None], list[str]]:
    """Class of each row or None, and the class names: as passed, else the data set's own, else the labels."""
    labels = [label_of(cell, dataset.features[column], source, column) for cell in dataset[column]]
    distinct = sorted({label for label in labels if label is not None})
    if not distinct:
        raise ValueError(f"No row of {source} has a label in its column {column}: check --label_column.")
    class_names = class_names or known_class_names(dataset.features, column)
    if class_names is None and isinstance(distinct[0], int):
        if distinct != list(range(len(distinct))):
            raise ValueError(
                f"The {len(distinct)} labels in the column {column} of {source} are not numbered 0 to "
                f"{len(distinct) - 1}, but go from {distinct[0]} to {distinct[-1]} with gaps: choose another "
                "--label_column, or name all classes with --class_names."
            )
        class_names = [str(number) for number in distinct]
    class_names = class_names or distinct
    numbers = {name: number for number, name in enumerate(class_names)}
    return [label if label is None else class_number(label, numbers, source, column) for label in labels], class_names


def label_of(cell: Any, feature: Any, source: str, column: str) -> int | str | None:
    """
    The label in a cell, a name or a number, or None if the cell is empty: null, NaN, an empty string, or the -1 of the
    library's `ClassLabel`. Tables with empty cells often store integers as floats.

    Raises:
        ValueError: the cell holds something else.
    """
    if cell is None or cell == "" or cell != cell or (cell == -1 and hasattr(feature, "names")):
        return None
    if isinstance(cell, bool) or (isinstance(cell, float) and cell.is_integer()):
        return int(cell)
    if not isinstance(cell, (int, str)):
        raise ValueError(
            f"The column {column} of {source} has no labels: {cell!r} is neither a name nor a number of a class. Choose another "
            "--label_column."
        )
    return cell


def class_number(label: int | str, numbers: dict[str, int], source: str, column: str) -> int:
    """
    The class of a label, which is a class name or number.

    Raises:
        ValueError: there is no such class.
    """
    if isinstance(label, int) and 0 <= label < len(numbers):
        return label
    if label not in numbers:
        raise ValueError(
            f"{source} has the label {label!r} in its column {column}, which is none of its {len(numbers)} classes "
            f"({', '.join(list(numbers)[:5])}, ...): check --label_column and --class_names."
        )
    return numbers[label]
