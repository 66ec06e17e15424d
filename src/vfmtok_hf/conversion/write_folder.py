"""Folders that appear whole or not at all."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: Path, overwrite: bool) -> None:
    """
    Whether a folder may be written, asked before the work begins.

    Raises:
        FileExistsError: something is there that may not be replaced.
        PermissionError, NotADirectoryError: its parent cannot be written to.
    """
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{output} exists and is not empty: choose another output or pass overwrite=True.")
        if not (output / "config.json").exists():
            raise FileExistsError(
                f"{output} has no config.json, so it is no model folder and will not be overwritten."
            )
    elif output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; the output is a folder.")
    ancestor = next(parent for parent in output.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise NotADirectoryError(f"{ancestor} is a file, so {output} cannot be made in it: choose another output.")
    try:
        # Asking the file system beats reading permission bits, which know nothing of read-only mounts.
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise PermissionError(f"{ancestor} is not writable ({error.strerror}): choose another output.") from error


@contextmanager
def whole_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to write into. It takes the place of `output` when the block ends, or vanishes if it fails."""
    check_output(output, overwrite)
    output = output.absolute()
    tag = uuid.uuid4().hex[:8]
    temporary = output.with_name(f".{output.name}.{tag}.partial")
    replaced = output.with_name(f".{output.name}.{tag}.replaced")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if output.exists():
            output.rename(replaced)
        try:
            temporary.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
