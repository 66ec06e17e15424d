"""Layers and branches of the ViT decoders, which convert the anchors' latents to states on a grid."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .anchor_encoder_vfmtok import VFMTokAttention
from .autoencoder_config_vfmtok import AutoencoderConfigMixin


class VFMTokSwiGLU(nn.Module):
    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.decoder_intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.decoder_intermediate_size)
        self.down_proj = nn.Linear(config.decoder_intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class VFMTokViTDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = VFMTokAttention(config, config.decoder_num_heads, config.decoder_dropout)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = VFMTokSwiGLU(config)

    def forward(self, hidden_states: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        """`hidden_states` `(batch_size, length, hidden_size)`; `lengths` as in [`VFMTokAttention`]."""
        hidden_states = hidden_states + self.self_attn(self.self_attn_norm(hidden_states), lengths)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class VFMTokViTDecoderBase(nn.Module):
    """
    The two branches of queries after the anchors' memory in a ViT decoder: mask tokens for the positions of the image grid, and
    mask tokens for the features of the vision model. Both start with a CLS token.

    Args:
        config ([`AutoencoderConfigMixin`]): widths and grids.
        feature_channels (`int`): channels of the features to reconstruct.
    """

    def __init__(self, config: AutoencoderConfigMixin, feature_channels: int):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.anchor_position_embeddings = nn.Parameter(torch.empty(1, config.num_anchors, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.feature_grid_size**2, width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.image_mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.feature_mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.image_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(VFMTokViTDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.feature_head = nn.Linear(width, feature_channels)

    def image_position_embeddings(self) -> torch.Tensor:
        """Position table at the image branch's grid, `(1, 1 + image_grid_size ** 2, hidden_size)`, class entry first."""
        return self.position_embeddings

    def image_queries(self) -> torch.Tensor:
        """`(1, 1 + image_grid_size ** 2, hidden_size)`, CLS first."""
        return self.image_norm(self._queries(self.image_mask_token, self.image_position_embeddings()))

    def feature_queries(self) -> torch.Tensor:
        """`(1, 1 + feature_grid_size ** 2, hidden_size)`, CLS first."""
        return self.feature_norm(self._queries(self.feature_mask_token, self.position_embeddings))

    def _queries(self, mask_token: torch.Tensor, position_embeddings: torch.Tensor) -> torch.Tensor:
        mask_tokens = mask_token.expand(-1, position_embeddings.shape[1] - 1, -1)
        return torch.cat([self.cls_token, mask_tokens], dim=1) + position_embeddings

    def _to_grid(self, states: torch.Tensor) -> torch.Tensor:
        # batch_size, 1 + side*side, hidden_size -> batch_size, hidden_size, side, side
        side = self.config.image_grid_size
        grid = states[:, 1:].transpose(1, 2).reshape(states.shape[0], -1, side, side)
        # A transposed view would switch the CNN to channels-last layout, where the CPU's float32 group norm is ten times
        # less accurate.
        return grid.contiguous()


def cosine_loss(reconstructed_features: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cosine similarity between `reconstructed_features` and `features`, both `(batch_size, positions, channels)`."""
    return (1 - F.cosine_similarity(reconstructed_features.float(), features.float(), dim=-1, eps=1e-6)).mean()


__all__ = ["VFMTokViTDecoderBase", "VFMTokViTDecoderLayer", "cosine_loss"]
