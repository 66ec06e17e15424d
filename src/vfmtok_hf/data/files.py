"""
Find image and data files in folders, and check that sources and models exist. All code that walks a folder uses these
rules.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

import PIL.Image
from PIL.ImageFile import StubImageFile


try:
    from pillow_heif import register_heif_opener
except ImportError:  # HEIC files are still found, and the reader's error names the package
    pass
else:
    register_heif_opener()

DATA_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of the library's `imagefolder`
# Formats that Pillow recognizes but cannot decode by itself. Its stubs, such as HDF5, declare that themselves.
NOT_DECODED = {"MPEG", "EPS"}
# Folders, besides hidden ones, in which operating systems and network drives keep copies of images and deleted files.
LEFTOVER_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the formats that Pillow can open and decode, and of HEIC."""
    PIL.Image.init()
    suffixes = {".heic", ".heif"}
    for suffix, image_format in PIL.Image.EXTENSION.items():
        factory = PIL.Image.OPEN.get(image_format, (StubImageFile,))[0]
        is_stub = isinstance(factory, type) and issubclass(factory, StubImageFile)
        if not is_stub and image_format not in NOT_DECODED:
            suffixes.add(suffix)
    return frozenset(suffixes)


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """
    All files below a folder that end in one of `suffixes` in any case, sorted by path.

    Hidden files and folders (`.ipynb_checkpoints`, `._photo.jpg`) and those of `LEFTOVER_FOLDERS` are ignored.
    Symbolic links are followed, except those that lead back to a parent folder.
    """
    return sorted(_walk(folder, suffixes, above=()))


def _walk(folder: Path, suffixes: Collection[str], above: tuple[str, ...]) -> Iterator[Path]:
    place = os.path.realpath(folder)
    if place in above:
        return
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in LEFTOVER_FOLDERS:
            continue
        # The entry knows its type without another system call, unless it is a link.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(Path(entry.path), suffixes, (*above, place))
        elif os.path.splitext(entry.name)[1].lower() in suffixes:
            yield Path(entry.path)


def find_images(paths: Sequence[Path]) -> dict[str, Path]:
    """
    Image files by name: the given files and all files below the given folders, sorted. A file in a folder is named by its path
    in that folder.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image.
        ValueError: two images have the same name.
    """
    images: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        for file in files_below(path, image_suffixes()) if path.is_dir() else [path]:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            if name in images:
                raise ValueError(f"Both {images[name]} and {file} would be named {name}: process them separately.")
            images[name] = file
    if not images:
        raise FileNotFoundError(f"There are no images in {', '.join(map(str, paths))}.")
    return images


def holds_data_files(folder: Path) -> bool:
    """
    Whether a folder is a data set of the `datasets` library: it contains parquet, arrow or `.tar` files, or images with metadata.

    Raises:
        ValueError: it contains both images and data files.
    """
    if (folder / "state.json").is_file() or has_metadata(folder):  # the former is from `Dataset.save_to_disk`
        return True
    suffixes = {file.suffix.lower() for file in files_below(folder, image_suffixes().union(DATA_FILES))}
    if suffixes.isdisjoint(DATA_FILES):
        return False
    if suffixes - set(DATA_FILES):
        raise ValueError(f"{folder} contains both images and data files. Pass the folder or the files that you mean.")
    return True


def has_metadata(folder: Path) -> bool:
    """Whether a folder, or the folder of a split in it, is an `imagefolder` with a metadata file."""
    return any(file.is_file() for name in METADATA_FILES for file in (folder / name, *folder.glob(f"*/{name}")))


def data_files_of(source: str | Path) -> list[Path]:
    """Local files of a source of the `datasets` library: a folder, a file name or a pattern."""
    path = Path(source)
    if path.is_dir():
        return files_below(path, DATA_FILES)
    return sorted(path.parent.glob(path.name)) if path.suffix in DATA_FILES else []


# ---------------------------------------------------------------------------------------------------------------
# Names that may be paths or repositories


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: a repository is `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_source(source: str | Path) -> None:
    """
    Raise `FileNotFoundError` unless a source of images can exist: data files, a folder, or a data set on the Hub. Only
    for a name without an owner, which is probably a misspelled folder, the Hub is asked.
    """
    name, path = str(source), Path(source)
    if path.exists() or data_files_of(source):
        return
    if path.suffix in DATA_FILES:
        raise FileNotFoundError(f"There is no data file {source}.")
    if looks_like_path(name):
        raise FileNotFoundError(f"There is no data folder {source}.")
    if "/" not in name:
        _check_repository(name, "dataset")


def check_file(path: str | Path) -> None:
    """Raise `FileNotFoundError` unless a file exists."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")


def check_model(name_or_path: str) -> None:
    """Like [`check_source`], for a folder or repository of a model or pipeline."""
    if Path(name_or_path).is_dir():
        return
    if looks_like_path(name_or_path):
        raise FileNotFoundError(f"There is no model folder {name_or_path}.")
    if "/" not in name_or_path:
        _check_repository(name_or_path, "model")


def _check_repository(name: str, kind: str) -> None:
    """Ask the Hub once, where transformers and `datasets` retry for a minute if it cannot be reached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"There is no folder {name}, and the Hub has no {kind} of that name.") from error
    except (HTTPError, OSError) as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and the Hub cannot be reached. HF_HUB_OFFLINE=1 looks for a {kind} in the cache."
        ) from error
