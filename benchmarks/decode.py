"""
Decoding of image tokens: the original's loop against ours, plain and with packed weights, without and with guidance.

    python benchmarks/decode.py --model AR-B --dtype float32 --batch-sizes 1 8 32

The models have random weights at the released sizes. `--compile` adds compiled steps, and `--modes` adds others in these modes
of torch.compile. `--ahead` only compiles them, all batch sizes in parallel processes, and fills torch's cache for a later run.
`--busy` keeps a second core busy, as another program would. `--only` restricts a run to the named sides. `--device cuda` skips
packed weights, which are for CPUs only.

`limit` is the achieved share of the memory bandwidth: the bytes of weights and filled cache that a step must read, divided by
its time, relative to a large matrix-vector multiplication (on CUDA, a copy) in the same run. Set
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` to restrict torch and oneDNN to AVX2, with a TORCHINDUCTOR_CACHE_DIR of its
own for `--compile`: torch's cache does not distinguish instruction sets, and code from the other run gave NaN.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measuring import add_machine_options, machine, median_seconds, memory_bandwidth
from original_decode import OriginalDecoder, OriginalRARDecoder
from random_models import MODEL_CLASSES, Generator, GeneratorConfig, generator_config, random_generator
from result_tables import show_table

from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.modeling.modeling_vfmtok_rar import ROWS_OF_MODULATIONS


Side = Callable[[torch.Tensor, int, float], object]
ORIGINAL_DECODERS = {"AR": OriginalDecoder, "RAR": OriginalRARDecoder}


def step_bytes(config: GeneratorConfig, dtype: torch.dtype, rows: int, steps: int) -> float:
    """Bytes that a step reads: weights (divided by the number of steps that share them) and the mean filled part of the cache."""
    with torch.device("meta"):
        parameters = MODEL_CLASSES[type(config)](config).named_parameters()
    sizes = {name: parameter.numel() * dtype.itemsize for name, parameter in parameters if "embed" not in name}
    modulations = sum(size for name, size in sizes.items() if "modulation" in name)
    weights = sum(sizes.values()) - modulations + modulations / max(ROWS_OF_MODULATIONS // rows, 1)
    position = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize
    return weights + rows * position * (steps + 1) / 2


def draw(model: Generator, class_labels: torch.Tensor, steps: int, scale: float) -> None:
    model.generate(class_labels, guidance_scale=scale, callback=lambda step, _: step + 1 < steps)


def spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """If `wanted`, run a second process that keeps a core busy."""
    if not wanted:
        yield
        return
    other = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.kill()


def build_sides(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Side]:
    """Functions of class labels, steps and guidance."""
    build = partial(random_generator, generator_config(arguments.model, arguments.tiny), dtype, arguments.device)
    model = build()
    sides = {
        "original": ORIGINAL_DECODERS[arguments.model.split("-")[0]](model).generate,
        "ours": partial(draw, model),
    }
    if arguments.device == "cpu":
        sides["ours, packed"] = partial(draw, pack_weights(build()))
    for name, options in compile_options(arguments).items():
        sides[name] = compiled_side(arguments, dtype, **options)
    return {name: side for name, side in sides.items() if name == "original" or name in (arguments.only or sides)}


def compile_options(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Options of `compile_decoding` for each compiled side."""
    by_default = {"ours, compiled": {}} if arguments.compile else {}
    return by_default | {f"ours, compiled, {mode}": {"mode": mode} for mode in arguments.modes}


def compiled_side(arguments: argparse.Namespace, dtype: torch.dtype, **options: str) -> Side:
    model = random_generator(generator_config(arguments.model, arguments.tiny), dtype, arguments.device)
    model.compile_decoding(**options)
    return partial(draw, model)


def compile_ahead(arguments: argparse.Namespace, dtype: torch.dtype, steps: int) -> None:
    # By default each process would start as many others as there are cores.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=compile_steps, args=(arguments, dtype, steps, batch_size))
        for batch_size in arguments.batch_sizes
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


def compile_steps(arguments: argparse.Namespace, dtype: torch.dtype, steps: int, batch_size: int) -> None:
    torch.set_num_threads(arguments.threads)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=arguments.device)
    for options in compile_options(arguments).values():
        compiled_side(arguments, dtype, **options)(labels, steps, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default="AR-B", help="AR-B, AR-L, ..., RAR-L, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="1 is off")
    parser.add_argument("--steps", type=int, help="tokens per image; default: all")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled step")
    parser.add_argument(
        "--modes", nargs="+", default=[], help="modes of torch.compile to measure too, e.g. max-autotune"
    )
    parser.add_argument("--ahead", action="store_true", help="only compile, without guidance")
    parser.add_argument("--busy", action="store_true", help="keep another core busy")
    parser.add_argument("--only", nargs="+", help="sides to measure besides the original")
    add_machine_options(parser)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    config = generator_config(arguments.model, arguments.tiny)
    steps = arguments.steps or config.num_image_tokens
    if arguments.ahead:
        compile_ahead(arguments, dtype, steps)
    bandwidth = memory_bandwidth(dtype, arguments.device)
    print(f"{machine(arguments.device)}; memory {bandwidth / 1e9:.1f} GB/s", flush=True)
    sides = build_sides(arguments, dtype)
    for batch_size in arguments.batch_sizes:
        labels = torch.arange(batch_size, device=arguments.device) % config.num_classes
        for scale in arguments.guidance:
            calls = {name: partial(side, labels, steps, scale) for name, side in sides.items()}
            with busy_core(arguments.busy):
                seconds = median_seconds(calls, arguments.runs, arguments.device)
            rows = batch_size * (2 if scale > 1 else 1)
            table = [
                {
                    "model": arguments.model,
                    "dtype": arguments.dtype,
                    "instruction set": torch.backends.cpu.get_cpu_capability() if arguments.device == "cpu" else "",
                    "threads": arguments.threads,
                    "batch": batch_size,
                    "guidance": scale,
                    "other core": "busy" if arguments.busy else "idle",
                    "side": name,
                    "tokens/s": f"{batch_size * steps / time:.1f}",
                    "images/s": f"{batch_size * steps / time / config.num_image_tokens:.3f}",
                    "limit": f"{step_bytes(config, dtype, rows, steps) * steps / time / bandwidth:.0%}",
                    "times the original": f"{seconds['original'] / time:.2f}",
                }
                for name, time in seconds.items()
            ]
            show_table("decode", table)


if __name__ == "__main__":
    main()
