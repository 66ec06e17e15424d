"""The pixel decoder: VQGAN's CNN decoder (arXiv 2012.09841), which turns a grid of states into an image."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .autoencoder_config_vfmtok import AutoencoderConfigMixin


class VFMTokResnetBlock(nn.Module):
    def __init__(self, config: AutoencoderConfigMixin, in_channels: int, out_channels: int):
        super().__init__()
        groups = config.pixel_decoder_num_groups
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.shortcut(hidden_states) + residual


class VFMTokPixelAttention(nn.Module):
    """Single-head attention over all positions of the coarsest grid."""

    def __init__(self, config: AutoencoderConfigMixin, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.pixel_decoder_num_groups, channels, eps=1e-6)
        self.q_proj = nn.Conv2d(channels, channels, 1)
        self.k_proj = nn.Conv2d(channels, channels, 1)
        self.v_proj = nn.Conv2d(channels, channels, 1)
        self.o_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        # batch_size, channels, height, width -> batch_size, 1, height*width, channels
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return hidden_states + self.o_proj(attended.squeeze(1).transpose(1, 2).reshape(hidden_states.shape))


class VFMTokPixelMidBlock(nn.Module):
    def __init__(self, config: AutoencoderConfigMixin, channels: int):
        super().__init__()
        self.resnet_in = VFMTokResnetBlock(config, channels, channels)
        self.attention = VFMTokPixelAttention(config, channels)
        self.resnet_out = VFMTokResnetBlock(config, channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resnet_out(self.attention(self.resnet_in(hidden_states)))


class VFMTokPixelUpsample(nn.Conv2d):
    """
    Repeat each pixel 2 x 2 times and apply a 3 x 3 convolution, with 4/9 of the multiplications.

    Only 2 x 2 of the nine input pixels of an output pixel differ. The weights of equal pixels are summed first, which leaves a
    2 x 2 convolution of the small image for each of the four positions within a repeated pixel.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # place in the row, place in the column, output channel, input channel, 2, 2
        weight = add_equal_taps(add_equal_taps(self.weight, dim=-2), dim=-1)
        weight = weight.permute(2, 1, 0, 3, 4, 5).flatten(0, 2)
        bias = self.bias.repeat_interleave(4, dim=0)  # type: ignore[union-attr]
        # The 2 x 2 positions surround a corner between pixels; the outermost ones are outside of the image.
        return F.pixel_shuffle(F.conv2d(hidden_states, weight, bias, padding=1), 2)[..., 1:-1, 1:-1]


def add_equal_taps(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """
    Reduce three taps along a negative `dim` to two, for the last position of a repeated pixel and the first of the next. The
    result has these two as its first dimension.
    """
    before, middle, after = weight.unbind(dim)
    return torch.stack([torch.stack([before + middle, after], dim), torch.stack([before, middle + after], dim)])


class VFMTokPixelUpBlock(GradientCheckpointingLayer):
    """Residual blocks of one resolution, followed by upsampling except at the last resolution."""

    def __init__(self, config: AutoencoderConfigMixin, in_channels: int, out_channels: int, is_last: bool):
        super().__init__()
        channels = [in_channels] + [out_channels] * (config.pixel_decoder_num_res_blocks + 1)
        self.resnets = nn.ModuleList(
            VFMTokResnetBlock(config, before, after) for before, after in zip(channels[:-1], channels[1:], strict=True)
        )
        self.upsample = nn.Identity() if is_last else VFMTokPixelUpsample(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
        return self.upsample(hidden_states)


class VFMTokPixelDecoder(nn.Module):
    """
    The CNN of VQGAN's decoder, from a grid of states to an image that is `config.upsampling_factor` times as large.

    Args:
        config (`AutoencoderConfigMixin`): channels, residual blocks and groups of the norms.
    """

    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__()
        channels = [config.pixel_decoder_base_channels * m for m in reversed(config.pixel_decoder_channel_multipliers)]
        self.conv_in = nn.Conv2d(config.hidden_size, channels[0], 3, padding=1)
        self.mid_block = VFMTokPixelMidBlock(config, channels[0])
        self.up_blocks = nn.ModuleList(
            VFMTokPixelUpBlock(config, before, after, is_last=index == len(channels) - 1)
            for index, (before, after) in enumerate(zip([channels[0], *channels[:-1]], channels, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.pixel_decoder_num_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` `(batch_size, hidden_size, grid, grid)` -> `(batch_size, 3, image_size, image_size)`."""
        hidden_states = self.mid_block(self.conv_in(hidden_states))
        for block in self.up_blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


__all__ = ["VFMTokPixelDecoder"]
