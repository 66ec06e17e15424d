"""
The frozen vision model of an image tokenizer and the levels of its features, for every family that is supported.

Blocks of transformers' models are read by forward hooks, timm's by its `forward_intermediates`: neither depends on what
the models' own outputs hold, which changes between versions.
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


# Families whose code reads weights of modules that it does not call, where accelerate's hooks do not see it.
READ_PAST_HOOKS = ("siglip_vision_model", "timm_wrapper")


class _Reading(threading.local):
    """What is read in the running call, by block; nothing outside of one. Threads may share a model."""

    outputs: dict[int, torch.Tensor] | None = None


_reading = _Reading()


def _keep(number: int, block: nn.Module, inputs: tuple, output: Any) -> None:
    if _reading.outputs is not None:
        output = output[0] if isinstance(output, tuple) else output
        _reading.outputs[number] = output if number else inputs[0]


def vision_blocks(vision_model: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks: the one that is as long as its configuration says."""
    depth = vision_model.config.num_hidden_layers
    return next(
        module for module in vision_model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    )


def watch_blocks(vision_model: nn.Module, numbers: list[int]) -> None:
    """
    Let [`run_watched`] see the outputs of blocks. Hooks stay: torch.compile can trace through one, but not set it.

    Args:
        vision_model (`torch.nn.Module`): a transformer of transformers' or like one, with one list of blocks.
        numbers (`list[int]`): of the blocks, the first of which is 1; 0 stands for what goes into it.
    """
    blocks = vision_blocks(vision_model)
    for number in set(numbers):
        blocks[max(number - 1, 0)].register_forward_hook(partial(_keep, number))


def run_watched(vision_model: nn.Module, images: torch.Tensor, **kwargs) -> tuple[Any, dict[int, torch.Tensor]]:
    """
    The model's output, and those of the blocks that are watched: `(batch_size, tokens, hidden_size)` by number.

    Args:
        vision_model (`torch.nn.Module`): after [`watch_blocks`].
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalized as the vision model wants them.
    """
    _reading.outputs = outputs = {}
    try:
        return vision_model(images, **kwargs), outputs
    finally:
        _reading.outputs = None


def _prepare(vision_model: nn.Module, config: AutoencoderConfigMixin) -> nn.Module:
    if config.vision_config.model_type == "timm_wrapper":
        # timm models run and store all of their stages; those behind the last feature level go.
        timm_model = vision_model.timm_model
        timm_model.prune_intermediate_layers(config.vision_feature_layers)
        # What follows the last stage of EfficientNets and MobileNets stays before timm 1.0.28.
        if hasattr(timm_model, "conv_head"):
            for name in timm_model._modules.keys() & {"conv_head", "bn2", "norm_head"}:
                setattr(timm_model, name, nn.Identity())
    elif config.vision_config.model_type != "timm_backbone":
        watch_blocks(vision_model, config.vision_feature_layers)
    # CLIP's and SigLIP's have an inner model that holds all in transformers before 5.6.
    return getattr(vision_model, "vision_model", vision_model)


def build_vision_model(config: AutoencoderConfigMixin) -> nn.Module:
    """The vision model that a tokenizer's `config` describes, with random weights."""
    return _prepare(AutoModel.from_config(config.vision_config), config)


