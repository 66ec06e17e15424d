"""
Measure how speed and memory scale: decoding with batch size, model size, threads and tokens per image; `vfmtok tokenize` with
the number of images.

    python benchmarks/scaling.py

Decoding is in float32 with packed, random weights. Each sweep changes one setting of: AR-B, one
image, all threads, 256 tokens per image, of which the first 32 are sampled. The sweep over tokens per image samples all of
them. `vfmtok tokenize` runs in its own process with the checkpoint of the package, on random PNG files of 96 x 96 pixels; its
memory is the peak of the whole process. Tables go to `results/`, plots to docs/assets.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import in_fresh_process, machine, median_seconds, memory, seconds_of
from PIL import Image
from random_models import random_generator
from result_tables import show_table

from vfmtok_hf import VFMTokARConfig, VFMTokARForImageGeneration
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.plotting import BLUE, ORANGE, save_figure


ASSETS = Path(__file__).parents[1] / "docs" / "assets"
STEPS = 32
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKENS_PER_IMAGE = (64, 144, 256, 576)
MODEL_SIZES = ("B", "L", "XL")
IMAGES = (10, 100, 1000, 10_000)


def packed_generator(config: VFMTokARConfig) -> VFMTokARForImageGeneration:
    return pack_weights(random_generator(config))


def draw(model: VFMTokARForImageGeneration, batch_size: int = 1, steps: int = STEPS, threads: int = 0) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    model.generate(torch.arange(batch_size), callback=lambda step, _: step + 1 < steps)


def sweep(
    axis: str, tokens: dict[int, int], sides: dict[int, Callable[[], None]], runs: int
) -> list[dict[str, object]]:
    """Rows of one axis. Each side samples `tokens` tokens."""
    seconds = median_seconds({str(value): side for value, side in sides.items()}, runs)
    return [
        {"axis": axis, "side": value, "seconds": f"{seconds[str(value)]:.3f}", "tokens/s": f"{count / seconds[str(value)]:.1f}"}
        for value, count in tokens.items()
    ]  # fmt: skip


def measure_decoding(runs: int) -> list[dict[str, object]]:
    threads = torch.get_num_threads()
    base = packed_generator(VFMTokARConfig.from_variant("B"))
    table = sweep(
        "images at once",
        {size: size * STEPS for size in BATCH_SIZES},
        {size: partial(draw, base, batch_size=size) for size in BATCH_SIZES},
        runs,
    )
    counts = range(1, threads + 1)
    table += sweep(
        "threads",
        dict.fromkeys(counts, STEPS),
        {count: partial(draw, base, threads=count) for count in counts},
        runs,
    )
    torch.set_num_threads(threads)
    configs = [VFMTokARConfig.from_variant("B", num_image_tokens=count) for count in TOKENS_PER_IMAGE]
    table += sweep(
        "tokens per image",
        {count: count for count in TOKENS_PER_IMAGE},
        {config.num_image_tokens: partial(draw, packed_generator(config), steps=config.num_image_tokens) for config in configs},
        runs,
    )  # fmt: skip
    models = {}
    for size in MODEL_SIZES:
        config = VFMTokARConfig.from_variant(size)
        with torch.device("meta"):
            millions = round(VFMTokARForImageGeneration(config).num_parameters() / 1e6)
        models[millions] = partial(draw, packed_generator(config))
    return table + sweep("million parameters", dict.fromkeys(models, STEPS), models, runs)


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((96, 96)).save(folder / f"{number:05d}.png", compress_level=1)


def print_tokenizing(folder: str, output: str) -> None:
    from vfmtok_hf.cli import app

    seconds = seconds_of(lambda: app(["tokenize", folder, "--output", output], standalone_mode=False))
    print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM")}))


def measure_tokenizing(counts: Sequence[int]) -> list[dict[str, object]]:
    table = []
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            images = Path(temporary, "images")
            images.mkdir()
            write_images(images, count)
            result = in_fresh_process(__file__, "--tokenize", images, Path(temporary, "tokens.safetensors"))
        table.append(
            {
                "side": count,
                "seconds": f"{result['seconds']:.2f}",
                "images/s": f"{count / result['seconds']:.1f}",
                "peak MB": f"{result['bytes'] / 1e6:.0f}",
            }
        )
    return table


def decoding_figure(table: list[dict[str, object]]) -> Figure:
    """Plot tokens per second along each axis."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes_names = list(dict.fromkeys(row["axis"] for row in table))
    for axes, name in zip(figure.subplots(2, 2).flat, axes_names, strict=True):
        rows = [row for row in table if row["axis"] == name]
        values = [row["side"] for row in rows]
        axes.plot(values, [float(row["tokens/s"]) for row in rows], color=BLUE, marker="o")
        if name == "images at once":
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values], minor=False)
        axes.set(xlabel=name, ylabel="tokens/s", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(f"AR generator, float32, packed: {machine()}", fontsize=10)
    return figure


def tokenizing_figure(table: list[dict[str, object]]) -> Figure:
    """Plot seconds and peak memory over the number of images."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    counts = [row["side"] for row in table]
    for axes, column, color in zip(figure.subplots(1, 2), ("seconds", "peak MB"), (BLUE, ORANGE), strict=True):
        axes.plot(counts, [float(row[column]) for row in table], color=color, marker="o")
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set(xlabel="images", ylabel=column)
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.axes[1].set_ylim(0, None)
    figure.suptitle(f"vfmtok tokenize, emoji checkpoint: {machine()}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokenize", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokenize:
        print_tokenizing(*arguments.tokenize)
        return
    torch.set_num_threads(arguments.threads)
    print(machine())
    decoding = measure_decoding(arguments.runs)
    show_table("scaling_decoding", decoding)
    save_figure(decoding_figure(decoding), ASSETS / "scaling_decoding.png")
    tokenizing = measure_tokenizing(IMAGES)
    show_table("scaling_tokenize", tokenizing)
    save_figure(tokenizing_figure(tokenizing), ASSETS / "scaling_tokenize.png")


if __name__ == "__main__":
    main()
