"""What scripts do before they import torch and transformers, which takes seconds: report mistakes in one line."""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from vfmtok_hf.data.files import check_file, check_model, check_source
from vfmtok_hf.training.arguments import TrainingArguments, check_resumed_arguments


def quiet_imports() -> None:
    """Turn off what libraries print when they are imported: warnings about packages that no script needs, and progress bars."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # warns about torchao's enums


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. Expected errors become one line on stderr and exit code 1."""
    from huggingface_hub.errors import StrictDataclassError

    quiet_imports()
    try:
        main()
    except (ImportError, OSError, ValueError, FloatingPointError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            reason += ': pip install "vfmtok-hf[train]"'
        sys.exit(f"Error: {reason}")


def finished_checkpoints(output: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((output / "checkpoints").glob("step_*"))


def checkpoint_to_resume(arguments: TrainingArguments) -> Path | None:
    """
    The newest checkpoint in the run's output, or None for a new run.

    Raises:
        ValueError: the output contains a run, and `arguments.resume` is false, or other arguments changed
            ([`check_resumed_arguments`]).
    """
    output = Path(arguments.output)
    checkpoints = finished_checkpoints(output)
    if not checkpoints:
        return None
    if not arguments.resume:
        raise ValueError(
            f"{output} already contains a run: pass --resume true to continue it, or choose another --output."
        )
    check_resumed_arguments(arguments, output / "arguments.yaml")
    return checkpoints[-1]


def check_run(arguments: TrainingArguments, models: Iterable[str | None], files: Iterable[str | None] = ()) -> None:
    """
    Check the paths of a run. Of a resumed run, also check the arguments.

    Args:
        models (`Iterable[str | None]`): folders and repositories of the models that it needs.
        files (`Iterable[str | None]`): further files that it needs.

    Raises:
        ValueError: the output contains a run that these arguments do not continue ([`checkpoint_to_resume`]).
        FileNotFoundError: data, a model or a file do not exist.
    """
    checkpoint_to_resume(arguments)
    for source in (arguments.train_data, arguments.validation_data):
        if source is not None:
            check_source(source)
    for model in models:
        if model is not None:
            check_model(model)
    for file in (arguments.class_names, *files):
        if file is not None:
            check_file(file)
