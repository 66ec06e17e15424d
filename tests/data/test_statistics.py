"""Numbers about images and tokens, on values whose answer is known."""

import pytest
import torch

from vfmtok_hf.data.statistics import codebook_statistics, entropy_bits, psnr


def test_codebook_statistics_of_known_counts():
    uniform = codebook_statistics(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))
    assert (uniform.usage, uniform.entropy, uniform.perplexity) == (0.5, pytest.approx(2), pytest.approx(4))
    assert codebook_statistics(torch.tensor([7, 0])).perplexity == 1
    assert entropy_bits(torch.tensor([[1, 1], [3, 0]])).tolist() == [1, 0]


def test_psnr_depends_on_the_range_and_keeps_the_precision():
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 0, 0] = 0.48  # of 48 values, so that the mean squared error is 0.0048
    decibels = psnr(images, torch.zeros_like(images), data_range=2)
    assert decibels.dtype == torch.float32
    assert decibels.tolist() == [torch.inf, pytest.approx(29.208, abs=1e-3)]
    assert psnr(images, torch.zeros_like(images), data_range=1)[1].item() == pytest.approx(23.188, abs=1e-3)
