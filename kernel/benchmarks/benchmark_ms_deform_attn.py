"""Compare the kernel with plain torch, eager and compiled, forward and backward; write ratios and a CSV file.

    python kernel/benchmarks/benchmark_ms_deform_attn.py --output benchmarks/results/deformable_attention.csv
    kernels benchmark <repo>        # the class below, on a published build

Sizes are those of the released VFMTok encoder: 256 queries, 4 levels of 24 x 24, 8 heads of 64 channels, 4 points; sampling
locations are the anchors' grid with offsets of about 3 pixels. Backward passes are timed alone, on a retained graph. The
implementations take turns; times are medians and include the allocation of results. A plain copy that moves the minimum bytes
of the pass is measured too, as the limit of memory bandwidth. Rows of other devices, dtypes, threads and batch sizes in the
output file are kept, so a table can be measured in parts.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config


try:
    from kernels import Benchmark
except ImportError:  # only `kernels benchmark` calls the class below
    Benchmark = object

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reference import load_kernel, ms_deform_attn_reference


SHAPES = ((24, 24),) * 4
QUERIES, HEADS, CHANNELS, POINTS = 256, 8, 64, 4
MEASURED = ["device", "dtype", "threads", "batch", "pass", "implementation"]  # what a row is about
COPY = "copy of as many bytes"
FIELDS = [*MEASURED, "milliseconds", "times_faster", "megabytes", "gb_per_s"]


def released_inputs(batch: int, dtype: torch.dtype, device: str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    levels = len(SHAPES)
    side = int(QUERIES**0.5)
    centers = (torch.arange(side) + 0.5) / side
    grid = torch.stack([centers.repeat(side), centers.repeat_interleave(side)], dim=-1)
    offsets = torch.randn(batch, QUERIES, HEADS, levels, POINTS, 2, generator=generator) * 3 / SHAPES[0][0]
    value = torch.randn(batch, sum(h * w for h, w in SHAPES), HEADS, CHANNELS, generator=generator)
    weights = torch.rand(batch, QUERIES, HEADS, levels * POINTS, generator=generator).softmax(-1)
    weights = weights.view(batch, QUERIES, HEADS, levels, POINTS)
    return [tensor.to(device, dtype) for tensor in (value, grid[None, :, None, None, None] + offsets, weights)]


def least_bytes(batch: int, element_size: int, is_backward: bool) -> int:
    """Minimum memory traffic: every tensor moves once, and all reuse happens in caches."""
    value = batch * sum(height * width for height, width in SHAPES) * HEADS * CHANNELS
    samples = batch * QUERIES * HEADS * len(SHAPES) * POINTS
    output = batch * QUERIES * HEADS * CHANNELS
    moved = value + 3 * samples + output
    return element_size * (moved + value + 3 * samples if is_backward else moved)


def stream(byte_count: int, device: str):
    """A copy between two buffers; half of the bytes are read and half are written."""
    source, target = (torch.ones(byte_count // 8, device=device) for _ in range(2))
    return partial(target.copy_, source)


def milliseconds_on_cpu(function) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def milliseconds_on_cuda(function, calls: int = 10) -> float:
    """Time between two events, over enough calls that the device does not wait for Python."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def alternate(sides: dict, device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each function, called in turn for about `seconds` together, after two calls to warm up."""

    timed = milliseconds_on_cuda if device == "cuda" else milliseconds_on_cpu
    for function in sides.values():
        timed(function)
    first = sum(timed(function) for function in sides.values())
    rounds = max(5, min(200, int(1e3 * seconds / first)))
    times = [{name: timed(function) for name, function in sides.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in times) for name in sides}


