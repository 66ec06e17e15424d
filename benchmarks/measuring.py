"""Shared parts of the benchmarks: alternating medians, processes, hardware limits and operation counts."""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vfmtok_hf.cpu.packing import PackedLinear, can_pack, has_product


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--threads`, `--runs` and `--tiny`, which most benchmarks have."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=3, help="rounds in which the sides take turns, after a warm-up")
    parser.add_argument("--tiny", action="store_true", help="try it at the sizes of the checkpoint in the package")


def usable_dtypes(device: str) -> list[torch.dtype]:
    """float32, and bfloat16 if the machine supports it in hardware, which CPUs without AVX-512 do not."""
    has_bfloat16 = device == "cuda" or has_product(torch.bfloat16)
    return [torch.float32, torch.bfloat16] if has_bfloat16 else [torch.float32]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds_of(function: Callable[[], object], device: str = "cpu") -> float:
    """Time of one call. On CUDA, it is measured between two events, so it includes the work of the device."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def alternate(sides: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Median measurement of each side: a warm-up round, then `runs` rounds in which the sides take turns."""
    rounds = [{name: measure() for name, measure in sides.items()} for _ in range(runs + 1)][1:]
    return {name: statistics.median(one[name] for one in rounds) for name in sides}


def median_seconds(sides: dict[str, Callable[[], object]], runs: int, device: str = "cpu") -> dict[str, float]:
    """Median time of each function; see `alternate`."""
    return alternate({name: partial(seconds_of, function, device) for name, function in sides.items()}, runs)


class SideProcess:
    """
    A side in a process of its own, whose memory no other side has touched: calling this object calls what
    `build(*arguments)` returned there, with the same arguments, and returns its seconds. Several are built at the same time,
    before their first call returns.
    """

    def __init__(self, build: Callable[..., Callable[..., object]], *arguments: object, device: str = "cpu"):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, arguments, device), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, *arguments: object) -> float:
        return self.ask(arguments)

    def close(self) -> int:
        """End the process and return its peak memory; see `peak_memory`."""
        peak = self.ask(None)
        self.process.join()
        return peak

    def ask(self, call: tuple | None) -> float:
        try:
            self.connection.send(call)
            return self.connection.recv()
        except (EOFError, ConnectionError):
            sys.exit("The process of a side has ended, for the reason that it printed.")


def serve(connection: Connection, build: Callable[..., Callable[..., object]], arguments: tuple, device: str) -> None:
    """The child process of a [`SideProcess`]: sends the seconds of each call and finally its peak memory."""
    side = build(*arguments)
    while (call := connection.recv()) is not None:
        connection.send(seconds_of(partial(side, *call), device))
    connection.send(peak_memory(device))


def peak_memory(device: str) -> int:
    """Peak bytes of this process: of tensors on CUDA, of all memory including mapped files on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM")


def memory(field: str) -> int:
    """
    Bytes of this process: `VmHWM`, the most it ever held, file pages that are mapped included, or `RssAnon`, what is its
    own now. Linux only: there, and not in `getrusage`, a new process does not inherit the peak of the one that started
    it.
    """
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def in_fresh_process(script: str, *arguments: object) -> dict[str, float]:
    """Run `script` with `arguments` in a new interpreter and return the JSON object in its last line of output."""
    command = [sys.executable, script, *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def memory_bandwidth(dtype: torch.dtype, device: str = "cpu", megabytes: int = 512) -> float:
    """
    Bytes per second, the yardstick of the decode loop: on CPUs those that a large matrix-vector product of torch reads, on
    CUDA those that a copy reads and writes.
    """
    columns = 8192
    matrix = torch.randn(megabytes * 2**20 // (columns * dtype.itemsize), columns, device=device).to(dtype)
    if device == "cuda":
        target = torch.empty_like(matrix)
        return 2 * matrix.nbytes / median_seconds({"copy": lambda: target.copy_(matrix)}, 9, device)["copy"]
    vector = torch.randn(1, columns).to(dtype)
    return matrix.nbytes / median_seconds({"product": lambda: F.linear(vector, matrix)}, 9)["product"]


def arithmetic_limit(dtype: torch.dtype, device: str = "cpu") -> float:
    """Floating-point operations per second of a large matrix multiplication; on CPUs, oneDNN's if it is faster."""
    size = 8192 if device == "cuda" else 2048
    with torch.device(device):
        linear, inputs = nn.Linear(size, size, bias=False).to(dtype), torch.randn(size, size).to(dtype)
    sides = {"plain": partial(linear, inputs)}
    if can_pack(linear):
        sides["packed"] = partial(PackedLinear(linear), inputs)
    with torch.no_grad():
        return 2 * size**3 / min(median_seconds(sides, 7, device).values())


def flop_counter() -> FlopCounterMode:
    """A FLOP counter that includes attention on CPUs, which torch counts itself since 2.15."""

    def forward(query, key, value, *others, out_shape, **options) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *others, out_shape, **options) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def machine(device: str = "cpu") -> str:
    """Processor and threads, or the card, and torch: what every table names."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
