"""
Encode and decode images: the straightforward float32 graph against ours. Also preprocessing and memory.

    python benchmarks/images.py --batch-sizes 1
    python benchmarks/images.py --measure preprocessing memory --batch-sizes 8
    python benchmarks/images.py --model vfmae

The models have random weights: the released tokenizer (DINOv2-L, 336 x 336) or VFMAE (256 x 256, graphs only). The
straightforward side runs the same modules in plain torch, upsamples like the original, and uses no compiled kernel. Each side
runs in its own process; ours keeps freed memory. bfloat16 is skipped if the machine does not support it in hardware. With
`--device cuda`, nothing is packed and only the graphs are measured.

`limit` is the throughput relative to a large matrix multiplication in the same dtype and run (oneDNN's if it is faster). Every
side is credited with the operations of the straightforward one.

`preprocessing` compares images per second of the image processor, in one thread, with the fastest `encode`. `memory` is the
peak memory of a process while it encodes or decodes, minus its memory before: the activations.
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
from measuring import (
    SideProcess,
    add_machine_options,
    alternate,
    arithmetic_limit,
    flop_counter,
    in_fresh_process,
    machine,
    median_seconds,
    memory,
    name_of,
    usable_dtypes,
)
from original_upsampling import original_upsampling
from PIL import Image
from random_models import random_tokenizer, tokenizer_config, vfmae_config
from result_tables import show_table

from vfmtok_hf import (
    VFMAEConfig,
    VFMAEModel,
    VFMTokConfig,
    VFMTokImageProcessor,
    VFMTokModel,
    disable_kernels,
    enable_kernels,
)
from vfmtok_hf.cpu.packing import keep_freed_memory, pack_weights
from vfmtok_hf.hub_kernels import active_implementation
from vfmtok_hf.modeling.modeling_vfmtok import MultiScaleDeformableAttention


STRAIGHTFORWARD = "straightforward float32"


def graph_sides(device: str) -> list[str]:
    """The straightforward side, and ours in each dtype, without and, where there is one, with the compiled kernel."""
    attention = enable_kernels(MultiScaleDeformableAttention(), device=device)
    is_compiled = active_implementation(attention).startswith("compiled")
    kernels = ("", ", kernel") if is_compiled else ("",)
    prefix = "packed" if device == "cpu" else "ours"
    ours = [f"{prefix} {name_of(dtype)}{kernel}" for dtype in usable_dtypes(device) for kernel in kernels]
    return [STRAIGHTFORWARD, *ours]


def dtype_of(side: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in side else torch.float32


def build_graph(
    side: str, batch_size: int, threads: int, device: str, config: VFMTokConfig | VFMAEConfig
) -> Callable[[str], None]:
    """A function that runs the named part of the model."""
    torch.set_num_threads(threads)
    model = disable_kernels(random_tokenizer(config, device)).to(dtype_of(side))
    if side.endswith("kernel"):
        enable_kernels(model)
    if side != STRAIGHTFORWARD and device == "cpu":
        keep_freed_memory()
        pack_weights(model)
    print(f"{side}: {active_implementation(model)}", flush=True)
    parts = graph_parts(model, batch_size)
    upsampling = original_upsampling if side == STRAIGHTFORWARD else nullcontext

    def run(part: str) -> None:
        with upsampling():
            parts[part]()

    return torch.no_grad()(run)


def graph_parts(model: VFMTokModel | VFMAEModel, batch_size: int) -> dict[str, Callable[[], object]]:
    config = model.config
    with model.device:
        images = torch.randn(batch_size, 3, config.image_size, config.image_size).clamp(-1, 1)
        if isinstance(config, VFMAEConfig):
            codes = torch.randn(batch_size, *config.latent_shape)
        else:
            codes = torch.randint(config.codebook_size, (batch_size, config.num_anchors))
    return {
        "vision model": lambda: model.extract_vision_features(images),
        "encode": lambda: model.encode(images),
        "decode": lambda: model.decode(codes),
    }


def count_operations(config: VFMTokConfig | VFMAEConfig, batch_size: int, device: str) -> dict[str, int]:
    counts = {}
    with torch.no_grad(), original_upsampling():
        for part, run in graph_parts(disable_kernels(random_tokenizer(config, device)), batch_size).items():
            with flop_counter() as counter:
                run()
            counts[part] = counter.get_total_flops()
    return counts


def measure_graphs(batch_size: int, runs: int, device: str, config: VFMTokConfig | VFMAEConfig) -> None:
    limits = {dtype: arithmetic_limit(dtype, device) for dtype in usable_dtypes(device)}
    print({name_of(dtype): f"{limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items()})
    operations = count_operations(config, batch_size, device)
    threads = torch.get_num_threads()
    sides = {
        name: SideProcess(build_graph, name, batch_size, threads, device, config, device=device)
        for name in graph_sides(device)
    }
    for part, count in operations.items():
        seconds = alternate({name: partial(side, part) for name, side in sides.items()}, runs)
        table = [
            {
                "part": part,
                "threads": threads,
                "batch": batch_size,
                "side": name,
                "seconds per image": f"{time / batch_size:.2g}" if device == "cuda" else f"{time / batch_size:.3f}",
                "limit": f"{count / time / limits[dtype_of(name)]:.0%}",
                "times straightforward": f"{seconds[STRAIGHTFORWARD] / time:.2f}",
            }
            for name, time in seconds.items()
        ]
        show_table("images_vfmae" if isinstance(config, VFMAEConfig) else "images", table)
    for process in sides.values():
        process.close()


def jpeg(width: int, height: int) -> bytes:
    """A smooth random picture, encoded."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_preprocessing(batch_size: int, runs: int, config: VFMTokConfig) -> None:
    """JPEG files in memory to `pixel_values`, and those to image tokens."""
    processor = VFMTokImageProcessor(size=config.image_size)
    dtype = usable_dtypes("cpu")[-1]
    model = pack_weights(enable_kernels(random_tokenizer(config).to(dtype)))
    pixel_values = torch.randn(batch_size, 3, config.image_size, config.image_size).clamp(-1, 1)
    files = {f"{width} x {height}": jpeg(width, height) for width, height in ((500, 375), (1024, 768), (4000, 3000))}
    encode = f"encode, packed {name_of(dtype)}"
    sides = {encode: partial(model.encode, pixel_values)}
    sides |= {
        f"decode and preprocess {size}": partial(preprocess, processor, [file] * batch_size)
        for size, file in files.items()
    }
    with torch.no_grad():
        seconds = median_seconds(sides, runs)
    table = [
        {
            "threads": torch.get_num_threads(),
            "batch": batch_size,
            "side": side,
            "images/s": f"{batch_size / time:.2f}",
            "times encode": f"{seconds[encode] / time:.1f}",
        }
        for side, time in seconds.items()
    ]
    show_table("preprocessing", table)


