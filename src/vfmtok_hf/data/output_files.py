"""Files that appear whole or not at all, checked for being writable before any work is done."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def is_picture(path: Path) -> bool:
    """Whether a path names a picture to write, rather than a folder for many."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def check_output_file(path: Path) -> None:
    """
    Raise unless the file can be written. Nothing is left behind; missing folders are made when it is written.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: a folder on the way is a file or does not admit new files.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it.")
    _check_folder(path.absolute().parent, path)


def check_picture_output(path: Path) -> None:
    """The same for a picture, or else for a folder of pictures, which may exist already."""
    if is_picture(path):
        check_output_file(path)
    else:
        check_output_folder(path)


def check_output_folder(path: Path) -> None:
    """The same for a folder of any files, which may exist already."""
    _check_folder(path.absolute(), path)


def _check_folder(folder: Path, output: Path) -> None:
    existing = next(ancestor for ancestor in (folder, *folder.parents) if ancestor.exists())
    try:
        # Asking the file system beats reading permission bits, which know nothing of read-only mounts.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise type(error)(f"{output} cannot be written: {existing} {_reason(existing, error)}.") from error


def _reason(existing: Path, error: OSError) -> str:
    if not existing.is_dir():
        return "is a file, not a folder"
    return f"does not admit new files ({error.strerror})"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write into. It becomes `path` when the block ends, or vanishes if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(picture: PIL.Image.Image, path: Path) -> None:
    """Write a picture whole; the suffix decides on the format."""
    with whole_file(path) as temporary:
        picture.save(temporary)
