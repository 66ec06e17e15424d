"""
Images to tokens and back: the straightforward float32 graph against ours; preprocessing and memory beside it.

    python benchmarks/images.py --batch-size 1
    python benchmarks/images.py --measure preprocessing memory --batch-size 8

Random weights of the released tokenizer (DINOv2-L, 336 x 336). The straightforward side runs the same modules as torch
has them, without a compiled kernel. `limit` is the share of the arithmetic that a large matrix product in the same
dtype reaches in the same run, oneDNN's if that is the faster one.

`preprocessing` compares the image processor, in one thread, to `encode` in the fastest form: images per second of each.
`memory` is what a process of its own holds at most while it encodes or decodes, less what it held before: the activations.
"""

import argparse
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import alternate, flop_counter, in_fresh_process, machine, memory, show_table
from PIL import Image
from torch import nn

from vfmtok_hf import VFMTokConfig, VFMTokImageProcessor, VFMTokModel, disable_kernels, enable_kernels
from vfmtok_hf.cpu_inference import PackedLinear, pack_weights
from vfmtok_hf.hub_kernels import active_implementation


def arithmetic_limit(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product of 2048^3."""
    linear = nn.Linear(2048, 2048, bias=False).to(dtype)
    packed, inputs = PackedLinear(linear), torch.randn(2048, 2048).to(dtype)
    with torch.no_grad():
        seconds = alternate({"plain": lambda: F.linear(inputs, linear.weight), "packed": lambda: packed(inputs)}, 7)
    return 2 * 2048**3 / min(seconds.values())


def measure_graphs(batch_size: int, runs: int) -> None:
    torch.manual_seed(0)
    plain = disable_kernels(VFMTokModel(VFMTokConfig()).eval())
    models = {"straightforward float32": plain}
    for dtype in (torch.float32, torch.bfloat16):
        for with_kernel in (False, True):
            model = VFMTokModel(plain.config).eval()
            model.load_state_dict(plain.state_dict())
            (enable_kernels if with_kernel else disable_kernels)(model.to(dtype))
            name = f"packed {str(dtype).removeprefix('torch.')}{', kernel' if with_kernel else ''}"
            models[name] = pack_weights(model)
    limits = {torch.float32: arithmetic_limit(torch.float32), torch.bfloat16: arithmetic_limit(torch.bfloat16)}
    print({str(dtype): f"{limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items()})
    print("kernel:", active_implementation(models["packed float32, kernel"]))

    images = torch.randn(batch_size, 3, plain.config.image_size, plain.config.image_size).clamp(-1, 1)
    with torch.no_grad():
        image_tokens = plain.encode(images).image_tokens
        parts = {
            "vision model": lambda model: model.extract_vision_features(images),
            "encode": lambda model: model.encode(images),
            "decode": lambda model: model.decode(image_tokens=image_tokens),
        }
        for part, run in parts.items():
            with flop_counter() as counter:
                run(plain)
            seconds = alternate({name: partial(run, model) for name, model in models.items()}, runs)
            table = [
                {
                    "part": part,
                    "threads": torch.get_num_threads(),
                    "batch": batch_size,
                    "side": name,
                    "seconds per image": f"{time / batch_size:.3f}",
                    "limit": f"{counter.get_total_flops() / time / limits[dtype_of(name)]:.0%}",
                    "times straightforward": f"{seconds['straightforward float32'] / time:.2f}",
                }
                for name, time in seconds.items()
            ]
            show_table("images", table)


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
    images = torch.zeros(batch_size, 3, config.image_size, config.image_size)
    image_tokens = torch.zeros(batch_size, config.num_anchors, dtype=torch.int64)
    before = reset_peak()
    with torch.no_grad():
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