def preprocess(processor: VFMTokImageProcessor, files: list[bytes]) -> torch.Tensor:
    images = [Image.open(io.BytesIO(file)) for file in files]
    return processor(images, return_tensors="pt")["pixel_values"]


def memory_sides() -> list[str]:
    return [STRAIGHTFORWARD, *(f"packed {name_of(dtype)}" for dtype in usable_dtypes("cpu"))]


def measure_memory(batch_size: int, tiny: bool) -> None:
    threads, table = torch.get_num_threads(), []
    for part in ("encode", "decode"):
        for side in memory_sides():
            options = ["--tiny"] if tiny else []
            result = in_fresh_process(__file__, "--peak-of", part, side, batch_size, threads, *options)
            table.append(
                {
                    "part": part,
                    "threads": threads,
                    "batch": batch_size,
                    "side": side,
                    "peak MB above the model": f"{result['bytes'] / 1e6:.0f}",
                    "MB per image": f"{result['bytes'] / 1e6 / batch_size:.0f}",
                }
            )
    show_table("image_memory", table)


def print_peak(part: str, side: str, batch_size: int, config: VFMTokConfig) -> None:
    model = VFMTokModel(config).eval().to(dtype_of(side))
    if side != STRAIGHTFORWARD:
        pack_weights(model)
        keep_freed_memory()
    images = torch.zeros(batch_size, 3, config.image_size, config.image_size)
    image_tokens = torch.zeros(batch_size, config.num_anchors, dtype=torch.int64)
    before = reset_peak()
    with torch.no_grad(), original_upsampling() if side == STRAIGHTFORWARD else nullcontext():
        model.encode(images) if part == "encode" else model.decode(image_tokens=image_tokens)
    print(json.dumps({"bytes": memory("VmHWM") - before}))


def reset_peak() -> int:
    """Building a model may have needed more than running it: from here on `VmHWM` counts anew, from what is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    measures = ["graphs", "preprocessing", "memory"]
    parser.add_argument("--measure", choices=measures, nargs="+", help="default: all, on CUDA and of VFMAE the graphs")
    parser.add_argument("--model", choices=["tokenizer", "vfmae"], default="tokenizer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    add_machine_options(parser)
    arguments = parser.parse_args()
    is_vfmae = arguments.model == "vfmae"
    config = (vfmae_config if is_vfmae else tokenizer_config)(arguments.tiny)
    if arguments.peak_of:
        part, side, batch_size, threads = arguments.peak_of
        torch.set_num_threads(int(threads))
        print_peak(part, side, int(batch_size), config)
        return
    torch.set_num_threads(arguments.threads)
    print(machine(arguments.device))
    wanted = arguments.measure or (measures if arguments.device == "cpu" and not is_vfmae else ["graphs"])
    if is_vfmae and wanted != ["graphs"]:
        parser.error("of --model vfmae the graphs alone are measured")
    for batch_size in arguments.batch_sizes:
        if "graphs" in wanted:
            measure_graphs(batch_size, arguments.runs, arguments.device, config)
        if "preprocessing" in wanted:
            measure_preprocessing(batch_size, arguments.runs, config)
        if "memory" in wanted:
            measure_memory(batch_size, arguments.tiny)


if __name__ == "__main__":
    main()