def time_passes(functions: dict, tensors, moved: dict[str, int], device: str, seconds: float) -> dict[str, dict]:
    """Milliseconds of each implementation and of a copy, by pass; `moved` has the bytes of each pass."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]

    def run(function):
        return function(leaves[0], SHAPES, leaves[1], leaves[2])

    forwards = {name: partial(run, function) for name, function in functions.items()}
    with torch.no_grad():
        forward = alternate({**forwards, COPY: stream(moved["forward"], device)}, device, seconds)
    outputs = {name: run(function) for name, function in functions.items()}
    grad_output = torch.randn_like(next(iter(outputs.values())))
    backwards = {
        name: partial(torch.autograd.grad, output, leaves, grad_output, retain_graph=True)
        for name, output in outputs.items()
    }
    backward = alternate({**backwards, COPY: stream(moved["backward"], device)}, device, seconds)
    return {"forward": forward, "backward": backward}


def implementations(device: str, with_compiled: bool) -> dict:
    """Names and functions. The others are compared with the first."""
    kernel = load_kernel(device).ms_deform_attn
    functions = {"plain torch": ms_deform_attn_reference, "kernel": kernel}
    if with_compiled:
        # Retaining the graph for repeated backwards forbids donated buffers.
        torch._functorch.config.donated_buffer = False
        functions |= {f"{name}, compiled": torch.compile(function) for name, function in functions.items()}
    return functions


def measure(arguments: argparse.Namespace, dtype: torch.dtype, batch: int, functions: dict) -> list[dict]:
    tensors = released_inputs(batch, dtype, arguments.device)
    rows = []
    moved = {name: least_bytes(batch, dtype.itemsize, name == "backward") for name in ("forward", "backward")}
    for direction, times in time_passes(functions, tensors, moved, arguments.device, arguments.seconds).items():
        for name, milliseconds in times.items():
            rows.append(
                {
                    "device": arguments.device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": str(torch.get_num_threads()),
                    "batch": str(batch),
                    "pass": direction,
                    "implementation": name,
                    "milliseconds": f"{milliseconds:.3f}",
                    "times_faster": f"{next(iter(times.values())) / milliseconds:.1f}",
                    "megabytes": f"{moved[direction] / 1e6:.1f}",
                    "gb_per_s": f"{moved[direction] / milliseconds / 1e6:.1f}",
                }
            )
            print("  ".join(f"{row_value:>14}" for row_value in rows[-1].values()), flush=True)
    return rows


def with_earlier(path: Path, rows: list[dict]) -> list[dict]:
    """The rows, after those of an earlier run that they do not replace."""
    earlier = []
    if path.exists():
        with open(path, newline="") as file:
            earlier = list(csv.DictReader(file))
    again = {tuple(row[field] for field in MEASURED) for row in rows}
    return [row for row in earlier if tuple(row[field] for field in MEASURED) not in again] + rows


def write_csv(path: Path, rows: list[dict]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def write_ratios(path: Path, rows: list[dict]) -> None:
    """
    How many times faster, as a Markdown table: a line per pass, a column per implementation, and the kernel's traffic
    with its share of the bandwidth that the copy reached.
    """
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[field] for field in MEASURED[:-1]), {})
        if row["implementation"] == COPY:
            line["copy, GB/s"] = row["gb_per_s"]
            line["kernel / copy"] = f"{float(row['milliseconds']) / float(line['kernel, ms']):.0%}"
            continue
        line[row["implementation"]] = row["times_faster"]
        if row["implementation"] == "kernel":
            line |= {"kernel, ms": row["milliseconds"], "MB": row["megabytes"], "kernel, GB/s": row["gb_per_s"]}
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    table = [[*MEASURED[:-1], *columns], ["---"] * (len(MEASURED) - 1 + len(columns))]
    table += [[*key, *(line.get(column, "") for column in columns)] for key, line in lines.items()]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="time spent on each pass, about")
    parser.add_argument("--no-compiled", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="CSV file to write, with a Markdown table of the ratios beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}")
    print("  ".join(f"{field:>14}" for field in FIELDS))
    functions = implementations(arguments.device, not arguments.no_compiled)
    rows = []
    for dtype in arguments.dtype:
        for batch in arguments.batch:
            rows += measure(arguments, getattr(torch, dtype), batch, functions)
    if arguments.output:
        rows = with_earlier(arguments.output, rows)
        write_csv(arguments.output, rows)
        write_ratios(arguments.output.with_suffix(".md"), rows)


class MsDeformAttnBenchmark(Benchmark):
    """For `kernels benchmark`: forward at batch 8."""

    seed = 0

    def setup(self) -> None:
        self.tensors = released_inputs(8, torch.float32, self.device)
        self.out = torch.empty(8, QUERIES, HEADS * CHANNELS, device=self.device)

    def benchmark_released(self) -> None:
        self.out = self.kernel.ms_deform_attn(self.tensors[0], SHAPES, self.tensors[1], self.tensors[2])

    def verify_released(self) -> torch.Tensor:
        return ms_deform_attn_reference(self.tensors[0], SHAPES, self.tensors[1], self.tensors[2])


if __name__ == "__main__":
    main()
