"""Experiment trackers beside the log: TensorBoard, trackio, Weights & Biases."""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator


TRACKERS = ("tensorboard", "trackio", "wandb")


def check_trackers(names: list[str]) -> list[str]:
    """
    `names`, for `Accelerator(log_with=...)`, which would drop in silence those that are not installed.

    Raises:
        ValueError: a tracker is unknown.
        ImportError: a tracker is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"Unknown tracker {name!r}: choose among {', '.join(TRACKERS)}.")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--tracker {name} needs the package: pip install {name}")
    return names


def start_trackers(accelerator: Accelerator, arguments: Any, output: Path, step: int) -> None:
    """
    Start or continue the run in the trackers of the accelerator. Its name is that of the output folder; a continued
    run goes on under the same name from `step`.
    """
    resumed = step > 0
    identity = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]  # folders of one name are many
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
    """TensorBoard's table of arguments takes nothing else."""
    return value if isinstance(value, int | float | str | bool) else json.dumps(value)
