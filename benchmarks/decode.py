"""
Decoding of image tokens: the original's loop against ours, plain and with packed weights, without and with guidance.

    python benchmarks/decode.py --model AR-B --dtype float32 --batch-sizes 1 8 32

`--compile` adds compiled layers. `--busy` spins on a second core meanwhile, as another program would. `--only` takes
the sides that are named, so that a piece stays short. Random weights of the released sizes. `limit` is the share of the
memory bandwidth that a plain large matrix-vector product of torch reaches in the same run: bytes of weights and of filled
cache that a step has to read, over its time.
"""

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator
from functools import partial

import torch
from measuring import alternate, machine, matrix_vector_bandwidth, seconds_of, show_table
from original_decode import OriginalDecoder, OriginalRARDecoder

from vfmtok_hf import VFMTokARConfig, VFMTokARForImageGeneration, VFMTokRARConfig, VFMTokRARForImageGeneration
from vfmtok_hf.cpu.packing import AdaptiveThreads, pack_weights
from vfmtok_hf.modeling.modeling_vfmtok_rar import ROWS_OF_MODULATIONS


Generator = VFMTokARForImageGeneration | VFMTokRARForImageGeneration
FAMILIES = {
    "AR": (VFMTokARConfig, VFMTokARForImageGeneration, OriginalDecoder),
    "RAR": (VFMTokRARConfig, VFMTokRARForImageGeneration, OriginalRARDecoder),
}


def random_generator(name: str, dtype: torch.dtype) -> Generator:
    """`name` as in AR-B or RAR-L."""
    family, variant = name.split("-")
    config_class, model_class, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class.from_variant(variant)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model.to(dtype)


def bytes_per_step(model: Generator, rows: int, steps: int) -> float:
    """Weights that a step has to read, those read once for several steps in part, and on average the filled part of the cache."""
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if "embed" not in name}
    modulations = sum(size for name, size in sizes.items() if "modulation" in name)
    weights = sum(sizes.values()) - modulations + modulations / max(ROWS_OF_MODULATIONS // rows, 1)
    config = model.config
    position = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return weights + rows * position * (steps + 1) / 2


def draw(model: Generator, class_labels: torch.Tensor, steps: int, scale: float) -> None:
    model.generate(class_labels, guidance_scale=scale, callback=lambda step, _: step + 1 < steps)


def draw_adapting(model: Generator, class_labels: torch.Tensor, steps: int, scale: float) -> None:
    with AdaptiveThreads() as threads:

        def after_step(step: int, image_tokens: torch.Tensor) -> bool:
            threads()
            return step + 1 < steps

        model.generate(class_labels, guidance_scale=scale, callback=after_step)


def spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """With a process beside this one that never rests, if `wanted`."""
    if not wanted:
        yield
        return
    other = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default="AR-B", help="AR-B, AR-L, ..., RAR-L, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="1 is none")
    parser.add_argument("--steps", type=int, default=256, help="tokens of each image, 256 being a whole one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="measure the compiled step too")
    parser.add_argument("--busy", action="store_true", help="keep another core busy meanwhile")
    parser.add_argument("--only", nargs="+", help="sides to measure besides the original")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    bandwidth = matrix_vector_bandwidth(dtype)
    print(f"{machine()}; matrix-vector product {bandwidth / 1e9:.1f} GB/s")
    model, packed = random_generator(arguments.model, dtype), pack_weights(random_generator(arguments.model, dtype))
    original_decoder = FAMILIES[arguments.model.split("-")[0]][2]
    sides = {
        "original": original_decoder(model).generate,
        "ours": partial(draw, model),
        "ours, packed": partial(draw, packed),
        "ours, packed, adaptive": partial(draw_adapting, packed),
    }
    if arguments.compile:
        compiled = random_generator(arguments.model, dtype)
        compiled.compile_decoding()
        print(f"compiled for one row in {seconds_of(partial(draw, compiled, torch.arange(1), 4, 1.0)):.0f} s")
        sides["ours, compiled"] = partial(draw, compiled)
    if arguments.only:
        sides = {name: side for name, side in sides.items() if name == "original" or name in arguments.only}
    for batch_size in arguments.batch_sizes:
        for scale in arguments.guidance:
            calls = {
                name: partial(side, torch.arange(batch_size), arguments.steps, scale) for name, side in sides.items()
            }
            with busy_core(arguments.busy):
                seconds = alternate(calls, arguments.runs)
            rows = batch_size * (2 if scale > 1 else 1)
            table = [
                {
                    "model": arguments.model,
                    "dtype": arguments.dtype,
                    "threads": arguments.threads,
                    "batch": batch_size,
                    "guidance": scale,
                    "other core": "busy" if arguments.busy else "idle",
                    "side": name,
                    "tokens/s": f"{batch_size * arguments.steps / time:.1f}",
                    "images/s": f"{batch_size * arguments.steps / time / model.config.num_image_tokens:.3f}",
                    "limit": f"{bytes_per_step(model, rows, arguments.steps) * arguments.steps / time / bandwidth:.0%}",
                    "times the original": f"{seconds['original'] / time:.2f}",
                }
                for name, time in seconds.items()
            ]
            show_table("decode", table)


if __name__ == "__main__":
    main()
