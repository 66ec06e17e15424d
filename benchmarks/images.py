"""
Images to tokens and back: the straightforward float32 graph against ours.

    python benchmarks/images.py --batch-size 1

Random weights of the released tokenizer (DINOv2-L, 336 x 336). The straightforward side runs the same modules as torch
has them, without a compiled kernel. `limit` is the share of the arithmetic that a large matrix product in the same
dtype reaches in the same run, oneDNN's if that is the faster one.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from measuring import alternate, flop_counter, machine, write_table
from torch import nn

from vfmtok_hf import VFMTokConfig, VFMTokModel, disable_kernels, enable_kernels
from vfmtok_hf.cpu_inference import PackedLinear, pack_weights
from vfmtok_hf.hub_kernels import active_implementation


def arithmetic_limit(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product of 2048^3."""
    linear = nn.Linear(2048, 2048, bias=False).to(dtype)
    packed, inputs = PackedLinear(linear), torch.randn(2048, 2048).to(dtype)
    with torch.no_grad():
        seconds = alternate({"plain": lambda: F.linear(inputs, linear.weight), "packed": lambda: packed(inputs)}, 7)
    return 2 * 2048**3 / min(seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

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
    print(machine(), {str(dtype): f"{limit / 1e9:.0f} GFLOP/s" for dtype, limit in limits.items()})
    print("kernel:", active_implementation(models["packed float32, kernel"]))

    images = torch.randn(arguments.batch_size, 3, plain.config.image_size, plain.config.image_size).clamp(-1, 1)
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
            seconds = alternate({name: partial(run, model) for name, model in models.items()}, arguments.runs)
            table = [
                {
                    "part": part,
                    "threads": arguments.threads,
                    "batch": arguments.batch_size,
                    "side": name,
                    "seconds per image": f"{time / arguments.batch_size:.3f}",
                    "limit": f"{counter.get_total_flops() / time / limits[dtype_of(name)]:.0%}",
                    "times straightforward": f"{seconds['straightforward float32'] / time:.2f}",
                }
                for name, time in seconds.items()
            ]
            for row in table:
                print(*row.values(), sep="  ", flush=True)
            write_table("images", table)


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "bfloat16" in name else torch.float32


if __name__ == "__main__":
    main()
