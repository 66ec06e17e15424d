"""Reconstruction metrics."""

import torch

from vfmtok_hf.evaluation.reconstruction import psnr


def test_psnr_of_a_known_error():
    originals = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    reconstructions = originals.clone()
    reconstructions[0] += 10
    decibels = psnr(originals, reconstructions)
    torch.testing.assert_close(decibels[0], torch.tensor(28.130803608679102, dtype=torch.float64))  # 20 lg 25.5
    assert decibels[1] == torch.inf


def test_psnr_does_not_wrap_around_at_eight_bits():
    black, white = (torch.full((1, 3, 2, 2), level, dtype=torch.uint8) for level in (0, 255))
    assert psnr(black, white) == psnr(white, black) == 0
