"""
Images to tokens and back: the straightforward float32 graph against ours; preprocessing and memory beside it.

    python benchmarks/images.py --batch-size 1
    python benchmarks/images.py --measure preprocessing memory --batch-size 8

Random weights of the released tokenizer (DINOv2-L, 336 x 336). The straightforward side runs the same modules as torch
has them, upsampling as the original does, without a compiled kernel. Each side has a process of its own, in which ours
keeps freed memory. `limit` is the share of the arithmetic that a large matrix product in the same dtype reaches in the
same run, oneDNN's if that is the faster one; all sides are counted the straightforward one's operations.

`preprocessing` compares the image processor, in one thread, to `encode` in the fastest form: images per second of each.
`memory` is what a process of its own holds at most while it encodes or decodes, less what it held before: the activations.
"""

import argparse
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import SideProcess, alternate, flop_counter, in_fresh_process, machine, memory, show_table
from original_upsampling import original_upsampling
from PIL import Image
from torch import nn

from vfmtok_hf import VFMTokConfig, VFMTokImageProcessor, VFMTokModel, disable_kernels, enable_kernels
from vfmtok_hf.cpu.packing import PackedLinear, keep_freed_memory, pack_weights
from vfmtok_hf.hub_kernels import active_implementation


def arithmetic_limit(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product of 2048^3."""
    linear = nn.Linear(2048, 2048, bias=False).to(dtype)
    packed, inputs = PackedLinear(linear), torch.randn(2048, 2048).to(dtype)
    with torch.no_grad():
        seconds = alternate({"plain": lambda: F.linear(inputs, linear.weight), "packed": lambda: packed(inputs)}, 7)
    return 2 * 2048**3 / min(seconds.values())


# Names of our sides; dtype, and whether the compiled kernel is on.
GRAPH_SIDES = {
    f"packed {str(dtype).removeprefix('torch.')}{', kernel' if with_kernel else ''}": (dtype, with_kernel)
    for dtype in (torch.float32, torch.bfloat16)
    for with_kernel in (False, True)
}


def random_tokenizer() -> VFMTokModel:
    torch.manual_seed(0)
    return VFMTokModel(VFMTokConfig()).eval()


def build_graph(side: str, batch_size: int, threads: int) -> Callable[[str], None]:
    """Runs a part of the tokenizer by its name."""
    torch.set_num_threads(threads)
    model = disable_kernels(random_tokenizer())
    is_ours = side in GRAPH_SIDES
    if is_ours:
        keep_freed_memory()
        dtype, with_kernel = GRAPH_SIDES[side]
        model.to(dtype)
        if with_kernel:
            enable_kernels(model)
        pack_weights(model)
        print(f"{side}: {active_implementation(model)}", flush=True)
    parts = graph_parts(model, batch_size)
    upsampling = nullcontext if is_ours else original_upsampling

    def run(part: str) -> None:
        with upsampling():
            parts[part]()

    return torch.no_grad()(run)


def graph_parts(model: VFMTokModel, batch_size: int) -> dict[str, Callable[[], object]]:
    images = torch.randn(batch_size, 3, model.config.image_size, model.config.image_size).clamp(-1, 1)
    image_tokens = torch.randint(model.config.codebook_size, (batch_size, model.config.num_anchors))
    return {
        "vision model": lambda: model.extract_vision_features(images),
        "encode": lambda: model.encode(images),
        "decode": lambda: model.decode(image_tokens=image_tokens),
    }


def count_operations(batch_size: int) -> dict[str, int]:
    counts = {}
    with torch.no_grad(), original_upsampling():
        for part, run in graph_parts(disable_kernels(random_tokenizer()), batch_size).items():
            with flop_counter() as counter:
                run()
            counts[part] = counter.get_total_flops()
    return counts


def measure_graphs(batch_size: int, runs: int) -> None:
    limits = {torch.float32: arithmetic_limit(torch.float32), torch.bfloat16: arithmetic_limit(torch.bfloat16)}
    print({str(dtype): f"{limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items()})
    operations, threads = count_operations(batch_size), torch.get_num_threads()
    names = ["straightforward float32", *GRAPH_SIDES]
    sides = {name: SideProcess(build_graph, name, batch_size, threads) for name in names}
    for part, count in operations.items():
        seconds = alternate({name: partial(side, part) for name, side in sides.items()}, runs)
        table = [
            {
                "part": part,
                "threads": threads,
                "batch": batch_size,
                "side": name,
                "seconds per image": f"{time / batch_size:.3f}",
                "limit": f"{count / time / limits[dtype_of(name)]:.0%}",
                "times straightforward": f"{seconds['straightforward float32'] / time:.2f}",
            }
            for name, time in seconds.items()
        ]
        show_table("images", table)
    for process in sides.values():
        process.close()


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def jpeg(width: int, height: int) -> bytes:
    """A smooth random picture, encoded."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_preprocessing(batch_size: int, runs: int, config: VFMTokConfig) -> None:
    """JPEG files in memory to `pixel_values`, and those to image tokens."""
    torch.manual_seed(0)
    processor = VFMTokImageProcessor(size=config.image_size)
    model = pack_weights(enable_kernels(VFMTokModel(config).eval().to(torch.bfloat16)))
    pixel_values = torch.randn(batch_size, 3, config.image_size, config.image_size).clamp(-1, 1)
    files = {f"{width} x {height}": jpeg(width, height) for width, height in ((500, 375), (1024, 768), (4000, 3000))}
    sides = {
        f"decode and preprocess {size}": partial(preprocess, processor, [file] * batch_size)
        for size, file in files.items()
    }
    with torch.no_grad():
        seconds = alternate({"encode, packed bfloat16": partial(model.encode, pixel_values), **sides}, runs)
    encode = seconds["encode, packed bfloat16"]
    table = [
        {
            "threads": torch.get_num_threads(),
            "batch": batch_size,
            "side": side,
            "images/s": f"{batch_size / time:.2f}",
            "times encode": f"{encode / time:.1f}",
        }
        for side, time in seconds.items()
    ]
    show_table("preprocessing", table)


def preprocess(processor: VFMTokImageProcessor, files: list[bytes]) -> torch.Tensor:
    images = [Image.open(io.BytesIO(file)) for file in files]
    return processor(images, return_tensors="pt")["pixel_values"]


MEMORY_SIDES = {
    "straightforward float32": (torch.float32, False),
    "packed float32": (torch.float32, True),
    "packed bfloat16": (torch.bfloat16, True),
}


def measure_memory(batch_size: int) -> None:
    threads, table = torch.get_num_threads(), []
    for part in ("encode", "decode"):
        for side in MEMORY_SIDES:
            result = in_fresh_process(__file__, "--peak-of", part, side, batch_size, threads)
            row = {"part": part, "threads": threads, "batch": batch_size, "side": side}
            table.append(
                {
                    **row,
                    "peak MB above the model": f"{result['bytes'] / 1e6:.0f}",
                    "MB per image": f"{result['bytes'] / 1e6 / batch_size:.0f}",
                }
            )
    show_table("image_memory", table)


def print_peak(part: str, side: str, batch_size: int, config: VFMTokConfig) -> None:
    dtype, packed = MEMORY_SIDES[side]
    model = VFMTokModel(config).eval().to(dtype)
    if packed:
        pack_weights(model)
        keep_freed_memory()
    images = torch.zeros(batch_size, 3, config.image_size, config.image_size)
    image_tokens = torch.zeros(batch_size, config.num_anchors, dtype=torch.int64)
    before = reset_peak()
    with torch.no_grad(), nullcontext() if packed else original_upsampling():
        model.encode(images) if part == "encode" else model.decode(image_tokens=image_tokens)
    print(json.dumps({"bytes": memory("VmHWM") - before}))


def reset_peak() -> int:
    """Building a model may have needed more than running it: from here on `VmHWM` counts anew, from what is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--measure",
        choices=["graphs", "preprocessing", "memory"],
        nargs="+",
        default=["graphs", "preprocessing", "memory"],
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        part, side, batch_size, threads = arguments.peak_of
        torch.set_num_threads(int(threads))
        print_peak(part, side, int(batch_size), VFMTokConfig())
        return
    torch.set_num_threads(arguments.threads)
    print(machine())
    if "graphs" in arguments.measure:
        measure_graphs(arguments.batch_size, arguments.runs)
    if "preprocessing" in arguments.measure:
        measure_preprocessing(arguments.batch_size, arguments.runs, VFMTokConfig())
    if "memory" in arguments.measure:
        measure_memory(arguments.batch_size)


if __name__ == "__main__":
    main()
