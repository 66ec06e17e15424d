"""Shared parts of the commands: options, consoles, progress, one-line errors, and loading a pipeline."""

import glob
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


if TYPE_CHECKING:
    from vfmtok_hf.pipelines import VFMTokDiTPipeline, VFMTokPipeline


LOG_INTERVAL = 30  # seconds between two lines of progress where there is no terminal
MAX_SEED = 2**63 - 1  # as in the server's requests; torch's limit is 2**64 - 1, so any image's seed + i fits

output_console = Console()
error_console = Console(stderr=True)


class Stopwatch:
    """The seconds that the work of a command takes: without imports and loading, after which it is restarted."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


stopwatch = Stopwatch()


class Dtype(str, Enum):
    """Precision of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def output_path(value: str | Path) -> Path:
    """An output as a path. The empty one, as from an unset variable of a shell, would be the current folder."""
    if value == "":
        raise typer.BadParameter("is empty: pass a file or a folder, such as '.'.")
    return Path(value)


def output_option(help: str) -> Any:
    """The option `--output` of a command."""
    return typer.Option("--output", "-o", parser=output_path, metavar="PATH", help=help)


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Pipeline folder or repository. *Default: the emoji checkpoint of the package.*"
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Such as `cpu` or `cuda:1`. *Default: the accelerator, if available.*")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the models.")]
BatchSizeOption = Annotated[
    int, typer.Option(min=1, help="Images per batch. It limits memory and, in float32, does not change tokens.")
]
PicturesOption = Annotated[
    Path,
    output_option("An image file (`.png`, `.jpg`, `.jpeg`, `.webp`) for one grid, or a folder for single files."),
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Image files and folders.", show_default=False)]


@contextmanager
def one_line_errors(extra: str = "pipeline") -> Iterator[None]:
    """
    Convert expected errors to one line on stderr and exit code 1.

    Args:
        extra (`str`): the extra that installs what the command imports.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason += f': pip install "vfmtok-hf[{extra}]"'
        error_console.print(f"Error: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def requires(is_good: Callable[[float], bool], message: str) -> Callable[[float | None], float | None]:
    """A callback that validates an option if it is set."""

    def check(value: float | None) -> float | None:
        if value is not None and not is_good(value):
            raise typer.BadParameter(message)
        return value

    return check


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """
    Progress on stderr: on a terminal a bar that disappears when done, elsewhere a line every 30 seconds. Yields the
    function that advances it.
    """
    if not error_console.is_terminal:
        yield ProgressLines(description, total).advance
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=error_console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


class ProgressLines:
    """Progress for a log."""

    def __init__(self, description: str, total: int | None):
        self.description, self.total, self.done = description, total, 0
        self.started = self.last_line = time.perf_counter()

    def advance(self, steps: int) -> None:
        self.done += steps
        now = time.perf_counter()
        if now - self.last_line < LOG_INTERVAL:
            return
        self.last_line = now
        line = f"{self.description}: {self.done}"
        if self.total:
            left = (now - self.started) * (self.total - self.done) / self.done
            line += f" of {self.total} ({self.done / self.total:.0%}), {left / 60:.1f} min left"
        error_console.print(line, markup=False, highlight=False, soft_wrap=True)


def resolve_model(model: str | None) -> str:
    """The folder or repository of a name, by default the emoji checkpoint. Raises `FileNotFoundError` if there is none."""
    import vfmtok_hf
    from vfmtok_hf.data.files import check_model

    name_or_path = model or vfmtok_hf.DEFAULT_CHECKPOINT
    check_model(name_or_path)
    return name_or_path


def check_sources(sources: Sequence[str], split: str | None) -> None:
    """Raise if images are neither files nor folders. With a split, and by a pattern, the `datasets` library looks for them."""
    for source in sources:
        if split is None and not glob.has_magic(source) and not Path(source).exists():
            raise FileNotFoundError(f"There is no file or folder {source}.")


def saved_classes(name_or_path: str) -> tuple[dict[int, str], int] | None:
    """
    Names and number of the classes of a pipeline, from its JSON files alone. None unless it is a folder with a generator.

    Raises:
        ValueError: the generator's configuration is damaged, or of another model.
    """
    file = Path(name_or_path) / "transformer" / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if "num_classes" not in config:
        raise ValueError(f"{name_or_path} is not a VFMTok pipeline: {file} has no num_classes.")
    return {int(number): name for number, name in (config.get("id2label") or {}).items()}, config["num_classes"]


def load_pipeline(
    model: str | None,
    device: str | None,
    dtype: Dtype,
    generates: bool = False,
    encodes: bool = False,
    reconstructs: bool = False,
) -> "VFMTokPipeline | VFMTokDiTPipeline":
    """The pipeline, by default the emoji checkpoint, on its device. Arguments as in `loading.load_pipeline`."""
    name_or_path = resolve_model(model)
    quiet_libraries()

    from vfmtok_hf.pipelines import loading

    pipe = loading.load_pipeline(name_or_path, device, dtype.value, generates, encodes, reconstructs)
    stopwatch.restart()
    return pipe


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars, and warnings about packages that no command needs."""
    from vfmtok_hf.training.scripts import quiet_imports

    quiet_imports()

    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def report_written(count: int, what: str, output: Path) -> None:
    text = f"{count} {what}{'' if count == 1 else 's'} in {stopwatch.seconds:.1f} s: {output}"
    output_console.print(text, markup=False, highlight=False, soft_wrap=True)


def report_skipped(reason: str) -> None:
    error_console.print(f"Skipped: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
