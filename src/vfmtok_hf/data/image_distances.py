"""Perceptual distances between images, for training and evaluation: LPIPS, and one on features of a frozen vision model."""

import importlib.util
import logging
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from vfmtok_hf.modeling.anchor_encoder_vfmtok import without_autocast


if TYPE_CHECKING:
    import lpips

logger = logging.getLogger("vfmtok_hf.data")

BACKBONES = {
    "alex": AlexNet_Weights.IMAGENET1K_V1,
    "vgg": VGG16_Weights.IMAGENET1K_V1,
    "squeeze": SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


class LPIPS(nn.Module):
    """
    Learned perceptual distance between images (Zhang et al. 2018, equation 1), version 0.1: network and channel weights
    from the authors' package `lpips`.

    Unlike in that package, distances are float32 in any precision of the convolutions, and zero features have a finite gradient.
    Nothing is trained here.

    Args:
        backbone (`str`): "vgg", which the original trains with, "alex" or "squeeze".
        weights (`str`, *optional*): file of torchvision's ImageNet weights of the backbone (`.pth` or `.safetensors`).
            Defaults to torch's cache. A download is announced in the log.
        dropout (`float`): dropout rate of channel differences in training mode. The original leaves the
            package's own rate of 0.5 active during training.

    Raises:
        FileNotFoundError: the weights cannot be found or downloaded. The error states what to download.
        ValueError: the file belongs to another network, or is a pickle with more than tensors.
        ImportError: the `lpips` package is missing.
    """

    def __init__(
        self, backbone: Literal["alex", "vgg", "squeeze"] = "vgg", weights: str | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.network = _load_network(backbone, weights).requires_grad_(False)
        for layer in self.network.lins:
            layer.model[0].p = dropout

    def forward(self, reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            reconstruction, target (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): in [-1, 1]. The
                gradient flows only to the reconstruction.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)`: distances, 0 for equal images.
        """
        network = self.network
        with torch.no_grad():
            target_stages = network.net(network.scaling_layer(target))
        stages = network.net(network.scaling_layer(reconstruction))
        with without_autocast(reconstruction.device):
            distances = [
                layer(unit_difference(ours, theirs)).mean((1, 2, 3))
                for layer, ours, theirs in zip(network.lins, stages, target_stages, strict=True)
            ]
        return torch.stack(distances).sum(0)


def unit_difference(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """
    Squared difference of features `(batch_size, channels, height, width)`, in float32 and normalized along the channels.
    """
    # `normalize` has a gradient at zero vectors, which ReLU can produce; the square root of a sum has none.
    return (F.normalize(ours.float(), dim=1) - F.normalize(theirs.float(), dim=1)).square()


def vision_perceptual_loss(reconstructed: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """
    Squared distance between channel-normalized features, mean over positions and levels, in [0, 4]. The form of
    LPIPS (Zhang et al. 2018, equation 1) without learned channel weights.

    Args:
        reconstructed, target (`list[torch.Tensor]`): one `(batch_size, channels, height, width)` per level.
    """
    distances = [
        unit_difference(ours, theirs).sum(1).mean() for ours, theirs in zip(reconstructed, target, strict=True)
    ]
    return torch.stack(distances).mean()


def _load_network(backbone: str, weights: str | None) -> "lpips.LPIPS":
    package = importlib.util.find_spec("lpips")
    if package is None:
        raise ImportError("LPIPS needs the lpips package: pip install lpips")
    import lpips

    # On the meta device, because the package would initialize random weights; torchvision warns about its call.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    features = _cached_weights(backbone) if weights is None else _read(Path(weights), backbone)
    channel_weights = _read(
        Path(package.submodule_search_locations[0], "weights", "v0.1", f"{backbone}.pth"), backbone
    )
    state: dict[str, Any] = {}
    for name, expected in network.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "net":
            source = f"features.{rest.partition('.')[2]}"  # of net.slice1.0.weight
            state[name] = features.get(source)
            if state[name] is None or state[name].shape != expected.shape:
                found = "is missing" if state[name] is None else f"has shape {tuple(state[name].shape)}"
                raise ValueError(
                    f"{weights or 'The cached file'} does not contain torchvision's weights of {backbone}: {source} "
                    f"{found}, expected shape {tuple(expected.shape)}."
                )
        elif part == "scaling_layer":
            state[name] = expected
        else:  # the same layers twice: lin0.model.1.weight, lins.0.model.1.weight
            state[name] = channel_weights[name.replace("lins.", "lin")]
    network.load_state_dict(state, assign=True)
    return network


def _cached_weights(backbone: str) -> dict[str, torch.Tensor]:
    weights = BACKBONES[backbone]
    folder = Path(torch.hub.get_dir(), "checkpoints")
    file = folder / weights.url.rpartition("/")[2]
    if not file.is_file():
        logger.warning("LPIPS: downloading %s to %s", weights.url, file)
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise FileNotFoundError(
            f"LPIPS needs torchvision's weights of {backbone}, which could not be downloaded ({error}). Download "
            f"{weights.url} elsewhere and put it into {folder}, or pass the file (in training with --vgg_weights)."
        ) from error


def _read(file: Path, backbone: str) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise FileNotFoundError(
            f"The weights {file} of LPIPS do not exist. They are torchvision's, {BACKBONES[backbone].url}."
        )
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged or contains more than tensors and is not loaded: {error}") from error
