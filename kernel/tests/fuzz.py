"""Compare random calls of the CPU kernel with plain torch. Meant for the sanitizer build, which stops at any invalid read.

    make kernel-fuzz

Sizes, dtypes, strides and locations are sampled from seeds. The output names the seed, so `--first` repeats a failure. A third of
the cases use locations that are not finite, far outside, or exactly on borders and pixel centers. Another tenth use mismatched
arguments, which must be refused.
"""

from __future__ import annotations

import argparse
import random

import torch
from reference import load_kernel, ms_deform_attn_reference, random_inputs


DTYPES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
STRANGE = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 65504.0, 0.0, 1.0, -0.0, 1e-45]


def draw_sizes(draw: random.Random) -> dict:
    levels = draw.choice([1, 1, 2, 3, 4, 7])
    return {
        "batch": draw.choice([0, 1, 1, 2, 3, 5]),
        "queries": draw.choice([0, 1, 2, 5, 17, 33]),
        "heads": draw.choice([1, 2, 3, 8]),
        "channels": draw.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 129]),
        "spatial_shapes": [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(levels)],
        "points": draw.choice([0, 1, 2, 4, 9]),
    }


def place_strangely(locations: torch.Tensor, shapes: list, draw: random.Random) -> None:
    """Overwrite some coordinates with non-finite and huge ones, borders, and exact pixel centers."""
    flat = locations.view(-1)
    for index in range(0, flat.numel(), draw.randint(1, 4)):
        height, _ = draw.choice(shapes)
        on_a_pixel = (draw.randint(-2, height + 1) + 0.5) / height
        flat[index] = draw.choice([*STRANGE, on_a_pixel, on_a_pixel])


def shuffle_strides(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    order = list(range(tensor.dim()))
    draw.shuffle(order)
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(inverse)


def break_arguments(arguments: list, draw: random.Random) -> list:
    """Make one argument contradict the others."""
    value, shapes, locations, weights = arguments
    longer = [value, [*shapes, (1, 1)], locations, weights]
    taller = [value, [(shapes[0][0] + 1, shapes[0][1]), *shapes[1:]], locations, weights]
    negative = [value, [(-shapes[0][0], -shapes[0][1]), *shapes[1:]], locations, weights]
    fewer_positions = [value[:, 1:], shapes, locations, weights]
    more_heads = [torch.cat([value, value], 2), shapes, locations, weights]
    more_queries = [value, shapes, torch.cat([locations, locations[:, :1], locations[:, :1]], 1), weights]
    candidates = [longer, taller, negative, fewer_positions, more_heads]
    return draw.choice([*candidates, more_queries] if locations.shape[1] else candidates)


def run_case(msda, seed: int) -> str:
    draw = random.Random(seed)
    sizes = draw_sizes(draw)
    dtype = draw.choice(list(DTYPES))
    shapes = sizes["spatial_shapes"]
    tensors = random_inputs(**sizes, dtype=dtype, seed=seed, margin=draw.choice([0.0, 0.2, 3.0]))
    strange = draw.random() < 1 / 3
    if strange:
        place_strangely(tensors[1], shapes, draw)
    tensors = [shuffle_strides(tensor, draw).requires_grad_() for tensor in tensors]
    if draw.random() < 0.1:
        try:
            msda.ms_deform_attn(*break_arguments([tensors[0], shapes, *tensors[1:]], draw))
        except ValueError:
            return "refused"
        raise AssertionError("arguments that do not fit were accepted")

    output = msda.ms_deform_attn(tensors[0], shapes, *tensors[1:])
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    results = [output, *torch.autograd.grad(output, tensors, grad_output)]
    if not strange:
        compare(results, tensors, shapes, grad_output, DTYPES[dtype])
        return "compared"
    assert all(torch.isfinite(result).all() for result in results), "a location that is nowhere left a trace"
    return "strange locations"


def compare(results, tensors, shapes, grad_output, tolerance: float) -> None:
    if tensors[2].numel() == 0 or grad_output.numel() == 0:
        assert not any(result.any() for result in results)
        return
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = ms_deform_attn_reference(exact[0], shapes, *exact[1:])
    expected = [output, *torch.autograd.grad(output, exact, grad_output.double())]
    # Exactly one pixel outside, the gradient is one-sided: grid_sample's is not zero, the original CUDA kernel's and ours
    # are. Half-precision locations do fall there.
    sides = torch.tensor(shapes).flip(1)[:, None]
    one_outside = (exact[1].detach() * sides - 0.5 == -1).any(-1, keepdim=True).expand_as(exact[1])
    for locations_gradient in (results[2], expected[2]):
        locations_gradient[one_outside] = 0
    for result, reference in zip(results, expected, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(result.double() / scale, reference / scale, rtol=tolerance, atol=tolerance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    arguments = parser.parse_args()
    msda = load_kernel("cpu")
    counts: dict = {}
    for seed in range(arguments.first, arguments.first + arguments.cases):
        try:
            outcome = run_case(msda, seed)
        except Exception as error:
            raise SystemExit(f"seed {seed}: {error}") from error
        counts[outcome] = counts.get(outcome, 0) + 1
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{arguments.cases} cases on {torch.backends.cpu.get_cpu_capability()}: {summary}")


if __name__ == "__main__":
    main()
