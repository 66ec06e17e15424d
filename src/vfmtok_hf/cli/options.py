"""What the commands of `vfmtok` share: options, the two consoles, progress, errors in one line, and loading a pipeline."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


if TYPE_CHECKING:
    from vfmtok_hf.pipelines import VFMTokDiTPipeline, VFMTokPipeline


STARTED = time.perf_counter()

output_console = Console()
error_console = Console(stderr=True)


class Dtype(str, Enum):
    """Precision of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Pipeline folder or repository. *Default: the checkpoint in this package.*"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Such as `cpu` or `cuda:1`. *Default: the accelerator, if there is one.*")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the models.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images at once. It bounds memory and changes no result.")]
PicturesOption = Annotated[
    Path, typer.Option("--output", "-o", help="A picture for one grid, or a folder for single files.")
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Image files, and folders of them.", show_default=False)]


@contextmanager
def one_line_errors(extra: str = "pipeline") -> Iterator[None]:
    """
    Turn what can go wrong outside this program into one line on stderr and exit code 1.

    Args:
        extra (`str`): of this package's extras the one that brings what the command imports.
    """
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason += f': pip install "vfmtok-hf[{extra}]"'
        error_console.print(f"Error: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, gone when done; it swings where the total is not known. Yields the function that advances it."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    hidden = not error_console.is_terminal
    with Progress(*columns, console=error_console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


def resolve_model(model: str | None) -> str:
    """
    The folder or repository that a name means; without one the embedded checkpoint. A folder that is not there would be
    taken for a repository.
    """
    import vfmtok_hf

    name_or_path = model or vfmtok_hf.DEFAULT_CHECKPOINT
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_like_path and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"There is no model folder {name_or_path}.")
    return name_or_path


def load_pipeline(
    model: str | None,
    device: str | None,
    dtype: Dtype,
    generates: bool = False,
    encodes: bool = False,
    reconstructs: bool = False,
) -> "VFMTokPipeline | VFMTokDiTPipeline":
    """
    The pipeline on its device, with compiled kernels where there are any and the libraries' own progress bars off.

    Unless it `generates`, an image tokenizer alone will do; if it `encodes`, a light one gets its vision model. If it
    `reconstructs`, it may also be a continuous autoencoder, alone or in its pipeline.
    """
    import diffusers
    import torch
    import transformers
    from transformers.utils.hub import has_file

    from vfmtok_hf import VFMTokDiTPipeline, VFMTokPipeline
    from vfmtok_hf.cli.environment import default_device
    from vfmtok_hf.cpu.packing import keep_freed_memory, pack_weights
    from vfmtok_hf.cpu.threads import use_one_thread_for_small_models

    name_or_path, torch_dtype = resolve_model(model), getattr(torch, dtype.value)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if generates:
        pipe = VFMTokPipeline.from_pretrained(name_or_path, dtype=torch_dtype)
    elif has_file(name_or_path, "config.json"):  # which the root of a pipeline does not have
        if reconstructs and transformers.AutoConfig.from_pretrained(name_or_path).model_type == "vfmae":
            pipe = VFMTokDiTPipeline.from_autoencoder(name_or_path, dtype=torch_dtype)
        else:
            pipe = VFMTokPipeline.from_image_tokenizer(name_or_path, dtype=torch_dtype)
    elif reconstructs and pipeline_class_name(name_or_path) == "VFMTokDiTPipeline":
        left_out = {"transformer": None, "guidance_transformer": None}
        pipe = VFMTokDiTPipeline.from_pretrained(name_or_path, dtype=torch_dtype, **left_out)
    else:
        pipe = VFMTokPipeline.from_pretrained(name_or_path, dtype=torch_dtype, transformer=None)
    if encodes and pipe.autoencoder.vision_model is None:
        pipe.autoencoder.load_vision_model()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or default_device())
    if pipe.device.type == "cpu":
        keep_freed_memory()
        use_one_thread_for_small_models(pipe.autoencoder, pipe.transformer)
        for model in (pipe.autoencoder, pipe.transformer):
            if model is not None:
                pack_weights(model)
    return pipe


def pipeline_class_name(name_or_path: str) -> str:
    """Class of a saved pipeline."""
    from diffusers import DiffusionPipeline

    from vfmtok_hf.pipelines.portable_vfmtok import class_name

    return class_name(DiffusionPipeline.load_config(name_or_path))


def report_written(count: int, what: str, output: Path) -> None:
    seconds = time.perf_counter() - STARTED
    text = f"{count} {what}{'' if count == 1 else 's'} in {seconds:.1f} s: {output}"
    output_console.print(text, markup=False, highlight=False, soft_wrap=True)


def report_skipped(reason: str) -> None:
    error_console.print(f"Skipped: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
