"""What every training run needs around its steps: progress, checkpoints, logs, schedule, pictures, clean stops."""

import json
import logging
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from PIL import Image
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torchvision.utils import make_grid

from vfmtok_hf.cpu.packing import keep_freed_memory
from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.training.arguments import check_resumed_arguments, save_arguments
from vfmtok_hf.training.log_file import LOG_FILE, drop_lines_after
from vfmtok_hf.training.sharding import set_up_sharding, sharding_of
from vfmtok_hf.training.tracking import check_trackers, start_trackers


logger = logging.getLogger("vfmtok_hf.training")

# A checkpoint in the making, and one on its way out. Neither is ever read.
WRITING = "writing"
DELETING = "deleting"


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
    """
    True in a boolean context once `agree` has learnt of a SIGTERM or SIGINT to any process: the loop then saves and
    leaves. The signal itself interrupts nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False
        self.agreed = False
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._receive)

    def _receive(self, signal_number: int, frame: Any) -> None:
        self.received = True

    def agree(self) -> None:
        """Once a step, on all processes, so that all of them leave after the same one."""
        self.agreed = any_process(self.accelerator, self.received)

    def __bool__(self) -> bool:
        return self.agreed


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process. Called by all of them."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0


class RunLog:
    """One JSON object per line in `log.jsonl`, a readable line on the console, and the trackers. Main process only."""

    def __init__(self, accelerator: Accelerator, output: Path):
        self.accelerator = accelerator
        self.file = output / LOG_FILE

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 1), **values}) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("%-10s step %6d  %s", kind, step, shown)
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)


class WindowMeans:
    """
    Means of named scalars over the steps and processes since the last log line, and images per second. Adding reads
    nothing from the device.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.images = 0
        self.started = time.perf_counter()

    def add(self, values: dict[str, torch.Tensor], num_images: int) -> None:
        """`num_images`: of all processes."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.counts.update(values.keys())
        self.images += num_images

    def take(self) -> dict[str, float]:
        """The means and `images/s`; the window starts again. Called by all processes."""
        means = torch.stack([total.float() / self.counts[name] for name, total in self.sums.items()])
        means = self.accelerator.reduce(means, "mean").tolist()
        values = dict(zip(self.sums, means, strict=True))
        values["images/s"] = self.images / (time.perf_counter() - self.started)
        self.restart()
        return values


def configure_logging() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logger.setLevel(logging.INFO)


def open_output(output: Path, arguments: Any) -> Path | None:
    """
    The newest checkpoint of a run's folder, or None for a new run. Nothing is written but the folder.

    Raises:
        ValueError: the folder holds a run and `arguments.resume` is false, or its arguments were others
            ([`check_resumed_arguments`]).
    """
    checkpoints = finished_checkpoints(output)
    if checkpoints and not arguments.resume:
        raise ValueError(f"{output} already holds a run: pass --resume true to continue it, or another --output.")
    if checkpoints:
        check_resumed_arguments(arguments, output / "arguments.yaml")
    elif arguments.resume:
        logger.warning("no checkpoint in %s: starting from the beginning", output)
    output.mkdir(parents=True, exist_ok=True)
    return checkpoints[-1] if checkpoints else None


def start_accelerator(arguments: Any, output: Path, can_shard: bool = False) -> Accelerator:
    """
    Accelerate as the launcher set it up, with seeded random numbers. Random numbers differ between processes.

    Args:
        can_shard (`bool`): whether the run can train a model that is split over the processes.

    Raises:
        ValueError: a tracker is unknown, or the launcher shards the model in a way that is not supported.
        ImportError: a tracker is not installed.
    """
    accelerator = Accelerator(
        # Without being told, Accelerate would not connect processes that have no accelerator.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=arguments.mixed_precision,
        log_with=check_trackers(arguments.tracker) or None,
        project_dir=output,
    )
    set_up_sharding(accelerator, arguments, can_shard)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(arguments.seed, device_specific=True)
    return accelerator


def choose_attention(attention: str, device: torch.device, mixed_precision: str, dropout: float) -> str:
    """
    What `auto` stands for: `sdpa`, torch's fused attention, but on CPUs where that is slow. In bfloat16 it is, and with
    dropout it falls back to computing all pairs, hidden ones too.
    """
    if attention != "auto":
        return attention
    is_slow = device.type == "cpu" and (mixed_precision == "bf16" or dropout > 0)
    return "eager" if is_slow else "sdpa"


def start_run(
    accelerator: Accelerator, output: Path, checkpoint: Path | None, arguments: Any, progress: Progress
) -> RunLog:
    """
    Everything is prepared and registered: load the checkpoint, if there is one, and open the run's log where it
    stands. What an interrupted run wrote after its checkpoint is forgotten, since those steps come again.

    Raises:
        ValueError: the checkpoint does not fit; see [`load_checkpoint`].
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
    log = RunLog(accelerator, output)
    if checkpoint is not None:
        log.write("resume", progress.step, {})
    return log


