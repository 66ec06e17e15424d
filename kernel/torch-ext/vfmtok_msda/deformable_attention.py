"""The operators, their shapes for tracing and their gradients, and the function that users call."""

from typing import List, Sequence, Tuple

import torch

from ._ops import add_op_namespace_prefix, ops


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: Sequence[Tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of bilinear samples of every level (Deformable DETR, Zhu et al. 2021, equation 3 without its projections).

    Differentiable once in the three tensors. Tensors of different floating dtypes are promoted to the widest, as
    `torch.nn.functional.grid_sample` does under autocast. Samples outside a level see zeros; a sample whose location is
    not finite counts as outside, and its gradient is zero.

    Args:
        value: `(batch, positions, heads, channels)`, the levels one after another, each in row-major order.
        spatial_shapes: `(height, width)` of each level.
        sampling_locations: `(batch, queries, heads, levels, points, 2)` as `(x, y)`, in `[0, 1]` inside the level.
        attention_weights: `(batch, queries, heads, levels, points)`.

    Returns:
        `(batch, queries, heads * channels)`

    Raises:
        ValueError: shapes or devices do not match.
        TypeError: the dtype is none of float32, float64, float16 and bfloat16.
    """
    dtype = torch.promote_types(torch.promote_types(value.dtype, sampling_locations.dtype), attention_weights.dtype)
    flat_shapes = [side for height_and_width in spatial_shapes for side in height_and_width]
    return ops.ms_deform_attn_forward(
        value.to(dtype), flat_shapes, sampling_locations.to(dtype), attention_weights.to(dtype)
    )


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_forward"))
def _forward_fake(
    value: torch.Tensor,
    spatial_shapes: List[int],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, sampling_locations.shape[1], heads * channels))


@torch.library.register_fake(add_op_namespace_prefix("ms_deform_attn_backward"))
def _backward_fake(
    grad_output: torch.Tensor,
    value: torch.Tensor,
    spatial_shapes: List[int],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        value.new_empty(value.shape),
        sampling_locations.new_empty(sampling_locations.shape),
        attention_weights.new_empty(attention_weights.shape),
    )


def _save_for_backward(ctx, inputs, output):
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output: torch.Tensor):
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = ops.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


torch.library.register_autograd(
    add_op_namespace_prefix("ms_deform_attn_forward"), _backward, setup_context=_save_for_backward
)
