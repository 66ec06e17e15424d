"""Features of images: what distances between sets of images are computed on. The network is a parameter."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from vfmtok_hf.evaluation.images import ImageSet
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


ProgressCallback = Callable[[int], None]


@dataclass
class Features:
    """
    Args:
        pooled (`torch.FloatTensor` of shape `(images, channels)`): one vector an image. FID, precision, recall.
        spatial (`torch.FloatTensor` of shape `(images, positions * channels)`): a feature map's first channels, so
            many as give 2048 numbers at most. sFID.
        logits (`torch.FloatTensor` of shape `(images, classes)`, *optional*): of a classifier. Inception score.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    @classmethod
    def concatenate(cls, parts: list["Features"]) -> "Features":
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        return cls(**{name: None if column[0] is None else torch.cat(column) for name, column in columns.items()})


class FeatureExtractor(Protocol):
    """
    8-bit images `(batch_size, 3, height, width)` to their features, on the CPU. `name` tells networks apart, and
    `classifies` says whether there are logits.
    """

    name: str
    classifies: bool

    def __call__(self, images: torch.Tensor) -> Features: ...


def first_channels(feature_map: torch.Tensor, numbers: int = 2048) -> torch.Tensor:
    """
    `(batch_size, channels, height, width)` to `(batch_size, height * width * kept)`, channels last: as many of the first
    channels as give `numbers` at most. Of Inception's 17 x 17 map these are the 7 channels of ADM's evaluator.
    """
    height, width = feature_map.shape[-2:]
    kept = max(numbers // (height * width), 1)
    return feature_map[:, :kept].permute(0, 2, 3, 1).flatten(1)


class InceptionFeatures:
    """
    Inception-v3 as FID means it: the TensorFlow graph of 2015-12-05 and its resizing, ported by torch-fidelity. Features
    as in ADM's evaluator: `pool_3`, the first branch of `mixed_6`, and the logits without bias.

    Args:
        weights (`Path`, *optional*): torch-fidelity's file of weights. Without it torch-fidelity downloads it.
        device (`torch.device` or `str`): where to compute.

    Raises:
        OSError: the weights could not be downloaded, or the file is not there.
        ValueError: the file is not one of Inception's weights.
    """

    name = "inception"
    classifies = True

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        try:
            if weights is not None:
                # torch-fidelity unpickles whatever the file holds: look first that it is tensors alone.
                torch.load(weights, map_location="cpu", weights_only=True)
            self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except OSError as error:
            raise OSError(
                f"Inception's weights could not be had ({error}): fetch {URL_INCEPTION_V3} where there is a network and "
                "give the file with --inception-weights, or choose a vision model with --features."
            ) from error
        except Exception as error:  # what unpickling some other file raises, nobody can tell
            file = weights or "The downloaded file"
            raise ValueError(f"{file} does not hold Inception's weights: fetch {URL_INCEPTION_V3}.") from error
        self.model.to(device)
        self.device = device
        self.spatial: torch.Tensor
        self.model.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.spatial = output

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pooled, logits = self.model(images.to(self.device))
        return Features(pooled.cpu(), first_channels(self.spatial).cpu(), logits.cpu())


class VisionModelFeatures:
    """
    A frozen vision model of transformers or timm: the class token if it has one, else the mean over positions; the last
    feature map; and logits if the folder holds a classifier. With DINOv2 the Fréchet distance is FD-DINOv2 (Stein et al.
    2023), whose resizing is bicubic too.

    Args:
        name_or_path (`str`): folder or repository.
        size (`int`, *optional*): side in pixels of the network's input. Default: its own.
        device (`torch.device` or `str`): where to compute.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, name_or_path: str, size: int | None = None, device: torch.device | str = "cpu"):
        config = AutoConfig.from_pretrained(name_or_path)
        classifies = any(name.endswith("ForImageClassification") for name in config.architectures or [])
        loader = AutoModelForImageClassification if classifies else AutoModel
        self.model = loader.from_pretrained(name_or_path, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.classifies = classifies
        self.device = device
        native_size, mean, std = _input_format(name_or_path, config)
        self.size = size or native_size
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.name = f"{Path(name_or_path).name} at {self.size}"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pixel_values = images.to(self.device).float() / 255
        size = (self.size, self.size)
        pixel_values = F.interpolate(pixel_values, size, mode="bicubic", antialias=True).clamp(0, 1)
        outputs = self.model((pixel_values - self.mean) / self.std, output_hidden_states=True)
        last = outputs.hidden_states[-1] if self.classifies else outputs.last_hidden_state
        pooled, feature_map = self._vector_and_map(last)
        logits = outputs.logits.cpu() if self.classifies else None
        return Features(pooled.cpu(), first_channels(feature_map).cpu(), logits)

    def _vector_and_map(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a network's last states, a map `(batch_size, channels, height, width)` or tokens `(batch_size, n, channels)`."""
        if last.ndim == 4:
            return last.mean(dim=(2, 3)), last
        timm_model = getattr(self.model, "timm_model", None)
        if timm_model is not None:
            prefix = timm_model.num_prefix_tokens
        else:
            prefix = last.shape[1] - (self.size // self.model.config.patch_size) ** 2
        patches = last[:, prefix:].transpose(1, 2)
        side = math.isqrt(patches.shape[-1])
        return last[:, 0] if prefix else last.mean(dim=1), patches.unflatten(-1, (side, side))


def _input_format(name_or_path: str, config) -> tuple[int, list[float], list[float]]:
    """Side, mean and standard deviation of a vision model's input."""
    timm_config = getattr(config, "pretrained_cfg", None)
    if timm_config:
        return timm_config["input_size"][-1], timm_config["mean"], timm_config["std"]
    processor = AutoImageProcessor.from_pretrained(name_or_path)
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return size["height"], list(processor.image_mean), list(processor.image_std)


class OwnVisionFeatures:
    """
    The frozen vision model inside an image tokenizer: its last level. Always at hand, and no neutral judge: the tokenizer
    was trained to keep these very features.
    """

    classifies = False

    def __init__(self, vq_model: VFMTokModel):
        self.vq_model = vq_model
        self.name = "the tokenizer's own vision model"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pixel_values = images.to(self.vq_model.device).float() / 127.5 - 1
        level = self.vq_model.extract_vision_features(pixel_values)[-1].float()
        return Features(level.mean(dim=(2, 3)).cpu(), first_channels(level).cpu())


def load_feature_extractor(
    source: str,
    vq_model: VFMTokModel | None = None,
    size: int | None = None,
    inception_weights: Path | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """`"inception"`, `"own"` (the vision model of `vq_model`), or a vision model's folder or repository."""
    if source == "inception":
        return InceptionFeatures(inception_weights, device)
    if source == "own":
        if vq_model is None:
            raise ValueError("Features 'own' need an image tokenizer: give one, or name a vision model.")
        return OwnVisionFeatures(vq_model)
    return VisionModelFeatures(source, size, device)


def extract_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> Features:
    """
    Features of a whole set.

    Raises:
        ValueError: features that are not finite; the images are named by their numbers.
    """
    parts: list[Features] = []
    done = 0
    for batch in images.batches(batch_size):
        features = extractor(batch)
        check_finite_features(features, f"Images {done} to {done + len(batch) - 1} of {images.name}")
        parts.append(features)
        done += len(batch)
        progress_callback(len(batch))
    return Features.concatenate(parts)


def check_finite_features(features: Features, whose: str) -> None:
    """Raise `ValueError` if any feature is NaN or infinite."""
    columns = (features.pooled, features.spatial, features.logits)
    if not all(column.isfinite().all() for column in columns if column is not None):
        raise ValueError(f"{whose} have features that are NaN or infinite: check the network's weights.")
