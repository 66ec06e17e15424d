"""
The frozen vision model of an image tokenizer and its feature levels, for every supported family.

Forward hooks read the blocks of transformers' models, and `forward_intermediates` those of timm's. Neither depends on the
models' own outputs, which change between versions.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoModel

from .autoencoder_config_vfmtok import AutoencoderConfigMixin
from .loading_vfmtok import errors_naming


# Families whose code reads weights of modules without calling them, which accelerate's hooks do not see.
READ_PAST_HOOKS = ("siglip_vision_model", "timm_wrapper")


class _Reading(threading.local):
    """Block outputs of the current call. Threads may share a model."""

    outputs: dict[int, torch.Tensor] | None = None


_reading = _Reading()


def _keep(number: int, block: nn.Module, inputs: tuple, output: Any) -> None:
    if _reading.outputs is not None:
        output = output[0] if isinstance(output, tuple) else output
        _reading.outputs[number] = output if number else inputs[0]


def vision_blocks(vision_model: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks: the one with the length in its configuration."""
    depth = vision_model.config.num_hidden_layers
    return next(
        module for module in vision_model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    )


def watch_blocks(vision_model: nn.Module, numbers: list[int]) -> None:
    """
    Register hooks on blocks for [`run_watched`]. They stay, because torch.compile can trace hooks but not register them.

    Args:
        vision_model (`torch.nn.Module`): a transformers-like model with one list of blocks.
        numbers (`list[int]`): 1-based numbers of the blocks; 0 is the input of the first block.
    """
    blocks = vision_blocks(vision_model)
    for number in set(numbers):
        blocks[max(number - 1, 0)].register_forward_hook(partial(_keep, number))


def run_watched(vision_model: nn.Module, images: torch.Tensor, **kwargs) -> tuple[Any, dict[int, torch.Tensor]]:
    """
    The model's output, and the outputs of the watched blocks, `(batch_size, tokens, hidden_size)`, by number.

    Args:
        vision_model (`torch.nn.Module`): after [`watch_blocks`].
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalized for the vision model.
    """
    _reading.outputs = outputs = {}
    try:
        return vision_model(images, **kwargs), outputs
    finally:
        _reading.outputs = None


def _prepare(vision_model: nn.Module, config: AutoencoderConfigMixin) -> nn.Module:
    if config.vision_config.model_type == "timm_wrapper":
        # timm models contain all of their stages; remove those after the last feature level.
        timm_model = vision_model.timm_model
        timm_model.prune_intermediate_layers(config.vision_feature_layers)
        # timm before 1.0.28 keeps the layers after the last stage of EfficientNets and MobileNets.
        if hasattr(timm_model, "conv_head"):
            for name in timm_model._modules.keys() & {"conv_head", "bn2", "norm_head"}:
                setattr(timm_model, name, nn.Identity())
    elif config.vision_config.model_type != "timm_backbone":
        watch_blocks(vision_model, config.vision_feature_layers)
    # CLIP and SigLIP have an inner model in transformers before 5.6.
    return getattr(vision_model, "vision_model", vision_model)


def build_vision_model(config: AutoencoderConfigMixin) -> nn.Module:
    """Build the vision model of a tokenizer's `config`, with random weights."""
    return _prepare(AutoModel.from_config(config.vision_config), config)


def fetch_vision_model(
    name_or_path: str, config: AutoencoderConfigMixin, dtype: torch.dtype, **kwargs
) -> tuple[nn.Module, str | None]:
    """
    Load the vision model of a tokenizer from a folder or repository.

    Args:
        name_or_path (`str`): folder or repository.
        config ([`AutoencoderConfigMixin`]): configuration of the tokenizer.
        dtype (`torch.dtype`): dtype of the weights.
        kwargs: passed on to `AutoModel.from_pretrained`.

    Returns:
        The model, and the commit of the repository, or None for a folder.

    Raises:
        ValueError: the weights do not match the vision model.
        OSError: the source cannot be read; the error says how to use a folder instead.
    """
    commit = None
    try:
        with errors_naming(str(name_or_path)):
            if not os.path.isdir(name_or_path):
                names = ("revision", "cache_dir", "local_files_only", "token")
                where = {name: kwargs[name] for name in names if name in kwargs}
                # The cache stores files as snapshots/commit/file.
                commit = Path(hf_hub_download(name_or_path, "config.json", **where)).parent.name
                kwargs["revision"] = commit
            vision_model, info = AutoModel.from_pretrained(
                name_or_path, config=config.vision_config, dtype=dtype, output_loading_info=True, **kwargs
            )
    except OSError as error:
        raise OSError(
            f"The vision model {str(name_or_path)!r} cannot be downloaded. Call load_vision_model(folder) with a copy of "
            f"it. Reason: {error}"
        ) from error
    prepared = _prepare(vision_model, config)
    missing = sorted(info["missing_keys"] & vision_model.state_dict().keys())
    if missing:
        raise ValueError(
            f"{name_or_path} is not the vision model of this checkpoint: it lacks {len(missing)} weights, "
            f"such as {missing[0]!r}."
        )
    return prepared, commit


def vision_feature_channels(vision_model: nn.Module, config: AutoencoderConfigMixin) -> list[int]:
    """Channels of each feature level of a `vision_model` in a tokenizer's `config`."""
    if config.vision_config.model_type == "timm_wrapper":
        return [vision_model.timm_model.feature_info[level]["num_chs"] for level in config.vision_feature_layers]
    if config.vision_config.model_type == "timm_backbone":
        return list(vision_model.channels)
    return [config.vision_config.hidden_size] * len(config.vision_feature_layers)


