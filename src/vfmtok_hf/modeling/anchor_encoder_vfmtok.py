"""
The anchor encoder: anchor queries gather the feature levels of a vision model into one state per image token.

The deformable attention is that of Deformable DETR (arXiv 2010.04159); the layers follow
https://github.com/CVMI-Lab/VFMTok (Apache-2.0).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_vfmtok import causal_mask, eager_attention_forward
from .autoencoder_config_vfmtok import AutoencoderConfigMixin


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast if it is enabled. Some devices do not support it, and exported graphs should not contain it."""
    # torch 2.9 cannot compile `is_autocast_available`; devices that it compiles for support autocast.
    is_available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    if is_available and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class MultiScaleDeformableAttention(nn.Module):
    """
    The sampling operation of deformable attention in plain PyTorch, and the reference for compiled layers that replace its
    `forward` from outside. It has no parameters, and its signature is that of the layer in transformers.

    Source: Deformable DETR (arXiv 2010.04159), equation 3.
    """

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        """
        Args:
            value (`torch.Tensor` of shape `(batch_size, sum of height * width, heads, head_dim)`):
                Features of all levels, flattened and concatenated.
            value_spatial_shapes (`torch.LongTensor` of shape `(levels, 2)`), level_start_index (`(levels,)`):
                Height, width and start of each level, for compiled layers.
            value_spatial_shapes_list (`list[tuple[int, int]]`):
                The same heights and widths as a Python list.
            sampling_locations (`torch.Tensor` of shape `(batch_size, queries, heads, levels, points, 2)`):
                (x, y), where the image is [0, 1]^2; locations outside of it read zeros.
            attention_weights (`torch.Tensor` of shape `(batch_size, queries, heads, levels, points)`).
            im2col_step (`int`):
                Batch chunk of the original CUDA kernel, for compiled layers that use it.

        Returns:
            `torch.Tensor` of shape `(batch_size, queries, heads * head_dim)`.
        """
        batch_size, _, num_heads, head_dim = value.shape
        num_queries = sampling_locations.shape[1]
        levels = value.split([height * width for height, width in value_spatial_shapes_list], dim=1)
        # In half precision, locations would be off by up to a tenth of a cell, and torch's CPU `grid_sample` reads past
        # the end of strided half-precision maps.
        dtype = torch.promote_types(value.dtype, torch.float32)
        sampling_grids = 2 * sampling_locations.to(dtype) - 1
        samples_by_level = []
        for index, (level, (height, width)) in enumerate(zip(levels, value_spatial_shapes_list, strict=True)):
            # batch_size, height*width, heads, head_dim -> batch_size*heads, head_dim, height, width
            level = level.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, height, width)
            # batch_size, queries, heads, points, 2 -> batch_size*heads, queries, points, 2
            grid = sampling_grids[:, :, :, index].transpose(1, 2).flatten(0, 1)
            samples_by_level.append(
                F.grid_sample(level.to(dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            )
        # levels x (batch_size*heads, head_dim, queries, points) -> batch_size*heads, head_dim, queries, levels*points
        samples = torch.cat(samples_by_level, dim=-1)
        # batch_size, queries, heads, levels, points -> batch_size*heads, 1, queries, levels*points
        weights = attention_weights.transpose(1, 2).reshape(batch_size * num_heads, 1, num_queries, -1)
        output = (samples * weights).sum(-1).to(value.dtype)
        # batch_size*heads, head_dim, queries -> batch_size, queries, heads*head_dim
        return output.view(batch_size, num_heads * head_dim, num_queries).transpose(1, 2).contiguous()


class VFMTokDeformableAttention(nn.Module):
    """Cross-attention of the anchors to a few learned sampling locations on every feature level."""

    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__()
        self.num_heads = config.encoder_num_heads
        self.num_levels = len(config.vision_feature_layers)
        self.num_points = config.encoder_num_points
        locations = self.num_heads * self.num_levels * self.num_points
        self.sampling_offsets = nn.Linear(config.hidden_size, 2 * locations)
        self.attention_weights = nn.Linear(config.hidden_size, locations)
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.sampler = MultiScaleDeformableAttention()

    def forward(
        self,
        hidden_states: torch.Tensor,
        reference_points: torch.Tensor,
        features: torch.Tensor,
        spatial_shapes_list: list[tuple[int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch_size, num_queries, _ = hidden_states.shape
        spatial_shapes = torch.tensor(spatial_shapes_list).to(hidden_states.device)
        level_sizes = spatial_shapes.prod(1)
        value = self.value_proj(features).view(batch_size, features.shape[1], self.num_heads, -1)

        # queries, 2*heads*levels*points -> queries, heads, levels, points, (x, y): offsets in cells of the level
        offsets = self.sampling_offsets(hidden_states).view(
            batch_size, num_queries, self.num_heads, self.num_levels, self.num_points, 2
        )
        cells = spatial_shapes.flip(-1).to(offsets.dtype)[:, None]
        sampling_locations = reference_points[:, None, None, None] + offsets / cells

        weights = self.attention_weights(hidden_states).view(batch_size, num_queries, self.num_heads, -1)
        weights = weights.softmax(-1).view(sampling_locations.shape[:-1])

        output = self.sampler(
            value,
            spatial_shapes,
            spatial_shapes_list,
            level_sizes.cumsum(0) - level_sizes,
            sampling_locations,
            weights,
            # Kernels that use the step require that it divides the batch, as the whole batch does.
            batch_size,
        )
        return self.output_proj(output), sampling_locations, weights


class VFMTokAttention(nn.Module):
    """Multi-head self-attention with biases, causal if configured."""

    def __init__(self, config: AutoencoderConfigMixin, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.is_causal = config.is_causal
        self.head_dim = config.hidden_size // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`).
            lengths (`list[int]`, *optional*):
                Lengths of the parts of a causal sequence: a prefix and several branches. A branch sees the prefix and itself.
        """
        # batch_size, length, hidden_size -> batch_size, heads, length, head_dim
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        states = [
            projection(hidden_states).view(heads).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        if lengths is None:
            return self.o_proj(self._attend(*states))
        # Every branch repeats the prefix's attention, which is cheap, so that each call is causal. A mask over all
        # branches would prevent fast attention kernels and compute all masked pairs.
        prefix, *branches = zip(*(state.split(lengths, dim=2) for state in states), strict=True)
        first, *others = (
            self._attend(*(torch.cat(parts, dim=2) for parts in zip(prefix, branch, strict=True)))
            for branch in branches
        )
        return self.o_proj(torch.cat([first, *(other[:, lengths[0] :] for other in others)], dim=1))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`(batch_size, heads, length, head_dim)` three times -> `(batch_size, length, hidden_size)`."""
        attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(
            self,
            query,
            key,
            value,
            causal_mask(self.config, query.transpose(1, 2)) if self.is_causal else None,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
        )
        return output.flatten(2)


class VFMTokMLP(nn.Module):
    """ReLU MLP of the anchor encoder."""

    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.encoder_intermediate_size)
        self.fc2 = nn.Linear(config.encoder_intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(hidden_states)))


class VFMTokAnchorEncoderLayer(GradientCheckpointingLayer):
    """Deformable cross-attention, self-attention, MLP; each followed by its norm (post-norm)."""

    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__()
        self.cross_attn = VFMTokDeformableAttention(config)
        self.cross_attn_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = VFMTokAttention(config, config.encoder_num_heads)
        self.self_attn_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = VFMTokMLP(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        reference_points: torch.Tensor,
        features: torch.Tensor,
        spatial_shapes_list: list[tuple[int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # In mixed precision, the original computes both attentions in the precision of the weights.
        dtype = self.cross_attn.value_proj.weight.dtype
        with without_autocast(hidden_states.device):
            attended, sampling_locations, attention_weights = self.cross_attn(
                (hidden_states + position_embeddings).to(dtype),
                reference_points.to(dtype),
                features.to(dtype),
                spatial_shapes_list,
            )
        hidden_states = self.cross_attn_norm(hidden_states + attended)
        with without_autocast(hidden_states.device):
            # Queries, keys and values all include the position.
            attended = self.self_attn((hidden_states + position_embeddings).to(dtype))
        hidden_states = self.self_attn_norm(hidden_states + attended)
        hidden_states = self.mlp_norm(hidden_states + self.mlp(hidden_states))
        return hidden_states, sampling_locations, attention_weights


class VFMTokFeatureProjector(nn.Module):
    """Project one feature level to the encoder's width. The two consecutive norms are those of the original."""

    def __init__(self, config: AutoencoderConfigMixin, num_channels: int):
        super().__init__()
        self.fc1 = nn.Linear(num_channels, config.hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.output_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden_states = F.relu(self.norm1(self.fc1(features)))
        return self.output_norm(self.norm2(self.fc2(hidden_states)))


class VFMTokAnchorEncoder(nn.Module):
    """
    Anchor queries gather the vision features of all levels into one state per image token (paper, section 3.2).

    Args:
        config (`AutoencoderConfigMixin`): sizes of the encoder and number of anchors.
        num_channels (`list[int]`): channels of each feature level.
    """

    def __init__(self, config: AutoencoderConfigMixin, num_channels: list[int]):
        super().__init__()
        self.config = config
        self.projectors = nn.ModuleList(VFMTokFeatureProjector(config, channels) for channels in num_channels)
        self.anchor_queries = nn.Parameter(torch.empty(1, config.num_anchors, config.hidden_size))
        self.anchor_position_embeddings = nn.Parameter(torch.empty(1, config.num_anchors, config.hidden_size))
        self.query_norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(VFMTokAnchorEncoderLayer(config) for _ in range(config.encoder_num_layers))

    def reference_points(self, device: torch.device) -> torch.Tensor:
        """Centers of the anchor grid's cells in row-major order, `(num_anchors, 2)` as (x, y) in [0, 1]^2, on `device`."""
        side = self.config.anchor_grid_size
        centers = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
        return torch.cartesian_prod(centers, centers).flip(-1)

    def forward(
        self, vision_features: list[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Args:
            vision_features (`list[torch.Tensor]`): one `(batch_size, channels, height, width)` per level.

        Returns:
            Anchor states `(batch_size, num_anchors, hidden_size)`; sampling locations and attention weights per layer.
        """
        spatial_shapes_list = [(level.shape[-2], level.shape[-1]) for level in vision_features]
        # levels x (batch_size, channels, height, width) -> batch_size, sum of height*width, hidden_size
        features = torch.cat(
            [
                projector(level.flatten(2).transpose(1, 2))
                for projector, level in zip(self.projectors, vision_features, strict=True)
            ],
            dim=1,
        )
        reference_points = self.reference_points(features.device)
        hidden_states = self.query_norm(self.anchor_queries).expand(features.shape[0], -1, -1)
        sampling_locations, attention_weights = [], []
        for layer in self.layers:
            hidden_states, locations, weights = layer(
                hidden_states, self.anchor_position_embeddings, reference_points, features, spatial_shapes_list
            )
            sampling_locations.append(locations)
            attention_weights.append(weights)
        return hidden_states, tuple(sampling_locations), tuple(attention_weights)


__all__ = ["MultiScaleDeformableAttention", "VFMTokAnchorEncoder"]
