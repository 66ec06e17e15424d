"""Logging: a JSON object per line, trackers, curves and image grids."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torchvision.utils import make_grid
from transformers.utils import logging as transformers_logging

from vfmtok_hf.data.output_files import save_picture, whole_file
from vfmtok_hf.plotting import Curves
from vfmtok_hf.training.arguments import TrainingArguments


if TYPE_CHECKING:  # curves can be plotted without the training libraries
    from accelerate import Accelerator

logger = logging.getLogger("vfmtok_hf.training")

LOG_FILE = "log.jsonl"
TRACKERS = ("tensorboard", "trackio", "wandb")


def configure_logging() -> None:
    """Log to the console, without the progress bars of transformers."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()


class RunLog:
    """Write `log.jsonl`, the console and the trackers, on the main process only."""

    def __init__(self, accelerator: "Accelerator", output: Path, first_step: int, max_steps: int):
        self.accelerator = accelerator
        self.file = output / LOG_FILE
        self.first_step = first_step
        self.max_steps = max_steps
        self.started = time.perf_counter()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 1), **values}) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if kind == "train":
            shown += f"  {self.time_left(step)} left"
        logger.info("%-10s step %6d of %d  %s", kind, step, self.max_steps, shown)
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def time_left(self, step: int) -> str:
        """Time to the last step at the mean speed of this run so far, validations and pictures included."""
        seconds = (time.perf_counter() - self.started) / (step - self.first_step) * (self.max_steps - step)
        return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


class WindowMeans:
    """
    Means of named scalars over the steps and processes since the last log line, and images per second. Adding values
    does not synchronize with the device.
    """

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator = accelerator
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.images = 0
        self.started = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor], num_images: int) -> None:
        """Add values; `num_images` is the number of images of all processes."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.counts.update(values.keys())
        self.images += num_images

    def take(self) -> dict[str, float]:
        """Return the means and `images/s`, and reset. Must be called on all processes."""
        means = torch.stack([total.float() / self.counts[name] for name, total in self.sums.items()])
        means = self.accelerator.reduce(means, "mean").tolist()
        values = dict(zip(self.sums, means, strict=True))
        values["images/s"] = self.images / (time.perf_counter() - self.started)
        self.restart()
        return values


def read_log(file: Path) -> list[dict[str, Any]]:
    """
    The lines of a log. An incomplete last line of a killed run is ignored.

    Raises:
        ValueError: another line is damaged.
    """
    lines = file.read_text().splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is not JSON: {line[:80]}") from error
    return entries


def drop_lines_after(file: Path, step: int) -> None:
    """Delete the lines after `step`, because these steps are repeated."""
    if file.is_file():
        kept = [entry for entry in read_log(file) if entry["step"] <= step]
        with whole_file(file) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))


def read_curves(run: Path) -> Curves:
    """
    The logged numbers of a run: quantity -> kind of line (`train` or `validation`) -> step -> value. If a step was logged
    twice, the later line is used.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: the log is damaged, or no step was logged yet.
    """
    file = run / LOG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not a training run: it has no {LOG_FILE}.")
    curves: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in read_log(file):
        for name in entry.keys() - {"kind", "step", "time"}:
            curves[name][entry["kind"]][entry["step"]] = entry[name]
    if not curves:
        raise ValueError(f"{file} has no losses yet.")
    return curves


def check_trackers(names: list[str]) -> list[str]:
    """
    Check `names` for `Accelerator(log_with=...)`, which silently ignores trackers that are not installed.

    Raises:
        ValueError: a tracker is unknown.
        ImportError: a tracker is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"Unknown tracker {name!r}: choose from {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--tracker {name} needs a package: pip install {name}")
    return names


def start_trackers(accelerator: "Accelerator", arguments: TrainingArguments, output: Path, step: int) -> None:
    """
    Start or continue the run in the accelerator's trackers, under the name of the output folder. A resumed run
    continues under the same name from `step`.
    """
    resumed = step > 0
    identity = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]  # the folder's name is not unique
    accelerator.init_trackers(
        "vfmtok",
        config={name: _plain(value) for name, value in dataclasses.asdict(arguments).items()},
        init_kwargs={
            "tensorboard": {"purge_step": step + 1} if resumed else {},
            "trackio": {"name": output.name, "resume": "allow" if resumed else "never"},
            "wandb": {"name": output.name, "id": identity, "resume": "allow", "dir": str(output)},
        },
    )


def _plain(value: Any) -> int | float | str | bool:
    """Convert arguments to the types that TensorBoard's table accepts."""
    return value if isinstance(value, int | float | str | bool) else json.dumps(value)


def save_grid(images: torch.Tensor, file: Path, columns: int) -> None:
    """Save images `(count, 3, height, width)` in [-1, 1] as one PNG grid, row by row, and log where it is."""
    grid = make_grid(images.float().cpu().clamp(-1, 1) / 2 + 0.5, nrow=columns, padding=2, pad_value=1.0)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    save_picture(Image.fromarray(pixels), file)
    logger.info("picture    %s", file)
