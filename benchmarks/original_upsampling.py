"""Upsampling as the original's pixel decoder computes it: each pixel repeated, then a convolution of the large image."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

from vfmtok_hf.modeling.pixel_decoder_vfmtok import VFMTokPixelUpsample


def repeat_and_convolve(layer: VFMTokPixelUpsample, hidden_states: torch.Tensor) -> torch.Tensor:
    repeated = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
    return F.conv2d(repeated, layer.weight, layer.bias, padding=1)


@contextmanager
def original_upsampling() -> Iterator[None]:
    """In this context, our pixel decoders upsample as the original does."""
    with mock.patch.object(VFMTokPixelUpsample, "forward", repeat_and_convolve):
        yield
