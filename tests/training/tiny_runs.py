"""Tiny training runs in processes of their own, which can be killed, and comparison of what they leave behind."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from tests.testing import tiny_config, tiny_model
from vfmtok_hf.training.distributed import StopRequest


# Forked: the imports of a training script take ten seconds, its tiny runs one.
FORK = multiprocessing.get_context("fork")

# What is random in a generator's training steps.
DROPOUTS = {
    "ar": ["token_dropout", "residual_dropout", "ffn_dropout", "class_dropout"],
    "rar": ["dropout", "attention_dropout", "class_dropout"],
}


def write_images(root: Path, images_per_class: int = 8) -> Path:
    """Two classes of colored bars and discs at random places."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for name in ("bar", "disc"):
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            row, column = rng.integers(8, 24, 2)
            distance = abs(rows - row) if name == "bar" else np.hypot(rows - row, columns - column)
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[distance < 6] = rng.integers(0, 200, 3)
            Image.fromarray(pixels).save(root / name / f"{name}_{index}.png")
    return root


def write_vision_model(folder: Path) -> Path:
    torch.manual_seed(1)
    tiny_model().vision_model.save_pretrained(folder)
    return folder


def tokenizer_options(data: Path, vision_model: Path, output: Path, **options: Any) -> list[str]:
    """Command line of a run that uses everything with a state: dropout, codebook restarts, a discriminator."""
    fields = {
        name: value
        for name, value in tiny_config(**options.pop("model", {})).to_diff_dict().items()
        if name in tiny_config().default_fields() and name not in ("vision_config", "model_type")
    }
    return as_options(
        {
            "train_data": data,
            "validation_data": data,
            "output": output,
            "vision_model": vision_model,
            **{f"model.{name}": value for name, value in fields.items()},
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "warmup_steps": 1,
            "ema_decay": 0.9,
            "codebook_warmup_steps": 2,
            "kmeans_images": 16,
            "restart_patience": 2,
            "adversarial_weight": 0.1,
            "adversarial_start_step": 1,
            "log_every": 1,
            "validate_every": 3,
            "checkpoint_every": 1,
            "keep_checkpoints": 10,
            "grid_images": 4,
            **options,
        }
    )


def generator_options(data: Path, tokenizer: Path, output: Path, **options: Any) -> list[str]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return as_options(
        {
            "train_data": data,
            "validation_data": data,
            "output": output,
            "tokenizer": tokenizer,
            **{f"model.{name}": value for name, value in sizes.items()},
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "warmup_steps": 1,
            "ema_decay": 0.9,
            "log_every": 1,
            "validate_every": 3,
            "sample_every": 3,
            "checkpoint_every": 1,
            "keep_checkpoints": 10,
            "samples_per_class": 1,
            **options,
        }
    )


def as_options(values: dict[str, Any]) -> list[str]:
    """Those of a command line; None leaves an argument out."""
    words = []
    for name, value in values.items():
        if isinstance(value, list) and "." not in name:
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, bool | list | dict) else value}")
    return words


def start(function: Callable[[], None], num_processes: int = 1) -> list[multiprocessing.Process]:
    """Run a function in forked processes, as `torchrun` would start them on a machine without GPUs."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def child(rank: int) -> None:
        if num_processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        function()

    processes = [FORK.Process(target=child, args=(rank,)) for rank in range(num_processes)]
    for process in processes:
        process.start()
    return processes


def run(function: Callable[[], None], num_processes: int = 1) -> None:
    """The same, to their end."""
    processes = start(function, num_processes)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num_processes


def is_rank(rank: int) -> bool:
    return os.environ.get("RANK", "0") == str(rank)


def terminate_the_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that the processes are about to agree on whether to stop."""
    agree = StopRequest.agree

    def signal_before_agreeing(stop: StopRequest) -> None:
        if is_rank(1):
            os.kill(os.getpid(), signal.SIGTERM)
        agree(stop)

    monkeypatch.setattr(StopRequest, "agree", signal_before_agreeing)


def copy_until(run_folder: Path, step: int, to: Path) -> Path:
    """A run as if it had been killed after later steps, of which only the log speaks."""
    shutil.copytree(run_folder, to)
    for folder in (to / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return to


def log_of(output: Path, kind: str) -> list[dict[str, Any]]:
    """Log lines of a kind without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("kind", "time", "images/s")}
        for line in lines
        if line["kind"] == kind
    ]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """All that a checkpoint holds, by file."""
    state = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if file.suffix == ".safetensors":
            state[file.name] = load_file(file)
        elif file.suffix in (".bin", ".pkl", ".pt"):
            state[file.name] = torch.load(file, weights_only=False)
        else:
            state[file.name] = file.read_text()
    return state


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested structures are not equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, np.ndarray):
        return [] if (one == other).all() else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [found for key in one for found in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and not isinstance(one, str):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)}"]
        return [
            found
            for key, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{path}/{key}")
        ]
    return [] if one == other else [f"{path}: {one!r} and {other!r}"]