def finished_checkpoints(output: Path) -> list[Path]:
    """Oldest first."""
    return sorted((output / "checkpoints").glob("step_*"))


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, keep: int) -> None:
    """
    Everything a bit-identical continuation needs, written whole or not at all; the oldest beyond `keep` go.

    Raises:
        OSError: it cannot be written. The checkpoints before it are unharmed.
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
        reason = reason_of(error) if error else "another process failed"
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder.parent}: {reason}. Those before it are "
            "unharmed: make room and continue with --resume true."
        ) from error
    if accelerator.is_main_process:
        flush_to_disk(temporary)
        replace_folder(temporary, folder)
        for old in finished_checkpoints(output)[:-keep]:
            # Out of sight at once: deleting takes a while, in which the process may die.
            os.replace(old, old.with_name(DELETING))
            shutil.rmtree(old.with_name(DELETING))
    accelerator.wait_for_everyone()


def reason_of(error: BaseException) -> str:
    """An error in one line; of a sharded checkpoint, what the processes report."""
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
        reason = reason_of(error) if error else "another process failed"
        raise ValueError(
            f"{checkpoint} cannot be read: {reason}. If it is damaged, delete it to continue from the one before."
        ) from error
    if num_processes != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {num_processes} process(es), this run has {accelerator.num_processes}: their "
            "random numbers and shares of the data would differ. Start as many, or a new run with --init_from."
        )
    if sharding != sharding_of(accelerator):
        raise ValueError(
            f"{checkpoint} was written with {sharding or 'no sharding'}, this run is launched with "
            f"{sharding_of(accelerator) or 'none'}. Launch it as before, or a new run with --init_from."
        )


def remove_leftovers(output: Path) -> None:
    """What a killed run left half written or half deleted; a model that it was about to replace comes back."""
    for name in (WRITING, DELETING):
        shutil.rmtree(output / "checkpoints" / name, ignore_errors=True)
    model = output / "model"
    if not model.exists() and model.with_name("model.old").exists():
        os.replace(model.with_name("model.old"), model)
    for name in ("model.old", "model.writing"):
        shutil.rmtree(output / name, ignore_errors=True)


def flush_to_disk(folder: Path) -> None:
    """Wait until the files survive a loss of power, which a rename could otherwise overtake."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


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


def check_finite(
    accelerator: Accelerator,
    step: int,
    values: dict[str, torch.Tensor],
    norms: dict[str, torch.Tensor],
    name_of: Callable[[int], str],
    indices: torch.Tensor,
) -> None:
    """
    Stop all processes if a number of any of them is not finite. Called by all, before weights change (under DeepSpeed
    after it, see [`clip_gradients`]).

    Args:
        step (`int`): steps done before this one.
        values (`dict[str, torch.Tensor]`): named scalars of this process: the loss and its terms.
        norms (`dict[str, torch.Tensor]`): of gradients, the same on all processes.
        name_of (callable): name of a training image by its index.
        indices (`torch.LongTensor`): of the images that this process had in the step.

    Raises:
        FloatingPointError: names the terms, and the images of the processes whose terms they are. If all terms are
            finite and a gradient is not, it names that and the images of all processes.
    """
    is_bad = ~torch.stack([value.detach().isfinite() for value in (values | norms).values()])
    if not any_process(accelerator, bool(is_bad.any())):
        return
    bad = [name for name, flag in zip(values | norms, is_bad.tolist(), strict=True) if flag]
    own = [name for name in bad if name in values]
    found = gather_object([(own, bad, [name_of(index) for index in indices.tolist()])])
    culprits = [(own, images) for own, _, images in found if own] or [(bad, images) for _, bad, images in found]
    names = dict.fromkeys(name for bad, _ in culprits for name in bad)
    images = [image for _, images in culprits for image in images]
    raise FloatingPointError(
        f"Not finite at step {step}: {', '.join(names)}. Lower the learning rate or check these images: "
        f"{', '.join(images)}. The last checkpoint is unharmed."
    )
