"""
Profile the hot paths: sampling tokens, encoding and decoding images, training steps.

    python benchmarks/hot_paths.py --dtype float32

Prints the share of wall time per kind of operation, measured by torch's profiler on packed random weights at the released
sizes. The training steps are those of training_step.py. Time outside of operations is Python and the profiler itself.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from decode import draw
from measuring import machine, seconds_of
from random_models import generator_config, random_generator, random_tokenizer, tokenizer_config
from result_tables import write_table
from torch.profiler import ProfilerActivity, profile
from training_step import BATCH_SIZES, build_step

from vfmtok_hf.cpu.packing import keep_freed_memory, pack_weights


# An operation belongs to the first kind with a word that occurs in its name.
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "bmm"),
    "linear layers": ("linear", "mm"),
    "convolutions": ("conv",),
    "norms": ("norm",),
    "deformable sampling": ("grid_sampler", "msda"),
    "resizing": ("upsample", "pixel_shuffle"),
    "dropout": ("bernoulli",),
    "optimizer": ("adam",),
    "softmax and drawing": ("softmax", "cumsum", "searchsorted", "amax", "uniform"),
    "copies": ("copy", "cat", "stack", "clone", "fill", "empty", "zero"),
}
ELEMENTWISE, PYTHON = "elementwise and the rest", "Python"


def kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), ELEMENTWISE)


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Share of the wall time of each kind of operation, the largest first."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = seconds_of(run)
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / seconds
    kinds[PYTHON] = max(1 - sum(kinds.values()), 0)
    return dict(kinds.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--models", nargs="*", default=["AR-B", "RAR-L"], help="that draw")
    parser.add_argument("--training", nargs="*", default=["tokenizer", "AR-B", "RAR-B"], help="steps of these")
    parser.add_argument("--steps", type=int, default=24, help="tokens to draw")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    print(machine())

    keep_freed_memory()
    for name in arguments.models:
        generator = pack_weights(random_generator(generator_config(name), dtype))
        for rows in (1, 8):
            report(
                f"{name}, batch {rows}", arguments, partial(draw, generator, torch.arange(rows), arguments.steps, 1.0)
            )
    report_images(arguments, dtype)
    for name in arguments.training:
        batch_size = BATCH_SIZES[name]
        step = build_step(name, "ours", dtype, batch_size, arguments.threads)
        report(f"training step, {name}, batch {batch_size}", arguments, step)


@torch.no_grad()
def report_images(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    tokenizer = pack_weights(random_tokenizer(tokenizer_config()).to(dtype))
    images = torch.randn(1, 3, 336, 336).clamp(-1, 1)
    image_tokens = tokenizer.encode(images).image_tokens
    report("encode", arguments, partial(tokenizer.encode, images))
    report("decode", arguments, partial(tokenizer.decode, image_tokens=image_tokens))


def report(path: str, arguments: argparse.Namespace, run: Callable[[], object]) -> None:
    """Print and save the kinds that take at least 1 %."""
    found = [(kind, share) for kind, share in shares(run).items() if share >= 0.01]
    described = ", ".join(f"{kind} {share:.0%}" for kind, share in found)
    print(f"{path}: {described}", flush=True)
    row = {"dtype": arguments.dtype, "threads": arguments.threads, "side": path, "where the time goes": described}
    write_table("hot_paths", [row])


if __name__ == "__main__":
    main()
