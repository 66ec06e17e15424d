"""
The paper's baseline: a VQGAN, whose encoder is trained from scratch on pixels and has more tokens.

It differs from VFMTok only in its encoder. Codebook, ViT decoder, pixel decoder and the losses on pixels and codebook are VFMTok's.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf import VFMTokConfig, VFMTokModel
from vfmtok_hf.modeling.autoencoder_vfmtok import resize_for_vision_model
from vfmtok_hf.modeling.pixel_decoder_vfmtok import VFMTokPixelMidBlock, VFMTokResnetBlock


class PixelEncoder(nn.Module):
    """
    VQGAN's encoder (arXiv 2012.09841), the mirror image of the pixel decoder. It takes the place of the anchor encoder.

    Args:
        config (`VFMTokConfig`): channels, residual blocks and groups of the norms are those of the pixel decoder.
    """

    def __init__(self, config: VFMTokConfig):
        super().__init__()
        channels = [config.pixel_decoder_base_channels * m for m in config.pixel_decoder_channel_multipliers]
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.Sequential()
        for level, after in enumerate(channels):
            before = channels[max(level - 1, 0)]
            if level:
                self.down_blocks.append(nn.Conv2d(before, before, 3, stride=2, padding=1))
            for block in range(config.pixel_decoder_num_res_blocks):
                self.down_blocks.append(VFMTokResnetBlock(config, after if block else before, after))
        self.mid_block = VFMTokPixelMidBlock(config, channels[-1])
        self.norm_out = nn.GroupNorm(config.pixel_decoder_num_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.hidden_size, 3, padding=1)

    def forward(self, pixels: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[()], tuple[()]]:
        """
        Args:
            pixels (`list[torch.Tensor]`): one level, `(batch_size, 3, side, side)` in [-1, 1].

        Returns:
            States `(batch_size, num_anchors, hidden_size)` in raster order, and no sampling locations or weights.
        """
        hidden_states = self.mid_block(self.down_blocks(self.conv_in(pixels[0])))
        states = self.conv_out(F.silu(self.norm_out(hidden_states)))
        return states.flatten(2).transpose(1, 2), (), ()


class VQGANModel(VFMTokModel):
    """
    VFMTok with `PixelEncoder`. Images are resized such that each token stands for as many pixels as a position of the pixel
    decoder's grid, 4 x 4 in `tokenizer.yaml`: 32 x 32 images are encoded at 36 x 36 to 9 x 9 tokens. (The original encodes at
    384 x 384 what VFMTok encodes at 336 x 336.)

    Args:
        config (`VFMTokConfig`):
            With `save_vision_model=False` and `feature_loss_weight=0`. Its vision model sets only the shapes of parameters
            that are equal in both models.
    """

    def __init__(self, config: VFMTokConfig):
        super().__init__(config)
        self.vision_model = nn.Identity()
        self.anchor_encoder = PixelEncoder(config)
        self.post_init()

    def extract_vision_features(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Resize `pixel_values` `(batch_size, 3, height, width)` for the encoder; there is no vision model."""
        side = self.config.anchor_grid_size * self.config.upsampling_factor
        return [resize_for_vision_model(pixel_values.float(), side)]


def load_tokenizer(folder: str | Path) -> VFMTokModel:
    """Load a tokenizer of either kind in float32, for evaluation."""
    architectures = VFMTokConfig.from_pretrained(folder).architectures
    model_class = VQGANModel if architectures == ["VQGANModel"] else VFMTokModel
    return model_class.from_pretrained(folder).eval()
