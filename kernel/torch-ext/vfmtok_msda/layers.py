from typing import List, Tuple

import torch
from torch import nn

from .deformable_attention import ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Drop-in for the layer of this name in transformers' Deformable DETR family and in VFMTok.

    The level sizes are taken from `value_spatial_shapes_list`, as in the pure-torch layer. `value_spatial_shapes` and
    `level_start_index`, which repeat them on the device, are not read, to avoid synchronization. `im2col_step`
    has no effect: any batch is processed at once.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: List[Tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


__all__ = ["MultiScaleDeformableAttention"]
