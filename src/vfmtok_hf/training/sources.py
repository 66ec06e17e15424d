"""
Where training images come from: folders of classes, and whatever the `datasets` library reads (parquet, arrow,
WebDataset tars, repositories of the Hub), at random or as a stream.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vfmtok_hf.training.images import IMAGE_SUFFIXES


DATA_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_name", "category", "target", "fine_label")
ONE_CLASS = ["image"]  # of images whose labels are not read


class ImageRecords:
    """
    Labelled images, still encoded, by number.

    Args:
        images (sequence): of what [`encoded_bytes`] understands.
        labels (`list[int]`): class of each image.
        class_names (`list[str]`): name of each class.
        source (`str`): where they are from, for messages.
        fingerprint (`str`): changes with the images.
    """

    def __init__(self, images: Sequence, labels: list[int], class_names: list[str], source: str, fingerprint: str):
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.source = source
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        return encoded_bytes(self.images[index])

    def name(self, index: int) -> str:
        """Path of the image, or its number where it has none."""
        image = self.images[index]
        if isinstance(image, Path):
            return str(image)
        path = image.get("path") if isinstance(image, dict) else None
        return f"{self.source}, row {index}" + (f" ({path})" if path else "")

    def hold_out(self, share: float, seed: int) -> tuple["ImageRecords", "ImageRecords"]:
        """
        Two disjoint parts: the rest, and `share` of each class (at least one image if it has two).

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
            raise ValueError(f"No class of {self.source} has two images, to hold one out: give --validation_data.")
        chosen = set(held_out)
        return (
            self._selected([index for index in range(len(self)) if index not in chosen]),
            self._selected(sorted(chosen)),
        )

    def _selected(self, indices: list[int]) -> "ImageRecords":
        selected = copy.copy(self)
        selected.images = _Selected(self.images, indices)
        selected.labels = [self.labels[index] for index in indices]
        selected.fingerprint = _sha256([self.fingerprint, indices])
        return selected


class _Selected(Sequence):
    def __init__(self, images: Sequence, indices: list[int]):
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        return self.images[self.indices[index]]


class _Column(Sequence):
    """Encoded images of a column of a `datasets.Dataset`."""

    def __init__(self, dataset, column: str):
        self.dataset = dataset.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index][self.column]


def read_class_names(file: str | Path | None) -> list[str] | None:
    """
    Names of the classes in a JSON file with `id2label`, such as a model's config.json.

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


def encoded_bytes(image: Path | str | bytes | dict) -> bytes:
    """Bytes of an image file: given as a path, as they are, or as `datasets` stores images."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Opening


def open_records(
    source: str | Path,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: list[str] | None = None,
    labelled: bool = True,
) -> ImageRecords:
    """
    All images of a source, readable in any order.

    Args:
        source: folder with one folder of images per class; or folder or file (pattern) of parquet, arrow or `.tar`
            (WebDataset) files; or folder by `Dataset.save_to_disk`; or the name of a data set repository.
        split (`str`): of what the `datasets` library reads.
        image_column, label_column (`str`, *optional*): found by type and name if not given.
        class_names (`list[str]`, *optional*): for sources that have numbers only. The folders of an image folder are
            its classes, in alphabetical order.
        labelled (`bool`): False reads no labels: there need be none, images of a folder may lie at any depth, and all
            are of one class.

    Raises:
        FileNotFoundError: there is no such source, or it holds no images.
        ValueError: columns cannot be told, labels do not fit `class_names`, or a folder holds images and data files.
    """
    folder = Path(source)
    candidates = sorted(folder.glob("*/*" if labelled else "**/*"))
    files = [file for file in candidates if file.suffix.lower() in IMAGE_SUFFIXES]
    if files:
        if any(file.suffix in DATA_FILES for file in (*folder.glob("*"), *candidates)):
            raise ValueError(f"{source} holds both images and data files: name the folder or the files that you mean.")
        return _folder_records(folder, files, class_names, labelled)
    dataset = load_dataset(source, split, streaming=False)
    image_column = find_image_column(str(source), dataset.features, image_column)
    if labelled:
        label_column = find_label_column(str(source), dataset.features, label_column)
        labels, class_names = _numbered(str(source), dataset, label_column, class_names)
    else:
        labels, class_names = [0] * len(dataset), ONE_CLASS
    dataset = _without_decoding(dataset, image_column)
    fingerprint = _sha256([dataset._fingerprint, image_column, len(dataset)])
    return ImageRecords(_Column(dataset, image_column), labels, class_names, str(source), fingerprint)


