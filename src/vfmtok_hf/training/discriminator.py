"""Patch discriminator and hinge losses of the adversarial term."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """
    Judges overlapping patches of an image (Isola et al. 2017, section 3.2): `(batch_size, 3, height, width)` in
    [-1, 1] -> `(batch_size, 1, height / 2**num_layers, width / 2**num_layers)` logits. Group norm instead of batch
    norm, so that a judgement does not depend on the rest of the batch.
    """

    def __init__(self, base_channels: int = 32, num_layers: int = 3, num_groups: int = 8):
        super().__init__()
        channels = [base_channels * 2**index for index in range(num_layers)]
        self.conv_in = nn.Conv2d(3, channels[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(num_groups, after),
                nn.LeakyReLU(0.2),
            )
            for before, after in zip(channels[:-1], channels[1:], strict=True)
        )
        self.conv_out = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden_states = F.leaky_relu(self.conv_in(images), 0.2)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.conv_out(hidden_states)


def discriminator_hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """`(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2`, scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """`mean softplus(-D(fake))`, the original's non-saturating generator term, scalar."""
    return F.softplus(-fake_logits).mean()
