"""Discriminators of the adversarial loss: on features of a frozen DINO, as in the original, or on image patches."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vfmtok_hf.modeling.vision_features_vfmtok import run_watched, watch_blocks


# Number of images that share the statistics of a batch normalization.
VIRTUAL_BATCH = 8


def load_dino(name_or_path: str) -> ViTModel:
    """
    The discriminator's vision transformer, with the original's approximate GELU and epsilon.

    Raises:
        FileNotFoundError: it is neither a folder nor cached, and cannot be downloaded.
    """
    try:
        return ViTModel.from_pretrained(
            name_or_path, add_pooling_layer=False, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6
        )
    except OSError as error:
        raise FileNotFoundError(
            f"The discriminator needs the vision model {name_or_path!r}, which is neither a folder nor in the Hub's "
            f"cache. Run `hf download {name_or_path}` on a machine with a network, or pass its folder with --discriminator_model; "
            "--discriminator patch needs no weights and --adversarial_weight 0 trains without the term."
        ) from error


class DinoDiscriminator(nn.Module):
    """
    Scores every patch of an image on five levels of a frozen vision transformer: its embeddings, and its states after
    each quarter of its layers. Sources: Sauer et al. 2023 (StyleGAN-T, section 3.2) and the original's
    `discriminator_dino.py`.

    Args:
        vision_model (`ViTModel`): frozen here. Its image size and width determine those of the discriminator.
    """

    def __init__(self, vision_model: ViTModel):
        super().__init__()
        self.vision_model = vision_model.requires_grad_(False).eval()
        depth = vision_model.config.num_hidden_layers
        self.levels = [depth * quarter // 4 for quarter in range(5)]
        watch_blocks(vision_model, self.levels)
        self.heads = nn.ModuleList(DinoDiscriminatorHead(vision_model.config.hidden_size) for _ in self.levels)
        for name, constants in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(constants).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "DinoDiscriminator":
        super().train(mode)
        self.vision_model.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 3, height, width)` in [-1, 1] -> `(batch_size, levels * patches)` logits."""
        images = ((images.float() + 1) / 2 - self.mean) / self.std
        states = self._levels(self._resize(images))
        return torch.cat([head(state) for head, state in zip(self.heads, states, strict=True)], dim=1)

    def _resize(self, images: torch.Tensor) -> torch.Tensor:
        """Downsample larger images or, half of the time, crop them at random, with the same window for the whole batch."""
        size = self.vision_model.config.image_size
        height, width = images.shape[-2:]
        if min(height, width) > size and random.random() <= 0.5:
            top, left = random.randint(0, height - size), random.randint(0, width - size)
            return images[..., top : top + size, left : left + size]
        return F.interpolate(images, size=(size, size), mode="area" if height > size else "bicubic")

    def _levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Sum of patch states and class state, `(batch_size, hidden_size, patches)` per level."""
        _, states = run_watched(self.vision_model, images)
        states = [states[level].float() for level in self.levels]
        return [(state[:, 1:] + state[:, :1]).transpose(1, 2) for state in states]


class DinoDiscriminatorHead(nn.Module):
    """`(batch_size, channels, patches)` -> `(batch_size, patches)`: convolutions along the sequence of patches."""

    def __init__(self, channels: int, kernel_size: int = 9):
        super().__init__()
        around = {"padding": kernel_size // 2, "padding_mode": "circular"}
        self.conv_in = spectral_norm(nn.Conv1d(channels, channels, 1))
        self.norm_in = LocalBatchNorm(channels)
        # Spelled as in the checkpoints of earlier runs.
        self.conv_neighbours = spectral_norm(nn.Conv1d(channels, channels, kernel_size, **around))
        self.norm_neighbours = LocalBatchNorm(channels)
        self.conv_out = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = F.leaky_relu(self.norm_in(self.conv_in(states)), 0.2)
        neighbors = F.leaky_relu(self.norm_neighbours(self.conv_neighbours(states)), 0.2)
        return self.conv_out((states + neighbors) * 0.5**0.5).squeeze(1)


class LocalBatchNorm(nn.Module):
    """
    Batch normalization of `(batch_size, channels, length)` within equal groups of at most `VIRTUAL_BATCH` images, in
    float32 and without running statistics. The result is the same in training and evaluation, on one process or several.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        num_groups = -(-states.shape[0] // VIRTUAL_BATCH)
        groups = states.float().unflatten(0, (num_groups, -1))
        variance, mean = torch.var_mean(groups, dim=(1, 3), keepdim=True, correction=0)
        groups = (groups - mean) / (variance + 1e-6).sqrt()
        return groups.flatten(0, 1) * self.weight + self.bias


def check_virtual_batches(batch_size: int) -> None:
    """
    Raises:
        ValueError: a batch of this size does not split into equal groups for `LocalBatchNorm`.
    """
    num_groups = -(-batch_size // VIRTUAL_BATCH)
    if batch_size % num_groups:
        raise ValueError(
            f"The DINO discriminator normalizes within equal groups of at most {VIRTUAL_BATCH} images, and "
            f"--batch_size {batch_size} does not split into {num_groups}: use a multiple of {VIRTUAL_BATCH}."
        )


class PatchDiscriminator(nn.Module):
    """
    Scores overlapping patches of an image (Isola et al. 2017, section 3.2): `(batch_size, 3, height, width)` in
    [-1, 1] -> `(batch_size, 1, height / 2**num_layers, width / 2**num_layers)` logits. Group norm instead of batch
    norm, so a score does not depend on the rest of the batch.
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


class DiscriminatorObjective(nn.Module):
    """A discriminator and its loss as one module, because DDP does not support calling the discriminator twice."""

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, reconstruction: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """`discriminator`: `(mean relu(1 + D(reconstruction)) + mean relu(1 - D(target))) / 2`; and mean logits."""
        fake, real = (self.discriminator(images).float() for images in (reconstruction.detach(), target))
        loss = (F.relu(1 + fake).mean() + F.relu(1 - real).mean()) / 2
        return {"discriminator": loss, "logits_fake": fake.detach().mean(), "logits_real": real.detach().mean()}


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block, gradients pass through the module without reaching its parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """`mean softplus(-D(fake))`, the original's non-saturating generator term, scalar."""
    return F.softplus(-fake_logits.float()).mean()


def adaptive_weight(image_loss: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """
    Factor that gives the adversarial term the gradient norm of the image loss at the decoder's last weight, scalar in
    [0, 1e4] (Esser et al. 2021, equation 7; original `calculate_adaptive_weight`). Both graphs are kept.
    """
    image_norm, adversarial_norm = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (image_loss, adversarial)
    )
    return (image_norm / (adversarial_norm + 1e-4)).clamp(max=1e4)
