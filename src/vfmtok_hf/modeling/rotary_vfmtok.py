"""The 2-D rotary embedding of image tokens on their grid."""

import torch


def rotary_table(positions: torch.Tensor, grid_size: int, head_dim: int, theta: float) -> torch.Tensor:
    """
    Factors of the 2-D rotary embedding for positions of the sequence [class, image tokens in raster order].

    The first half of the rotated pairs encodes the token's row, the second half its column. At the class position, cosine *and*
    sine are zero, as in the original. Its query and key are then zero, so its attention logit is 0 for every token.

    Args:
        positions (`torch.LongTensor` of shape `(length,)`): 0 is the class, 1 + i image token i.
        grid_size (`int`): image tokens per side of their grid.
        head_dim (`int`): width of an attention head.
        theta (`float`): base of the frequencies.

    Returns:
        `torch.Tensor` of shape `(2, length, head_dim)`, float32: for each pair of entries, their factor, `(cos, cos)`, and that
        of the other entry, `(-sin, sin)`.
    """
    axis_dim = head_dim // 2
    frequencies = theta ** (-torch.arange(0, axis_dim, 2, dtype=torch.float32, device=positions.device) / axis_dim)
    token = positions - 1
    rows, columns = token.div(grid_size, rounding_mode="floor"), token.remainder(grid_size)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    cosines, sines = angles.cos(), angles.sin()
    factors = torch.stack([torch.stack([cosines, cosines], dim=-1), torch.stack([-sines, sines], dim=-1)])
    return factors.flatten(-2) * (token >= 0)[:, None]


def apply_rotary(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """
    Rotate the neighboring pairs (2j, 2j + 1) of `states` `(batch_size, heads, length, head_dim)` by a `table` as of
    [`rotary_table`], in float32.
    """
    own_factors, other_factors = table
    entries = states.float()
    # Not a stack of both rotated entries, which torch.compile turns into kernels of its own.
    others = entries.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (entries * own_factors + others * other_factors).to(states.dtype)


__all__ = ["apply_rotary", "rotary_table"]
