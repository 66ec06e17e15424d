"""What every training run needs around its steps: progress, checkpoints, logs, schedule, pictures, clean stops."""

import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid


logger = logging.getLogger("vfmtok_hf.training")


@dataclass
class Progress:
    """Where a run is: optimizer steps done, epoch, batches of this epoch done."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


class StopRequest:
    """True in a boolean context after SIGTERM or SIGINT: the loop finishes its step, saves and leaves."""

    def __init__(self):
        self.received = False
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._receive)

    def _receive(self, signal_number: int, frame: Any) -> None:
        self.received = True

    def __bool__(self) -> bool:
        return self.received


class RunLog:
    """One JSON object per line in `log.jsonl` and one readable line on the console. Main process only."""

    def __init__(self, output: Path, enabled: bool):
        self.file = output / "log.jsonl"
        self.enabled = enabled

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 1), **values}) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("%-10s step %6d  %s", kind, step, shown)


class WindowMeans:
    """Means of named scalars since the last log line, and images per second. Adding reads nothing from the device."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.images = 0
        self.started = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor], num_images: int) -> None:
        self.sums = {name: self.sums.get(name, 0.0) + value.detach() for name, value in values.items()}
        self.steps += 1
        self.images += num_images

    def take(self) -> dict[str, float]:
        """The means and `images/s`; the window starts again."""
        means = {name: total.item() / self.steps for name, total in self.sums.items()}
        means["images/s"] = self.images / (time.perf_counter() - self.started)
        self.restart()
        return means


def configure_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)


def training_batches(
    accelerator: Accelerator, loader: DataLoader, dataset: Dataset, progress: Progress
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end from where `progress` stands, whose epoch and batch they advance."""
    while True:
        batches = accelerator.skip_first_batches(loader, progress.batch) if progress.batch else loader
        dataset.set_epoch(progress.epoch)
        batches.set_epoch(progress.epoch)
        for batch in batches:
            progress.batch += 1
            yield batch
        progress.epoch, progress.batch = progress.epoch + 1, 0


def open_output(output: Path, resume: bool) -> Path | None:
    """
    The newest checkpoint of a run's folder, or None for a new run.

    Raises:
        ValueError: the folder holds a run and `resume` is false.
    """
    checkpoints = sorted((output / "checkpoints").glob("step_*"))
    if checkpoints and not resume:
        raise ValueError(f"{output} already holds a run: pass --resume true to continue it, or another --output.")
    output.mkdir(parents=True, exist_ok=True)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    """Everything a bit-identical continuation needs, written whole or not at all; the oldest beyond `keep` go."""
    folder = output / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name("writing")
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(temporary, folder)
        for old in sorted(folder.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def replace_folder(temporary: Path, folder: Path) -> None:
    """Move a finished folder to its place; what was there goes."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_model(model: nn.Module, folder: Path) -> None:
    """`save_pretrained`, whole or not at all."""
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    replace_folder(temporary, folder)


def save_grid(images: torch.Tensor, file: Path, columns: int) -> None:
    """`(count, 3, height, width)` in [-1, 1] as one PNG picture, row by row."""
    grid = make_grid(images.float().cpu().clamp(-1, 1) / 2 + 0.5, nrow=columns, padding=2, pad_value=1.0)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".writing")
    Image.fromarray(pixels).save(temporary, format="PNG")
    os.replace(temporary, file)


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int, schedule: str, final: float) -> float:
    """
    Linear warm-up to `peak`, then constant, or a half cosine or a straight line down to `final * peak` at `max_steps`.

    Args:
        step (`int`): steps done before this one, from 0.
        schedule (`str`): "constant", "cosine" or "linear".
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    share = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    remaining = 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return peak * (final + (1 - final) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def check_finite(loss: torch.Tensor, terms: dict[str, torch.Tensor], step: int, batch_files: list[str]) -> None:
    """
    Raises:
        FloatingPointError: the loss is NaN or infinite. Names the terms and the batch; nothing was saved or updated.
    """
    if loss.isfinite():
        return
    bad = [name for name, value in terms.items() if not value.isfinite()] or ["loss"]
    raise FloatingPointError(
        f"Loss not finite at step {step} (terms: {', '.join(bad)}). Lower the learning rate or check these images: "
        f"{', '.join(batch_files)}. The last checkpoint is unharmed."
    )
