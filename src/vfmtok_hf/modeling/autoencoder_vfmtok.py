"""
Base of the image autoencoders: a frozen vision model, the anchor encoder, and how both are built and loaded.

The bottleneck, a codebook or continuous latents, is defined by each model.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .anchor_encoder_vfmtok import VFMTokAnchorEncoder, VFMTokDeformableAttention
from .autoencoder_config_vfmtok import AutoencoderConfigMixin
from .loading_vfmtok import CheckedModelMixin
from .vision_features_vfmtok import (
    build_vision_model,
    fetch_vision_model,
    read_weights,
    vision_feature_channels,
    vision_feature_stride,
)
from .vit_decoder_vfmtok import VFMTokViTDecoderBase


# ---------------------------------------------------------------------------------------------------------------
# Input of the vision model


def gaussian_kernel(size: int, sigma: float, device: torch.device) -> torch.Tensor:
    offsets = torch.arange(size, dtype=torch.float32, device=device) - size // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def gaussian_blur(images: torch.Tensor, *sigmas: float) -> torch.Tensor:
    """Separable blur over (height, width), with the smallest odd kernel >= 3 and >= 4 sigma and reflected edges."""
    vertical, horizontal = (gaussian_kernel(max(int(4 * s), 3) // 2 * 2 + 1, s, images.device) for s in sigmas)
    channels = images.shape[1]
    top, left = len(vertical) // 2, len(horizontal) // 2
    images = F.pad(images, (left, left, top, top), mode="reflect")
    images = F.conv2d(images, vertical.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(images, horizontal.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def resize_for_vision_model(images: torch.Tensor, size: int) -> torch.Tensor:
    """
    Resize as in the original's `pretrained_enc_arch.py`, which calls kornia: bicubic with aligned corners, after a
    Gaussian blur with sigma = (factor - 1) / 2 if the image is downsampled.

    Args:
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): float32.
        size (`int`): side of the result.
    """
    factors = [side / size for side in images.shape[-2:]]
    if factors == [1.0, 1.0]:
        return images
    if max(factors) > 1:
        images = gaussian_blur(images, *(max((factor - 1) / 2, 0.001) for factor in factors))
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)


# ---------------------------------------------------------------------------------------------------------------
# Model


def runs_offload_hook(method: Callable) -> Callable:
    """Run accelerate's offloading hooks, which by default run only for `forward`, also for `method`."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        hook = getattr(self, "_hf_hook", None)
        if hook is not None:
            args, kwargs = hook.pre_forward(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return run


def vision_grid_size(vision_model: nn.Module, config: AutoencoderConfigMixin) -> int:
    """
    Positions per side of the last feature level.

    Raises:
        ValueError: the image size is not a multiple of the vision model's patch size.
    """
    stride = vision_feature_stride(vision_model, config)
    if config.vision_image_size % stride:
        raise ValueError(
            f"vision_image_size {config.vision_image_size} must be a multiple of {stride}, the stride of the vision "
            "model's last feature level."
        )
    return config.vision_image_size // stride


class VFMTokAutoencoder(CheckedModelMixin, PreTrainedModel):
    """
    Base of models that encode the features of a frozen vision model, whose parameters have no gradient and which stays in
    evaluation mode.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VFMTokAnchorEncoderLayer", "VFMTokViTDecoderLayer"]

    def __init__(self, config: AutoencoderConfigMixin):
        super().__init__(config)
        # A light checkpoint has no vision weights: its vision model is built only for its widths and dropped.
        with nullcontext() if config.save_vision_model else torch.device("meta"):
            vision_model = build_vision_model(config)
        self.vision_channels = vision_feature_channels(vision_model, config)
        self.vision_grid_size = vision_grid_size(vision_model, config)
        self.vision_model = vision_model if config.save_vision_model else None
        self.anchor_encoder = VFMTokAnchorEncoder(config, self.vision_channels)

    def post_init(self) -> None:
        """As in transformers, and freeze the vision model."""
        super().post_init()
        self._freeze_vision_model()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the original does, except that its clones of one layer are initialized independently."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VFMTokDeformableAttention):
            self._init_deformable_attention(module)
        elif isinstance(module, VFMTokAnchorEncoder):
            init.normal_(module.anchor_queries, std=self.config.hidden_size**-0.5)
            init.normal_(module.anchor_position_embeddings, std=self.config.hidden_size**-0.5)
        elif isinstance(module, VFMTokViTDecoderBase):
            self._init_vit_decoder(module)
        elif "position_ids" in module._buffers:
            # Of CLIP's inner model, which checkpoints leave out and transformers before 5.6 leaves to us.
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand(1, -1))

    @staticmethod
    def _init_deformable_attention(module: VFMTokDeformableAttention):
        """Initialize heads with evenly spread directions, and point k with distance k (Deformable DETR, appendix A.4)."""
        angles = torch.arange(module.num_heads, dtype=torch.float32) * (2 * math.pi / module.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, module.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]
        offsets = offsets.expand(-1, module.num_levels, -1, -1)
        init.zeros_(module.sampling_offsets.weight)
        init.copy_(module.sampling_offsets.bias, offsets.flatten().to(module.sampling_offsets.bias))
        init.zeros_(module.attention_weights.weight)
        init.zeros_(module.attention_weights.bias)
        for projection in (module.value_proj, module.output_proj):
            init.xavier_uniform_(projection.weight)
            init.zeros_(projection.bias)

    @staticmethod
    def _init_vit_decoder(module: VFMTokViTDecoderBase):
        for embeddings in module.parameters(recurse=False):
            init.normal_(embeddings, std=module.config.hidden_size**-0.5)
        for child in module.modules():
            if isinstance(child, nn.Linear):
                init.xavier_uniform_(child.weight)
                init.zeros_(child.bias)

    # -- the frozen vision model

    def _freeze_vision_model(self) -> None:
        if self.vision_model is not None:
            self.vision_model.requires_grad_(False)
            self.vision_model.eval()

    def get_input_embeddings(self) -> None:
        """None, because there is no embedding table for images. transformers needs this for quantization."""
        return None

    def train(self, mode: bool = True) -> "VFMTokAutoencoder":
        super().train(mode)
        self._freeze_vision_model()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, load_vision_model: bool = False, **kwargs):
        """
        As in transformers, but a checkpoint that does not cover every weight raises an error (`loading_vfmtok.py`).

        Args:
            load_vision_model (`bool`, defaults to `False`):
                For a light checkpoint, also download the vision model that its configuration names, at the named
                revision. `load_vision_model()` does so later.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_vision_model()  # loading creates new parameters
        if load_vision_model and model.vision_model is None:
            model.load_vision_model()
        return loaded

    def unread_weights(self, names: list[str]) -> set[str]:
        """Those of `names` that nothing reads: versions of timm differ in the weights after the last feature level."""
        if self.vision_model is None or self.config.vision_config.model_type != "timm_wrapper":
            return set()
        read = read_weights(self.vision_model, self.config)
        in_vision_model = {name for name in names if name.startswith("vision_model.")}
        return {name for name in in_vision_model if name.removeprefix("vision_model.") not in read}

    @functools.wraps(PreTrainedModel.save_pretrained)  # diffusers inspects the signature
    def save_pretrained(self, *args, **kwargs):
        # `config.save_vision_model` decides whether the vision model is saved.
        vision_weights = {name for name in self.state_dict() if name.startswith("vision_model.")}
        ignored = (self._keys_to_ignore_on_save or set()) - vision_weights
        self._keys_to_ignore_on_save = ignored if self.config.save_vision_model else ignored | vision_weights
        return super().save_pretrained(*args, **kwargs)

    def load_vision_model(self, name_or_path: str | None = None, **kwargs) -> None:
        """
        Load the vision model of a light checkpoint.

        The configuration then records the repository and its commit, so a light checkpoint saved from this model
        downloads the same weights. A folder is not recorded.

        Args:
            name_or_path (`str`, *optional*):
                Repository or folder of the vision model. Defaults to `config.vision_model_name_or_path` at
                `config.vision_model_revision`.
            kwargs: passed on to `from_pretrained` of the vision model.

        Raises:
            ValueError: no source is known, or the weights do not match the vision model.
            OSError: the source cannot be read; the error says how to use a folder instead.
        """
        if name_or_path is None:
            name_or_path = self.config.vision_model_name_or_path
            kwargs = {"revision": self.config.vision_model_revision or "main", **kwargs}
        if name_or_path is None:
            raise ValueError(
                "This checkpoint does not say where its vision model comes from: "
                "call load_vision_model(name_or_path) with a repository or folder."
            )
        vision_model, commit = fetch_vision_model(name_or_path, self.config, self.dtype, **kwargs)
        self.vision_model = vision_model.to(self.device)
        self._freeze_vision_model()
        if commit is not None:
            self.config.vision_model_name_or_path, self.config.vision_model_revision = name_or_path, commit

    def _vision_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The vision model's input for `pixel_values` `(batch_size, 3, height, width)`: resized, clamped and normalized.

        Raises:
            TypeError: images were passed instead of `pixel_values`.
            ValueError: wrong shape or dtype, or the checkpoint has no vision weights.
        """
        if self.vision_model is None:
            source = self.config.vision_model_name_or_path
            raise ValueError(
                "This checkpoint has no vision weights: it can decode but not encode. Call "
                f"model.load_vision_model({source or 'name_or_path'!r}) first."
            )
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(
                f"pixel_values must be a tensor, got {type(pixel_values).__name__}. Create it from images with VFMTokImageProcessor: "
                'processor(image, return_tensors="pt")["pixel_values"].'
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
            raise ValueError(
                "pixel_values must be floating point of shape (batch_size, 3, height, width) in [-1, 1], got "
                f"{pixel_values.dtype} of shape {tuple(pixel_values.shape)}. Create them from images with VFMTokImageProcessor."
            )
        images = resize_for_vision_model(pixel_values.float(), self.config.vision_image_size).clamp(-1, 1)
        mean, std = (
            torch.tensor(constants).view(3, 1, 1).to(images.device)
            for constants in (self.config.vision_image_mean, self.config.vision_image_std)
        )
        dtype = next(self.vision_model.parameters()).dtype
        return (((images + 1) / 2 - mean) / std).to(dtype)


__all__ = ["VFMTokAutoencoder", "resize_for_vision_model", "runs_offload_hook"]
