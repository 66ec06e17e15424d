"""Perceptual distances: LPIPS, which the original trains with, and one between features of the frozen vision model."""

import importlib.util
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import VGG16_Weights, vgg16


# The last ReLU of each of VGG-16's five stages: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
STAGE_ENDS = (3, 8, 15, 22, 29)


class LPIPS(nn.Module):
    """
    Learned perceptual distance between images (Zhang et al. 2018, equation 1) on VGG-16, version 0.1: what the
    original trains with. The channel weights come with the `lpips` package, from its file alone.

    The distances are float32 whatever the precision of the convolutions. Nothing here is trained.

    Args:
        vgg_weights (`str`, *optional*): file of torchvision's ImageNet VGG-16 (`.pth` or `.safetensors`). Default:
            torch's cache, filled by a download where there is a network.
        dropout (`float`): share of channel differences that is dropped in training mode. The original leaves the
            metric's own 0.5 switched on while training.

    Raises:
        FileNotFoundError: no VGG-16 weights, and no way to get them. Says what to download and where to put it.
        ValueError: the file is not VGG-16, or is a pickle of more than tensors.
        ImportError: the `lpips` package is missing.
    """

    def __init__(self, vgg_weights: str | None = None, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        with torch.device("meta"):
            self.layers = vgg16().features[: STAGE_ENDS[-1] + 1]
        self.layers.load_state_dict(_vgg_layers(vgg_weights, self.layers), assign=True)
        self.channel_weights = nn.ParameterList(_channel_weights())
        # ImageNet's mean and deviation, moved from [0, 1] to images in [-1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            reconstruction, target (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1]. The
                gradient reaches the reconstruction alone.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)`: distances, 0 for equal images.
        """
        with torch.no_grad():
            target_stages = self._stages(target)
        distances = []
        for ours, theirs, weights in zip(
            self._stages(reconstruction), target_stages, self.channel_weights, strict=True
        ):
            # Channels come last: there they lie in memory when the layers' weights are channels-last.
            difference = unit_difference(ours.movedim(1, -1), theirs.movedim(1, -1), dim=-1)
            difference = F.dropout(difference, self.dropout, self.training)
            distances.append((difference * weights.flatten()).sum(-1).mean((1, 2)))
        return torch.stack(distances).sum(0)

    def _stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden_states, stages = (images - self.mean) / self.deviation, []
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states)
            if index in STAGE_ENDS:
                stages.append(hidden_states)
        return stages


def unit_difference(ours: torch.Tensor, theirs: torch.Tensor, dim: int) -> torch.Tensor:
    """Squared difference of features of one shape, in float32 and normalised along `dim`, the channels."""
    # Of a vector of zeros, which ReLU leaves here and there, `normalize` has a gradient; the root of a sum has none.
    return (F.normalize(ours.float(), dim=dim) - F.normalize(theirs.float(), dim=dim)).square()


def vision_perceptual_loss(reconstructed: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """
    Squared distance between channel-normalised features, mean over positions and levels, in [0, 4]. The form of
    LPIPS (Zhang et al. 2018, equation 1) without learned channel weights.

    Args:
        reconstructed, target (`list[torch.Tensor]`): one `(batch_size, channels, height, width)` per level.
    """
    distances = [
        unit_difference(ours, theirs, dim=1).sum(1).mean() for ours, theirs in zip(reconstructed, target, strict=True)
    ]
    return torch.stack(distances).mean()


def _vgg_layers(file: str | None, layers: nn.Sequential) -> dict[str, torch.Tensor]:
    """The convolutions' weights, `layers`' own names, from torchvision's state dictionary."""
    state = _cached_vgg() if file is None else _read(Path(file))
    weights = {name: state.get(f"features.{name}") for name in layers.state_dict()}
    for name, expected in layers.state_dict().items():
        if weights[name] is None or weights[name].shape != expected.shape:
            found = "is missing" if weights[name] is None else f"has shape {tuple(weights[name].shape)}"
            raise ValueError(
                f"{file or 'The cached file'} does not hold torchvision's VGG-16: features.{name} {found}, expected "
                f"shape {tuple(expected.shape)}."
            )
    return weights


def _cached_vgg() -> dict[str, torch.Tensor]:
    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise FileNotFoundError(
            f"LPIPS needs torchvision's VGG-16 weights, which could not be downloaded ({error}). Download "
            f"{weights.url} elsewhere and put it into {torch.hub.get_dir()}/checkpoints, or name the file with "
            "--vgg_weights; --lpips_weight 0 trains without the term."
        ) from error


def _read(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise FileNotFoundError(
            f"--vgg_weights {file} does not exist. It is torchvision's VGG-16, {VGG16_Weights.IMAGENET1K_V1.url}."
        )
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged or holds more than tensors, and is not loaded: {error}") from error


def _channel_weights() -> list[torch.Tensor]:
    """`(channels, 1, 1)` for each stage, from the file inside the `lpips` package (version 0.1)."""
    package = importlib.util.find_spec("lpips")
    if package is None:
        raise ImportError('The LPIPS term needs the lpips package: pip install "vfmtok-hf[train]".')
    state = _read(Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth")
    return [state[f"lin{stage}.model.1.weight"][0] for stage in range(len(STAGE_ENDS))]