def vision_feature_stride(vision_model: nn.Module, config: AutoencoderConfigMixin) -> int:
    """
    Stride, in input pixels of a `vision_model`, of the last feature level in a tokenizer's `config`.
    """
    if config.vision_config.model_type == "timm_wrapper":
        return vision_model.timm_model.feature_info[config.vision_feature_layers[-1]]["reduction"]
    if config.vision_config.model_type == "timm_backbone":
        return vision_model._backbone.feature_info.reduction()[-1]
    return config.vision_config.patch_size


def vision_features(
    vision_model: nn.Module, config: AutoencoderConfigMixin, images: torch.Tensor
) -> list[torch.Tensor]:
    """
    Compute the feature levels of images.

    Args:
        vision_model (`torch.nn.Module`): from [`build_vision_model`] or [`fetch_vision_model`].
        config ([`AutoencoderConfigMixin`]): configuration of the tokenizer.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalized for the vision model.

    Returns:
        `list[torch.Tensor]`: one `(batch_size, channels, height, width)` per level.
    """
    if config.vision_config.model_type == "timm_backbone":
        return list(vision_model(images).feature_maps)
    if config.vision_config.model_type not in READ_PAST_HOOKS:
        return transformer_features(vision_model, config, images)
    with offloaded_weights_at_hand(vision_model):
        if config.vision_config.model_type == "timm_wrapper":
            return timm_features(vision_model.timm_model, config.vision_feature_layers, images)
        return transformer_features(vision_model, config, images)


@contextmanager
def offloaded_weights_at_hand(model: nn.Module) -> Iterator[None]:
    """Load all offloaded weights of `model`, and release them when the block ends."""
    hooked = [(module, module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")]
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            hook.post_forward(module, None)


def timm_features(timm_model: nn.Module, levels: list[int], images: torch.Tensor) -> list[torch.Tensor]:
    """Levels of a timm model; the last block of a transformer is read after the final norm."""
    if levels[-1] < len(timm_model.feature_info) - 1:
        # Before timm 1.0.31, some families keep a final norm that does not fit what is pruned before it.
        return timm_model.forward_intermediates(images, indices=levels, intermediates_only=True)
    last, features = timm_model.forward_intermediates(images, indices=levels)
    if last.ndim == 3:
        normed = last[:, timm_model.num_prefix_tokens :]
        features[-1] = normed.transpose(1, 2).reshape(features[-1].shape)
    return features


def transformer_features(
    vision_model: nn.Module, config: AutoencoderConfigMixin, images: torch.Tensor
) -> list[torch.Tensor]:
    """Levels of a transformers model; its last block is read after the final norm."""
    height, width = (side // config.vision_config.patch_size for side in images.shape[-2:])
    return [
        tokens[:, -height * width :].transpose(1, 2).reshape(images.shape[0], -1, height, width)
        for tokens in transformer_tokens(vision_model, config, images)
    ]


def class_and_patch_tokens(
    vision_model: nn.Module, config: AutoencoderConfigMixin, images: torch.Tensor
) -> list[torch.Tensor]:
    """
    The feature levels of a transformers model that has a class token, with it.

    Args:
        vision_model, config, images: as in [`vision_features`].

    Returns:
        `list[torch.Tensor]`: one `(batch_size, 1 + patches, hidden_size)` per level, without register tokens.
    """
    height, width = (side // config.vision_config.patch_size for side in images.shape[-2:])
    return [
        torch.cat([tokens[:, :1], tokens[:, -height * width :]], dim=1)
        for tokens in transformer_tokens(vision_model, config, images)
    ]


def transformer_tokens(
    vision_model: nn.Module, config: AutoencoderConfigMixin, images: torch.Tensor
) -> list[torch.Tensor]:
    """
    All tokens of a transformers model's levels, `(batch_size, tokens, hidden_size)`; its last block is read after the final norm.
    Class and register tokens come first in every family.
    """
    levels, vision_config = config.vision_feature_layers, config.vision_config
    is_clip = vision_config.model_type == "clip_vision_model"
    interpolates_on_request = is_clip or vision_config.model_type == "siglip_vision_model"
    kwargs = {"interpolate_pos_encoding": True} if interpolates_on_request else {}
    output, states = run_watched(vision_model, images, **kwargs)
    if levels[-1] == vision_config.num_hidden_layers:
        # CLIP applies its final norm to the class token only.
        last = output.last_hidden_state
        states[levels[-1]] = vision_model.post_layernorm(last) if is_clip else last
    return [states[level] for level in levels]


def read_weights(vision_model: nn.Module, config: AutoencoderConfigMixin) -> set[str]:
    """Names of the parameters of `vision_model` that the feature levels in `config` depend on, and of buffers in their modules."""
    parameters = dict(vision_model.named_parameters())
    example = next(iter(parameters.values()))
    images = example.new_zeros(1, 3, config.vision_image_size, config.vision_image_size)
    with torch.enable_grad():
        vision_model.requires_grad_(True)
        levels = vision_features(vision_model, config, images)
        sums = torch.stack([level.float().sum() for level in levels]).sum()
        gradients = torch.autograd.grad(sums, list(parameters.values()), allow_unused=True)
        vision_model.requires_grad_(False)
    read = {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    unread_modules = {name.rpartition(".")[0] for name in parameters.keys() - read}
    buffers = (name for name, _ in vision_model.named_buffers())
    return read | {name for name in buffers if name.rpartition(".")[0] not in unread_modules}


__all__ = [
    "build_vision_model",
    "class_and_patch_tokens",
    "fetch_vision_model",
    "read_weights",
    "run_watched",
    "vision_feature_channels",
    "vision_feature_stride",
    "vision_features",
    "watch_blocks",
]
