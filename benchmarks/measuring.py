"""What the benchmarks share: alternating medians, processes, the limits of the machine, operations counted."""

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
    parser.add_argument(
        "--runs", type=int, default=3, help="rounds in which the sides take turns, after one to warm up"
    )
    parser.add_argument("--tiny", action="store_true", help="a trial at the sizes of the checkpoint in the package")


def usable_dtypes(device: str) -> list[torch.dtype]:
    """float32, and bfloat16 where the machine has matrix products of it: not on CPUs that stop at AVX2."""
    has_bfloat16 = device == "cuda" or has_product(torch.bfloat16)
    return [torch.float32, torch.bfloat16] if has_bfloat16 else [torch.float32]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds_of(function: Callable[[], object], device: str = "cpu") -> float:
    """Time of one call; on CUDA between two events, so that it ends when the device has done the work."""
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
    """Median of what each side measures: one round to warm up, then `runs` rounds in which the sides take turns."""
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
        """End the process; returns the most bytes that it held, see `peak_memory`."""
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
    """The other end of a [`SideProcess`]: answers with the seconds of each call, at last with its peak of memory."""
    side = build(*arguments)
    while (call := connection.recv()) is not None:
        connection.send(seconds_of(partial(side, *call), device))
    connection.send(peak_memory(device))


def peak_memory(device: str) -> int:
    """Most bytes that this process held: of tensors on CUDA, of everything, mapped files included, on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM")


def memory(field: str) -> int:
    """
    Bytes of this process: `VmHWM`, the most it ever held, file pages that are mapped included, or `RssAnon`, what is its
    own now. Linux only: there, and not in `getrusage`, a new process does not inherit the peak of the one that started
    it.
    """
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def in_fresh_process(script: str, *arguments: object) -> dict[str, float]:
    """What `script` prints as its last line, a JSON object, when it is run with `arguments` by a new interpreter."""
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
    """Floating-point operations per second of a large matrix product; on CPUs of oneDNN's if that is the faster one."""
    size = 8192 if device == "cuda" else 2048
    with torch.device(device):
        linear, inputs = nn.Linear(size, size, bias=False).to(dtype), torch.randn(size, size).to(dtype)
    sides = {"plain": partial(linear, inputs)}
    if can_pack(linear):
        sides["packed"] = partial(PackedLinear(linear), inputs)
    with torch.no_grad():
        return 2 * size**3 / min(median_seconds(sides, 7, device).values())


def flop_counter() -> FlopCounterMode:
    """Counts attention on CPUs too, which torch itself does from 2.15 on."""

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
