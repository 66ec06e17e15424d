"""Statistics of images and image tokens for training logs and evaluation."""

import math
from dataclasses import dataclass

import torch


def psnr(images: torch.Tensor, reconstructions: torch.Tensor, data_range: float) -> torch.Tensor:
    """
    Peak signal-to-noise ratio in dB of each image: 10 log10(data_range^2 / mean squared error); infinity for equal images.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(batch_size, 3, height, width)`): floating-point; their precision
            and device are those of the result.
        data_range (`float`): difference between the largest and the smallest possible value.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    squared_error = (images - reconstructions).square().flatten(1).mean(dim=1)
    return 20 * math.log10(data_range) - 10 * squared_error.log10()


@dataclass
class CodebookStatistics:
    """
    Args:
        usage (`float`): share of the codebook that is used, in [0, 1].
        entropy (`float`): of the code distribution, in bits.
        perplexity (`float`): 2 ** entropy, the number of equally frequent codes with that entropy.
    """

    usage: float
    entropy: float
    perplexity: float


def codebook_statistics(counts: torch.Tensor) -> CodebookStatistics:
    """
    Args:
        counts (`torch.LongTensor` of shape `(codebook_size,)`): how often each code occurred.
    """
    entropy = entropy_bits(counts).item()
    return CodebookStatistics((counts > 0).sum().item() / len(counts), entropy, 2**entropy)


def entropy_bits(counts: torch.Tensor) -> torch.Tensor:
    """Entropy in bits of the distributions given by counts `(..., codes)`, as `(...)` float64 on the CPU."""
    counts = counts.cpu().double()
    return torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1) / math.log(2)
