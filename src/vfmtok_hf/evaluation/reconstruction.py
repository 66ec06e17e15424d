"""How close reconstructions come to their originals."""

import torch


def psnr(originals: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio in dB of each image: 10 log10(255^2 / mean squared error). Equal images have infinity.

    Args:
        originals, reconstructions (`torch.ByteTensor` of shape `(batch_size, 3, height, width)`): 8-bit images.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float64.
    """
    squared_error = (originals.double() - reconstructions.double()).square().flatten(1).mean(dim=1)
    return 10 * (255**2 / squared_error).log10()