def _folder_records(folder: Path, files: list[Path], class_names: list[str] | None, labelled: bool) -> ImageRecords:
    sizes = [(str(file.relative_to(folder)), file.stat().st_size) for file in files]
    fingerprint = _sha256(sizes)
    if not labelled:
        return ImageRecords(files, [0] * len(files), ONE_CLASS, str(folder), fingerprint)
    folders = sorted({file.parent.name for file in files})
    if class_names is not None and len(class_names) != len(folders):
        raise ValueError(f"Got {len(class_names)} class names for the {len(folders)} classes of {folder}: {folders}.")
    numbers = {name: number for number, name in enumerate(folders)}
    labels = [numbers[file.parent.name] for file in files]
    return ImageRecords(files, labels, class_names or folders, str(folder), fingerprint)


def load_dataset(source: str | Path, split: str, streaming: bool) -> Any:
    """
    What the `datasets` library makes of a source.

    Raises:
        ImportError: the library is not installed.
        FileNotFoundError: a folder without data, or no such file.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is not a folder of class folders with images. Anything else is read by the `datasets` library: "
            'pip install "vfmtok-hf[train]".'
        ) from error

    path = Path(source)
    if (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        return dataset.to_iterable_dataset(num_shards=len(dataset.cache_files) or 1) if streaming else dataset
    kind = DATA_FILES.get(path.suffix)
    if kind is not None:
        if not list(path.parent.glob(path.name)):
            raise FileNotFoundError(f"There is no data file {source}.")
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
    if path.is_dir() and not any(file for suffix in DATA_FILES for file in path.rglob(f"*{suffix}")):
        raise FileNotFoundError(
            f"No images in {source}: expected files like {source}/class_name/image.png, or {'/'.join(DATA_FILES)} "
            "files."
        )
    if not path.exists() and (path.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1):
        raise FileNotFoundError(f"There is no data folder {source}.")
    return datasets.load_dataset(str(source), split=split, streaming=streaming)


def find_image_column(source: str, features: Any, column: str | None) -> str:
    """
    Name of the column with images: the one given, else by type, else by name.

    Raises:
        ValueError: a given column is not there, or none or several could be meant. Lists all columns.
    """
    import datasets

    return _find_column(source, features, column, "image_column", datasets.Image, IMAGE_COLUMNS)


def find_label_column(source: str, features: Any, column: str | None) -> str:
    """The same for the column with labels."""
    import datasets

    return _find_column(source, features, column, "label_column", datasets.ClassLabel, LABEL_COLUMNS)


def _find_column(
    source: str, features: Any, column: str | None, argument: str, feature_class: type, known_names: Sequence[str]
) -> str:
    columns = ", ".join(f"{name} ({type_name(feature)})" for name, feature in features.items())
    if column is not None:
        if column not in features:
            raise ValueError(f"{source} has no column {column!r}: its columns are {columns}. Correct --{argument}.")
        return column
    found = [name for name, feature in features.items() if isinstance(feature, feature_class)]
    found = found or [name for name in features if name.lower() in known_names]
    if len(found) != 1:
        what = "no column" if not found else f"several columns ({', '.join(found)})"
        raise ValueError(f"{source} has {what} to take for --{argument}: name one of {columns}.")
    return found[0]


def type_name(feature: Any) -> str:
    return getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__


def _without_decoding(dataset: Any, image_column: str) -> Any:
    """Images as bytes: decoding is ours, so that damage to one of them does not end the run."""
    import datasets

    if isinstance(dataset.features[image_column], datasets.Image):
        return dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


def known_class_names(features: Any, label_column: str) -> list[str] | None:
    """Names that the data set itself has for its classes."""
    return getattr(features[label_column], "names", None)


def _numbered(source: str, dataset: Any, column: str, class_names: list[str] | None) -> tuple[list[int], list[str]]:
    """Class of each row, and the names: given, or the data set's own, or the labels themselves."""
    labels = list(dataset[column])
    class_names = class_names or known_class_names(dataset.features, column)
    if class_names is None:
        distinct = sorted(set(labels))
        class_names = [str(number) for number in range(distinct[-1] + 1)] if isinstance(distinct[0], int) else distinct
    numbers = {name: number for number, name in enumerate(class_names)}
    return [class_number(label, numbers, source, column) for label in labels], class_names


def class_number(label: int | str, numbers: dict[str, int], source: str, column: str) -> int:
    """
    The class of a label, which is its name or its number.

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
