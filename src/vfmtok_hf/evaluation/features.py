"""Image features for distances between sets of images, from a network of your choice."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedConfig

from vfmtok_hf.data.image_sets import ImageSet
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


ProgressCallback = Callable[[int], None]


@dataclass
class Features:
    """
    Args:
        pooled (`torch.FloatTensor` of shape `(images, channels)`): one vector per image, for FID, precision and recall.
        spatial (`torch.FloatTensor` of shape `(images, positions * channels)`): the first channels of a feature map, at
            most 2048 numbers, for sFID.
        logits (`torch.FloatTensor` of shape `(images, classes)`, *optional*): from a classifier, for the inception score.
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
    Compute features of 8-bit images `(batch_size, 3, height, width)`, returned on the CPU. `name` identifies the network,
    and `classifies` tells whether there are logits.
    """

    name: str
    classifies: bool

    def __call__(self, images: torch.Tensor) -> Features: ...


def first_channels(feature_map: torch.Tensor, numbers: int = 2048) -> torch.Tensor:
    """
    Flatten `(batch_size, channels, height, width)` to `(batch_size, height * width * kept)`, channels last, keeping as many
    of the first channels as give at most `numbers`. For Inception's 17 x 17 map, these are the 7 channels of ADM's evaluator.
    """
    height, width = feature_map.shape[-2:]
    kept = max(numbers // (height * width), 1)
    return feature_map[:, :kept].permute(0, 2, 3, 1).flatten(1)


class InceptionFeatures:
    """
    The Inception-v3 of FID: the TensorFlow graph of 2015-12-05 and its resizing, ported by torch-fidelity. Features
    as in ADM's evaluator: `pool_3`, the first branch of `mixed_6`, and the logits without bias.

    Args:
        weights (`Path`, *optional*): torch-fidelity's file with weights. By default, torch-fidelity downloads it.
        device (`torch.device` or `str`): where to compute.

    Raises:
        OSError: the weights could not be downloaded, or the file does not exist.
        ValueError: the file does not contain Inception's weights.
    """

    name = "inception"
    classifies = True

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        try:
            if weights is not None:
                # torch-fidelity unpickles the file: check first that it contains only tensors.
                torch.load(weights, map_location="cpu", weights_only=True)
            self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
        except OSError as error:
            raise OSError(
                f"Could not download the Inception weights ({error}). Download {URL_INCEPTION_V3} on a machine with a network and "
                "pass the file with --inception-weights, or choose a vision model with --features."
            ) from error
        except Exception as error:  # unpickling another file can raise anything
            file = weights or "The downloaded file"
            raise ValueError(f"{file} does not contain Inception's weights: download {URL_INCEPTION_V3}.") from error
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
    A vision model of transformers or timm, or the image tower of a model such as CLIP. Features are the class token if
    there is one, otherwise the mean over positions; the last feature map; and logits if it is a classifier. With DINOv2,
    the Fréchet distance is FD-DINOv2 (Stein et al. 2023), which also resizes bicubically.

    Whole images are resized to the input's size, never cropped; the model's image processor scales their values.

    Args:
        name_or_path (`str`): folder or repository.
        size (`int`, *optional*): side in pixels of the network's input. Defaults to the model's own.
        device (`torch.device` or `str`): where to compute.

    Raises:
        OSError: the model does not exist.
        ValueError: the model returns no features or random ones, or its input size is unknown.
    """

    def __init__(self, name_or_path: str, size: int | None = None, device: torch.device | str = "cpu"):
        config = AutoConfig.from_pretrained(name_or_path)
        self.classifies = any(name.endswith("ForImageClassification") for name in config.architectures or [])
        loader = AutoModelForImageClassification if self.classifies else AutoModel
        model = loader.from_pretrained(name_or_path, dtype=torch.float32)
        if not self.classifies and hasattr(config, "vision_config"):
            model = model.get_encoder(modality="image")
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = device
        own_size, self.scale_values = _input_format(name_or_path, config)
        if size is None and own_size is None:
            raise ValueError(f"{name_or_path} accepts images of any size: choose one with --feature-size.")
        self.size = size or own_size
        self.arguments = {"output_hidden_states": True} if self.classifies else {}
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            self.arguments["interpolate_pos_encoding"] = True
        self.name = f"{Path(name_or_path).name} at {self.size}"
        self._try_out(name_or_path, config.model_type)

    def _try_out(self, name_or_path: str, model_type: str) -> None:
        """Raise `ValueError` unless the model returns features, and the same ones twice."""
        noise = torch.rand(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        image = (255 * noise).byte()
        try:
            first, second = self(image), self(image)
        except Exception as error:  # models of other types can raise anything
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(
                f"{name_or_path} ({model_type}) returns no features for {self.size} x {self.size} images ({reason}): choose "
                "a vision model, or another --feature-size."
            ) from error
        if (first.spatial - second.spatial).norm() > 1e-3 * first.spatial.norm():
            raise ValueError(
                f"{name_or_path} ({model_type}) returns different features each time, as masked autoencoders do: choose "
                "another vision model."
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        pixels = F.interpolate(
            images.to(self.device).float(), (self.size, self.size), mode="bicubic", antialias=True
        ).clamp(0, 255)
        outputs = self.model(pixel_values=self.scale_values(pixels).to(self.device), **self.arguments)
        last = outputs.hidden_states[-1] if self.classifies else outputs.last_hidden_state
        pooled, feature_map = self._vector_and_map(last)
        logits = outputs.logits.cpu() if self.classifies else None
        return Features(pooled.cpu(), first_channels(feature_map).cpu(), logits)

    def _vector_and_map(self, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `(batch_size, channels)` and `(batch_size, channels, height, width)` of a network's last states, which are a map,
        channels first or last, or tokens `(batch_size, positions, channels)`.
        """
        if last.ndim == 4:
            channels_last = last.shape[1] == last.shape[2] != last.shape[3]
            feature_map = last.movedim(-1, 1) if channels_last else last
            return feature_map.mean(dim=(2, 3)), feature_map
        prefix, has_class_token = self._prefix_tokens(last.shape[1])
        patches = last[:, prefix:]
        side = math.isqrt(patches.shape[1])
        pooled = last[:, 0] if has_class_token else patches.mean(dim=1)
        return pooled, patches.transpose(1, 2).unflatten(-1, (side, side))

    def _prefix_tokens(self, positions: int) -> tuple[int, bool]:
        """The number of tokens before those of the map, and whether the first is a class token."""
        timm_model = getattr(self.model, "timm_model", None)
        if timm_model is not None:
            return timm_model.num_prefix_tokens, getattr(timm_model, "cls_token", None) is not None
        config = self.model.config
        patch_size = getattr(getattr(config, "vision_config", config), "patch_size", None)
        patches = (self.size // patch_size) ** 2 if isinstance(patch_size, int) else 0
        if not 0 < patches <= positions:  # hierarchical models merge patches
            patches = math.isqrt(positions) ** 2
        return positions - patches, positions > patches


def _input_format(
    name_or_path: str, config: PreTrainedConfig
) -> tuple[int | None, Callable[[torch.Tensor], torch.Tensor]]:
    """
    The input size of a vision model, if it has one, and the function that converts resized images
    `(batch_size, 3, side, side)` in [0, 255] to its `pixel_values`.
    """
    timm_config = getattr(config, "pretrained_cfg", None)
    if timm_config:
        normalize = v2.Normalize(timm_config["mean"], timm_config["std"])
        return timm_config["input_size"][-1], lambda pixels: normalize(pixels / 255)
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} has no image processor, which defines the model's input: save one in its folder, or choose "
            "another vision model."
        ) from error
    settings = processor.to_dict()
    size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size") or {}
    done_here = {name: False for name in ("do_resize", "do_center_crop") if name in settings}

    def scale_values(pixels: torch.Tensor) -> torch.Tensor:
        return processor(list(pixels), **done_here, return_tensors="pt")["pixel_values"]

    return size.get("height") or size.get("shortest_edge"), scale_values


class OwnVisionFeatures:
    """
    The last level of a tokenizer's own vision model. It needs no download, but is not a neutral judge, because the
    tokenizer was trained to preserve these features.
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
            raise ValueError("Features 'own' need an image tokenizer: pass one, or choose a vision model.")
        return OwnVisionFeatures(vq_model)
    return VisionModelFeatures(source, size, device)


def extract_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> Features:
    """
    Compute the features of a whole set.

    Raises:
        ValueError: features are not finite; the error names the images by number.
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
