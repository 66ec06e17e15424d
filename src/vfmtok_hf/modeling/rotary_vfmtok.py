"""The 2-D rotary embedding of image tokens on their grid."""

import torch


def rotary_table(positions: torch.Tensor, grid_size: int, head_dim: int, theta: float) -> torch.Tensor:
    """
    Cosines and sines of the 2-D rotary embedding for positions of the sequence [class, image tokens in raster order].

    The first half of the rotated pairs encodes the token's row, the second half its column. At the class position, cosine *and*
    sine are zero, as in the original. Its query and key are then zero, so its attention logit is 0 for every token.

    Args:
        positions (`torch.LongTensor` of shape `(length,)`): 0 is the class, 1 + i image token i.
        grid_size (`int`): image tokens per side of their grid.
        head_dim (`int`): width of an attention head.
        theta (`float`): base of the frequencies.

    Returns:
        `torch.Tensor` of shape `(2, length, head_dim / 2)`, float32.
    """
    axis_dim = head_dim // 2
    frequencies = theta ** (-torch.arange(0, axis_dim, 2, dtype=torch.float32, device=positions.device) / axis_dim)
    token = positions - 1
    rows, columns = token.div(grid_size, rounding_mode="floor"), token.remainder(grid_size)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]) * (token >= 0)[:, None]


def apply_rotary(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """
    Rotate the neighboring pairs (2j, 2j + 1) of `states` `(batch_size, heads, length, head_dim)` by a `table` as of
    [`rotary_table`], in float32.
    """
    cosines, sines = table
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


__all__ = ["apply_rotary", "rotary_table"]
