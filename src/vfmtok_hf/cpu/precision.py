"""The dtype in which this CPU is fastest."""

import time

import torch
from torch import nn

from vfmtok_hf.cpu.packing import PackedLinear, can_pack


SPEEDUP = 1.2  # a smaller speedup does not justify bfloat16's rounding
MANY_ROWS = 512  # of encoding, decoding and training, which arithmetic limits and not the reading of weights


def is_bfloat16_faster(rows: int) -> bool:
    """
    Whether this CPU computes linear layers faster in bfloat16 than in float32. Both are timed, in about a second.

    The answer depends on the input: processors without bfloat16 units still read its weights in half the time, which
    decides for a single row, but convert them for each block of rows.

    Args:
        rows (`int`): of the input, such as the number of images in a decode step, twice that with guidance.
    """
    return SPEEDUP * seconds_of_linear(torch.bfloat16, rows) < seconds_of_linear(torch.float32, rows)


@torch.no_grad()
def seconds_of_linear(dtype: torch.dtype, rows: int) -> float:
    """The shortest time of five calls of a linear layer, with packed weights if the machine has a product for them."""
    # The weight of few rows is larger than most caches, as those of a whole model are.
    size = 512 if rows >= MANY_ROWS else 4096
    linear = nn.Linear(size, size, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.ones(size, size, dtype=dtype))
    layer = PackedLinear(linear) if can_pack(linear) else linear
    inputs, durations = torch.ones(rows, size, dtype=dtype), []
    for _ in range(5):
        started = time.perf_counter()
        layer(inputs)
        durations.append(time.perf_counter() - started)
    return min(durations)


__all__ = ["MANY_ROWS", "is_bfloat16_faster"]
