"""Files and folders that appear whole or not at all, checked for being writable before any work is done."""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import PIL.Image


MAX_NAME_BYTES = 255  # of a file name, on most file systems
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


def check_model_folder(path: Path, overwrite: bool = False) -> None:
    """
    The same for the folder of a model, which must be new or empty, or a model's that may be replaced.

    Raises:
        FileExistsError: something is there that may not be replaced.
        OSError: a folder on the way is a file or does not admit new files.
    """
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{path} exists and is not empty: choose another output or pass overwrite=True.")
        if not (path / "config.json").exists():
            raise FileExistsError(f"{path} has no config.json, so it is no model folder and will not be overwritten.")
    elif path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; the output is a folder.")
    _check_folder(path.absolute().parent, path)


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
    # Without the file's own name, which may be as long as names can be; the suffix decides on the format.
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial{path.suffix[:16]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """
    The same for the folder of a model, whose files are written into a temporary sibling; raises what
    [`check_model_folder`] raises.
    """
    check_model_folder(path, overwrite)
    path = path.absolute()
    tag = uuid.uuid4().hex
    temporary, replaced = path.with_name(f".{tag}.partial"), path.with_name(f".{tag}.replaced")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def fitting(file_name: str) -> str:
    """A file name that is not too long: as it is, or cut and with a digest of the whole one."""
    encoded = file_name.encode()
    if len(encoded) <= MAX_NAME_BYTES:
        return file_name
    stem, suffix = os.path.splitext(file_name)
    ending = f"-{hashlib.sha256(encoded).hexdigest()[:8]}{suffix}"
    return stem.encode()[: MAX_NAME_BYTES - len(ending.encode())].decode(errors="ignore") + ending


def picture_names(names: Sequence[str]) -> list[str]:
    """
    The PNG file, relative to a folder, of each image.

    Raises:
        ValueError: a name points out of the folder, or two images would get one file.
    """
    images: dict[str, str] = {}
    for name in names:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"The image name {name!r} points out of the output folder.")
        file = path.with_name(fitting(path.name if path.suffix.lower() == ".png" else f"{path.name}.png")).as_posix()
        if file in images:
            raise ValueError(
                f"The images {images[file]!r} and {name!r} would both become {file}: take them one at a time."
            )
        images[file] = name
    for file, name in images.items():
        for folder in (parent.as_posix() for parent in Path(file).parents):
            if folder in images:
                raise ValueError(
                    f"The image {images[folder]!r} would become {folder}, which is a folder for {name!r}: take them one at a "
                    "time."
                )
    return list(images)


def save_picture(picture: PIL.Image.Image, path: Path) -> None:
    """Write a picture whole; the suffix decides on the format."""
    with whole_file(path) as temporary:
        picture.save(temporary)
