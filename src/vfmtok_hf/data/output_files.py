"""Write files and folders atomically, and check in advance that they can be written."""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import PIL.Image


MAX_NAME_BYTES = 255  # limit of a file name on most file systems
TOKEN_FILE_SUFFIXES = (".safetensors", ".npy", ".parquet")
MODEL_FILES = ("config.json", "model_index.json")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def is_picture(path: Path) -> bool:
    """Whether a path is an image file to write, not a folder."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def check_output_file(path: Path) -> None:
    """
    Raise unless the file can be written. Nothing is left behind; missing folders are created when it is written.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: a parent folder is a file or not writable.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: pass a file in it.")
    _check_folder(path.absolute().parent, path)


def check_picture_output(path: Path) -> None:
    """
    The same for an image file, or for a folder of images, which may exist.

    Raises:
        ValueError: the suffix of `path` is that of another format of images.
    """
    if is_picture(path):
        check_output_file(path)
    elif path.suffix and not path.is_dir() and path.suffix.lower() in PIL.Image.registered_extensions():
        raise ValueError(f"Image files end in {' or '.join(PICTURE_SUFFIXES)}, got {path.name!r}.")
    else:
        check_output_folder(path)


def check_output_folder(path: Path) -> None:
    """The same for a folder of any files, which may exist."""
    _check_folder(path.absolute(), path)


def check_token_suffix(path: Path) -> None:
    """
    Check in advance that a token file of this type can be written.

    Raises:
        ValueError: the suffix of `path` is not that of a token file.
        ImportError: `.parquet` without the `datasets` library.
    """
    if path.suffix not in TOKEN_FILE_SUFFIXES:
        raise ValueError(f"Token files end in {' or '.join(TOKEN_FILE_SUFFIXES)}, got {path.name!r}.")
    if path.suffix == ".parquet" and find_spec("datasets") is None:
        raise ImportError(f'{path.name} needs the `datasets` library: pip install "vfmtok-hf[train]".')


def check_model_folder(path: Path, overwrite: bool | None = None) -> None:
    """
    The same for a model folder, which must be new, empty, or a model folder that may be replaced.

    Args:
        path (`Path`): the folder.
        overwrite (`bool`, *optional*): whether a model folder may be replaced. `None`: no, and the error does not offer it.

    Raises:
        FileExistsError: something that must not be replaced exists.
        OSError: a parent folder is a file or not writable.
    """
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            cure = "delete" if overwrite is None else "overwrite"
            raise FileExistsError(f"{path} exists and is not empty: choose another output, or {cure} it.")
        if not any((path / name).exists() for name in MODEL_FILES):
            raise FileExistsError(
                f"{path} has no {' or '.join(MODEL_FILES)}, so it is not a model folder and will not be overwritten."
            )
    elif path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; the output is a folder.")
    _check_folder(path.absolute().parent, path)


def _check_folder(folder: Path, output: Path) -> None:
    existing = next(ancestor for ancestor in (folder, *folder.parents) if ancestor.exists())
    try:
        # Try it, because permission bits do not show read-only mounts.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise type(error)(f"{output} cannot be written: {existing} {_reason(existing, error)}.") from error


def _reason(existing: Path, error: OSError) -> str:
    if not existing.is_dir():
        return "is a file, not a folder"
    return f"is not writable ({error.strerror})"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to. It is renamed to `path` when the block ends, or deleted if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the file's own name, which can have the maximum length. The suffix selects the format.
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial{path.suffix[:16]}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, overwrite: bool | None = None) -> Iterator[Path]:
    """
    The same for a model folder, whose files are written to a temporary sibling. Raises the errors of
    [`check_model_folder`].
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
    """A file name that is not too long: unchanged, or cut and extended with a checksum of the full name."""
    encoded = os.fsencode(file_name)
    if len(encoded) <= MAX_NAME_BYTES:
        return file_name
    stem, suffix = os.path.splitext(file_name)
    ending = f"-{hashlib.sha256(encoded).hexdigest()[:8]}{suffix}"
    return os.fsencode(stem)[: MAX_NAME_BYTES - len(os.fsencode(ending))].decode(errors="ignore") + ending


def picture_names(names: Sequence[str]) -> list[str]:
    """
    The PNG file of each image, relative to a folder.

    Raises:
        ValueError: a name points outside of the folder, or two images would get the same file.
    """
    images: dict[str, str] = {}
    for name in names:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"The image name {name!r} points outside of the output folder.")
        file = path.with_name(fitting(path.name if path.suffix.lower() == ".png" else f"{path.name}.png")).as_posix()
        if file in images:
            raise ValueError(
                f"The images {images[file]!r} and {name!r} would both be written to {file}: process them separately."
            )
        images[file] = name
    for file, name in images.items():
        for folder in (parent.as_posix() for parent in Path(file).parents):
            if folder in images:
                raise ValueError(
                    f"The image {images[folder]!r} would be written to {folder}, which is the folder of {name!r}: process them "
                    "separately."
                )
    return list(images)


def save_picture(picture: PIL.Image.Image, path: Path) -> None:
    """Write an image atomically. The suffix selects the format."""
    with whole_file(path) as temporary:
        picture.save(temporary)