def fetch_vision_model(
    name_or_path: str, config: AutoencoderConfigMixin, dtype: torch.dtype, **kwargs
) -> tuple[nn.Module, str | None]:
    """
    The vision model of a tokenizer with the weights of a folder or repository.

    Args:
        name_or_path (`str`): folder or repository.
        config ([`AutoencoderConfigMixin`]): of the tokenizer.
        dtype (`torch.dtype`): of the weights.
        kwargs: passed on to `AutoModel.from_pretrained`.

    Returns:
        The model, and the commit that the repository was read at; none for a folder.

    Raises:
        ValueError: the weights found do not fill the vision model.
        OSError: the source cannot be read; the message says how to go on from a folder.
    """
    commit = None
    try:
        with errors_naming(str(name_or_path)):
            if not os.path.isdir(name_or_path):
                names = ("revision", "cache_dir", "local_files_only", "token")
                where = {name: kwargs[name] for name in names if name in kwargs}
                # The cache holds files as snapshots/commit/file.
                commit = Path(hf_hub_download(name_or_path, "config.json", **where)).parent.name
                kwargs["revision"] = commit
            vision_model, info = AutoModel.from_pretrained(
                name_or_path, config=config.vision_config, dtype=dtype, output_loading_info=True, **kwargs
            )
    except OSError as error:
        raise OSError(
            f"The vision model {str(name_or_path)!r} cannot be fetched. Call load_vision_model(folder) with a copy of "
            f"it. Reason: {error}"
        ) from error
    prepared = _prepare(vision_model, config)
    missing = sorted(info["missing_keys"] & vision_model.state_dict().keys())
    if missing:
        raise ValueError(
            f"{name_or_path} is not the vision model of this checkpoint: {len(missing)} weights are missing from it, "
            f"the first of them {missing[0]!r}."
        )
    return prepared, commit


def vision_feature_channels(vision_model: nn.Module, config: AutoencoderConfigMixin) -> list[int]:
    """Channels of each feature level that a tokenizer's `config` takes of its `vision_model`."""
    if config.vision_config.model_type == "timm_wrapper":
        return [vision_model.timm_model.feature_info[level]["num_chs"] for level in config.vision_feature_layers]
    if config.vision_config.model_type == "timm_backbone":
        return list(vision_model.channels)
    return [config.vision_config.hidden_size] * len(config.vision_feature_layers)


def vision_feature_stride(vision_model: nn.Module, config: AutoencoderConfigMixin) -> int:
    """
    Pixels of the input of a tokenizer's `vision_model`, along one side, for each position of the last feature level that
    its `config` takes.
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
    The feature levels of images.

    Args:
        vision_model (`torch.nn.Module`): as of [`build_vision_model`] or [`fetch_vision_model`].
        config ([`AutoencoderConfigMixin`]): of the tokenizer.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalized as the vision model wants them.

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
    """Load all weights of `model` that accelerate's hooks have offloaded, and drop them again when the block ends."""
    hooked = [(module, module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")]
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            hook.post_forward(module, None)


def timm_features(timm_model: nn.Module, levels: list[int], images: torch.Tensor) -> list[torch.Tensor]:
    """Levels of a timm model; of a transformer's last block after the final norm."""
    last, features = timm_model.forward_intermediates(images, indices=levels)
    if last.ndim == 3 and levels[-1] == len(timm_model.feature_info) - 1:
        normed = last[:, timm_model.num_prefix_tokens :]
        features[-1] = normed.transpose(1, 2).reshape(features[-1].shape)
    return features


def transformer_features(
    vision_model: nn.Module, config: AutoencoderConfigMixin, images: torch.Tensor
) -> list[torch.Tensor]:
    """Levels of a transformers model; of its last block after the final norm."""
    levels, vision_config = config.vision_feature_layers, config.vision_config
    is_clip = vision_config.model_type == "clip_vision_model"
    interpolates_on_request = is_clip or vision_config.model_type == "siglip_vision_model"
    kwargs = {"interpolate_pos_encoding": True} if interpolates_on_request else {}
    output, states = run_watched(vision_model, images, **kwargs)
    if levels[-1] == vision_config.num_hidden_layers:
        # CLIP applies its final norm to the class token only.
        last = output.last_hidden_state
        states[levels[-1]] = vision_model.post_layernorm(last) if is_clip else last
    height, width = (side // vision_config.patch_size for side in images.shape[-2:])
    # Class and register tokens come first in every family.
    return [
        states[level][:, -height * width :].transpose(1, 2).reshape(images.shape[0], -1, height, width)
        for level in levels
    ]


__all__ = [
    "build_vision_model",
    "fetch_vision_model",
    "run_watched",
    "vision_feature_channels",
    "vision_feature_stride",
    "vision_features",
    "watch_blocks",
]
