"""The folder of a run: resuming, checkpoints and saved models."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.training.arguments import TrainingArguments, save_arguments
from vfmtok_hf.training.distributed import any_process, sharding_of
from vfmtok_hf.training.logs import LOG_FILE, RunLog, drop_lines_after, logger, start_trackers
from vfmtok_hf.training.scripts import checkpoint_to_resume, finished_checkpoints


# Temporary names while a checkpoint is written and while one is deleted. Neither is ever read.
WRITING = "writing"
DELETING = "deleting"


@dataclass
class Progress:
    """Progress of a run: finished optimizer steps, epoch, finished batches of this epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


def open_output(output: Path, arguments: TrainingArguments) -> Path | None:
    """
    The newest checkpoint of a run's folder, or None for a new run. Only the folder is created.

    Raises:
        ValueError: the folder contains a run that `arguments` do not continue ([`checkpoint_to_resume`]).
    """
    checkpoint = checkpoint_to_resume(arguments)
    if checkpoint is None and arguments.resume:
        logger.warning("no checkpoint in %s: starting from the beginning", output)
    output.mkdir(parents=True, exist_ok=True)
    return checkpoint


def start_run(
    accelerator: Accelerator, output: Path, checkpoint: Path | None, arguments: TrainingArguments, progress: Progress
) -> RunLog:
    """
    Load the checkpoint, if there is one, after everything is prepared and registered, and open the run's log. Log lines
    after the checkpoint are deleted, because these steps are repeated.

    Raises:
        ValueError: the checkpoint does not match; see [`load_checkpoint`].
    """
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
    if accelerator.is_main_process:
        remove_leftovers(output)
        drop_lines_after(output / LOG_FILE, progress.step)
        with whole_file(output / "arguments.yaml") as file:
            save_arguments(arguments, file)
    start_trackers(accelerator, arguments, output, progress.step)
    accelerator.wait_for_everyone()
    log = RunLog(accelerator, output, progress.step, arguments.max_steps)
    if checkpoint is not None:
        log.write("resume", progress.step, {})
    return log


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    """
    Save everything for a bit-identical resume, atomically. Only the newest `keep` checkpoints are kept.

    Raises:
        OSError: it cannot be written. Earlier checkpoints are unchanged.
    """
    folder = output / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name(WRITING)
    error = None
    try:
        accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            launch = {"num_processes": accelerator.num_processes, "sharding": sharding_of(accelerator)}
            (temporary / "run.json").write_text(json.dumps(launch))
    # A full disk is an OSError, a RuntimeError or a SafetensorError, by file.
    except (Exception, CheckpointException) as caught:
        error = caught
    if any_process(accelerator, error is not None):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = one_line(error) if error else "another process failed"
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder.parent}: {reason}. Earlier ones are "
            "unchanged: free disk space and continue with --resume true."
        ) from error
    if accelerator.is_main_process:
        flush_to_disk(temporary)
        replace_folder(temporary, folder)
        for old in finished_checkpoints(output)[:-keep]:
            # Rename first: deleting takes a while, during which the process may be killed.
            os.replace(old, old.with_name(DELETING))
            shutil.rmtree(old.with_name(DELETING))
    accelerator.wait_for_everyone()


def one_line(error: BaseException) -> str:
    """An error as one line; for a sharded checkpoint, the errors of the processes."""
    errors = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return " ".join(" ".join(dict.fromkeys(map(str, errors))).split())


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: the checkpoint is damaged, or was written by another number of processes or another kind of
            sharding.
    """
    error = None
    try:
        launch = json.loads((checkpoint / "run.json").read_text())
        num_processes, sharding = launch["num_processes"], launch["sharding"]
        if (num_processes, sharding) == (accelerator.num_processes, sharding_of(accelerator)):
            accelerator.load_state(str(checkpoint))
    except (Exception, CheckpointException) as caught:
        error = caught
    if any_process(accelerator, error is not None):
        reason = one_line(error) if error else "another process failed"
        if "Error(s) in loading state_dict" in reason or "parameter group" in reason:
            cure = "It belongs to another model: use the data, --tokenizer and --init_from with which the run started."
        else:
            cure = "If its files are damaged, move it away to continue from the one before."
        raise ValueError(f"{checkpoint} cannot be read: {reason}. {cure}") from error
    if num_processes != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {num_processes} process(es), but this run has {accelerator.num_processes}: their "
            "random numbers and shares of the data would differ. Start the same number, or a new run with --init_from."
        )
    if sharding != sharding_of(accelerator):
        raise ValueError(
            f"{checkpoint} was written with {sharding or 'no sharding'}, but this run was launched with "
            f"{sharding_of(accelerator) or 'none'}. Launch it as before, or start a new run with --init_from."
        )


def remove_leftovers(output: Path) -> None:
    """Clean up what a killed run left half written or half deleted, and restore a model that it was replacing."""
    for name in (WRITING, DELETING):
        shutil.rmtree(output / "checkpoints" / name, ignore_errors=True)
    model = output / "model"
    if not model.exists() and model.with_name("model.old").exists():
        os.replace(model.with_name("model.old"), model)
    for name in ("model.old", "model.writing"):
        shutil.rmtree(output / name, ignore_errors=True)


def flush_to_disk(folder: Path) -> None:
    """Flush files to disk, so that they survive a power loss before the rename does."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def replace_folder(temporary: Path, folder: Path) -> None:
    """Move a finished folder to its place, replacing what was there."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_run_folder(folder: Path) -> Iterator[Path]:
    """
    Yield a temporary sibling, which is renamed to `folder` when the block ends. Unlike in
    `vfmtok_hf.data.output_files`, its name is fixed, so a resumed run can clean up after one that was killed.
    """
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    replace_folder(temporary, folder)


def save_model(model: nn.Module, folder: Path) -> None:
    """`save_pretrained`, atomically."""
    with whole_run_folder(folder) as temporary:
        model.save_pretrained(temporary)
