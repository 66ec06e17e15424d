"""What the benchmarks share: alternating medians, fresh processes, the machine's memory bandwidth, operations counted, tables."""

import csv
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


RESULTS = Path(__file__).parent / "results"


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(sides: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each side: one warm-up each, then `runs` rounds in which the sides take turns."""
    for function in sides.values():
        function()
    rounds = [{name: seconds_of(function) for name, function in sides.items()} for _ in range(runs)]
    return {name: statistics.median(times[name] for times in rounds) for name in sides}


class SideProcess:
    """
    A side in a process of its own, whose memory no other side has had in its hands: what `build(*arguments)` returns
    there is called, with the same arguments, when this object is. Only one of several works at a time.
    """

    def __init__(self, build: Callable[..., Callable[..., object]], *arguments: object):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()

    def __call__(self, *arguments: object) -> None:
        self.connection.send(arguments)
        self.connection.recv()

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def serve(connection: Connection, build: Callable[..., Callable[..., object]], arguments: tuple) -> None:
    """The other end of a [`SideProcess`]: answers once it is built, and each time that it has run."""
    side = build(*arguments)
    try:
        while True:
            connection.send(None)
            side(*connection.recv())
    except EOFError:
        pass


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


def matrix_vector_bandwidth(dtype: torch.dtype, megabytes: int = 512) -> float:
    """Bytes per second that a plain large matrix-vector product of torch reads: the decode loop's yardstick."""
    columns = 8192
    matrix = torch.randn(megabytes * 2**20 // (columns * dtype.itemsize), columns).to(dtype)
    vector = torch.randn(1, columns).to(dtype)
    seconds = alternate({"product": lambda: F.linear(vector, matrix)}, runs=9)["product"]
    return matrix.numel() * matrix.element_size() / seconds


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


def machine() -> str:
    """Processor, threads and torch, which every table names."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def show_table(name: str, rows: list[dict[str, object]]) -> None:
    """Print the rows, and keep them by `write_table`."""
    for row in rows:
        print(*row.values(), sep="  ", flush=True)
    write_table(name, rows)


def write_table(name: str, rows: list[dict[str, object]]) -> None:
    """
    Add rows to results/NAME.csv, replacing those that measured the same thing, and write results/NAME.md from all.

    Columns up to and including `side` say what was measured.
    """
    keys = list(rows[0])[: list(rows[0]).index("side") + 1]
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    kept = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [{key: str(value) for key, value in row.items()} for row in rows]
    measured = {tuple(row[key] for key in keys) for row in rows}
    rows = [row for row in kept if tuple(row[key] for key in keys) not in measured] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    path.with_suffix(".md").write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
