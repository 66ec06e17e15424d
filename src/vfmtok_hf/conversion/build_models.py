"""
Convert original state dicts to models, and models to original state dicts, without files.

Models are created on the `meta` device and filled with the converted tensors, so memory holds the weights only once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vfmtok_hf.modeling.autoencoder_vfmtok import VFMTokAutoencoder
from vfmtok_hf.modeling.configuration_vfmae import VFMAEConfig
from vfmtok_hf.modeling.configuration_vfmtok import VFMTokConfig
from vfmtok_hf.modeling.modeling_vfmae import VFMAEModel
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_dit import VFMTokDiTForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration

from . import infer_config
from .errors import CheckpointError
from .key_tables import (
    ORIGINAL_VISION_PREFIX,
    VISION_PREFIX,
    DroppedRow,
    KeyTable,
    ar_table,
    check_keys,
    dinov2_table,
    dit_table,
    rar_table,
    to_original,
    to_ours,
    tokenizer_table,
    vfmae_table,
)
from .read_checkpoint import LatentStatistics


StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Conversion:
    """
    A model with the weights of an original checkpoint.

    Args:
        keys_read: tensors of the original, including those of the vision model.
        dropped: tensors left out, with the reason for each.
    """

    model: PreTrainedModel
    keys_read: int
    dropped: dict[str, str]


def build_tokenizer(
    state_dict: StateDict,
    overrides: Mapping[str, Any],
    vision_state_dict: StateDict | None = None,
    vision_model: str | None = None,
) -> Conversion:
    """
    Build the tokenizer of an original state dict.

    Vision weights come from `vision_state_dict` (an original DINOv2) or from the original's backbone prefix in
    `state_dict`. Only the configuration of `vision_model`, a repository or folder, is read: if
    `config.save_vision_model` is true, call `load_vision_model` for its weights.
    """
    return _build_autoencoder(
        VFMTokModel,
        _tokenizer_table,
        infer_config.tokenizer_config,
        state_dict,
        overrides,
        vision_state_dict,
        vision_model,
    )


def build_vfmae(
    state_dict: StateDict,
    overrides: Mapping[str, Any],
    vision_state_dict: StateDict | None = None,
    vision_model: str | None = None,
    statistics: LatentStatistics | None = None,
) -> Conversion:
    """
    The continuous autoencoder of an original state dict; arguments as of `build_tokenizer`.

    Args:
        statistics: mean and standard deviation of the latents, each `(latent_channels, num_anchors)`; 0 and 1 without.
    """
    latent_shape = infer_config.latent_shape(_shapes(state_dict))
    return _build_autoencoder(
        VFMAEModel,
        _vfmae_table,
        infer_config.vfmae_config,
        state_dict,
        overrides,
        vision_state_dict,
        vision_model,
        **_statistics_buffers(statistics, latent_shape),
    )


def _statistics_buffers(statistics: LatentStatistics | None, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    if statistics is None:
        return {"latents_mean": torch.zeros(shape), "latents_std": torch.ones(shape)}
    channels, height, width = shape
    for name, values in (("mean", statistics.mean), ("standard deviation", statistics.std)):
        if values.shape != (channels, height * width):
            raise CheckpointError(
                f"The {name} of the latents has shape {tuple(values.shape)}, the checkpoint's latents "
                f"{(channels, height * width)}: the statistics belong to another model."
            )
    return {"latents_mean": statistics.mean.reshape(shape), "latents_std": statistics.std.reshape(shape)}


def _build_autoencoder(
    model_class: type[PreTrainedModel],
    infer_table: Callable[[infer_config.Shapes], KeyTable],
    make_config: Callable[[infer_config.Shapes, PreTrainedConfig, Mapping[str, Any]], PreTrainedConfig],
    state_dict: StateDict,
    overrides: Mapping[str, Any],
    vision_state_dict: StateDict | None,
    vision_model: str | None,
    **more_weights: torch.Tensor,
) -> Conversion:
    overrides = dict(overrides)
    vision_overrides = overrides.pop("vision_config", {})
    if not isinstance(vision_overrides, Mapping):
        raise ValueError(f"config's vision_config must be an object of fields, got {vision_overrides!r}.")
    autoencoder = {key: tensor for key, tensor in state_dict.items() if not key.startswith(ORIGINAL_VISION_PREFIX)}
    embedded = {key: tensor for key, tensor in state_dict.items() if key not in autoencoder}
    if embedded and (vision_state_dict is not None or vision_model is not None):
        raise ValueError("The checkpoint contains its vision model: pass neither vision_checkpoint nor vision_model.")
    vision, prefix = (embedded, ORIGINAL_VISION_PREFIX) if embedded else (vision_state_dict or {}, "")
    save_vision_model = overrides.pop("save_vision_model", bool(vision) or vision_model is not None)
    if save_vision_model and not vision and vision_model is None:
        raise ValueError("config.save_vision_model is true: pass vision_checkpoint or vision_model.")
    if vision and not save_vision_model:
        raise ValueError("config.save_vision_model is false, but vision weights are passed: leave one of them out.")
    if not save_vision_model:
        released = None if vision_overrides else infer_config.RELEASED_VISION_MODEL
        overrides.setdefault("vision_model_name_or_path", vision_model or released)

    shapes = _shapes(autoencoder)
    table = infer_table(shapes)
    check_keys(autoencoder, table)
    vision_table = _vision_table(vision, prefix)
    if vision:
        vision_config = infer_config.dinov2_config(_shapes(vision), vision_overrides, prefix)
    elif vision_model is not None:
        vision_config = infer_config.pretrained_vision_config(vision_model, vision_overrides)
    else:
        vision_config = infer_config.described_vision_config(shapes, vision_overrides)
    # Build the vision model only if there are weights for it; whether it is saved may differ.
    config = make_config(shapes, vision_config, {**overrides, "save_vision_model": bool(vision)})
    conversion = _fill(model_class, config, (autoencoder, table), (vision, vision_table), **more_weights)
    conversion.model.config.save_vision_model = save_vision_model
    return conversion


def _vision_table(vision: StateDict, prefix: str) -> KeyTable:
    if not vision:
        return []
    table = dinov2_table(infer_config.dinov2_fields(_shapes(vision), prefix)["num_hidden_layers"], prefix)
    check_keys(vision, table)
    return table


def build_ar(state_dict: StateDict, overrides: Mapping[str, Any]) -> Conversion:
    """Build the next-token generator of an original state dict."""
    shapes = _shapes(state_dict)
    table = ar_table(infer_config.ar_fields(shapes)["num_hidden_layers"])
    check_keys(state_dict, table)
    return _fill(VFMTokARForImageGeneration, infer_config.ar_config(shapes, overrides), (state_dict, table))


def build_rar(state_dict: StateDict, overrides: Mapping[str, Any]) -> Conversion:
    """Build the randomized-order generator of an original state dict."""
    shapes = _shapes(state_dict)
    table = rar_table(infer_config.rar_fields(shapes)["num_hidden_layers"])
    check_keys(state_dict, table)
    return _fill(VFMTokRARForImageGeneration, infer_config.rar_config(shapes, overrides), (state_dict, table))


def build_dit(state_dict: StateDict, overrides: Mapping[str, Any]) -> Conversion:
    """The diffusion transformer of an original state dict."""
    config = infer_config.dit_config(_shapes(state_dict), overrides)
    table = dit_table(config)
    check_keys(state_dict, table)
    return _fill(VFMTokDiTForImageGeneration, config, (state_dict, table))


def export_original_tokenizer(model: VFMTokModel, include_vision_model: bool = False) -> dict[str, torch.Tensor]:
    """
    The model's weights under the original tokenizer's names, in its order, as the original's `ema` and `model` entries.

    The original's history of used codes, which conversion drops, is zero, as in the original's moving averages.

    Args:
        include_vision_model: add the vision model, a DINOv2 with registers, as `export_original_dinov2` names it but
            under the original's backbone prefix. Original checkpoints leave it out.
    """
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(VISION_PREFIX)}
    return to_original(weights, _tokenizer_table_of(model.config)) | _original_vision(model, include_vision_model)


def export_original_vfmae(model: VFMAEModel, include_vision_model: bool = False) -> dict[str, torch.Tensor]:
    """
    The model's weights under the original VFMAE's names, in its order.

    The statistics of its latents have a file of their own there: see `export_latent_statistics`.

    Args:
        include_vision_model: add the vision model, as `export_original_tokenizer` does.
    """
    ours = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith((VISION_PREFIX, "latents_"))
    }
    return to_original(ours, _vfmae_table_of(model.config)) | _original_vision(model, include_vision_model)


def export_latent_statistics(model: VFMAEModel) -> dict[str, torch.Tensor]:
    """`mean` and `std` of the model's latents, `(latent_channels, num_anchors)`, as `convert_vfmae` reads them from a file."""
    return {"mean": model.latents_mean.flatten(1).clone(), "std": model.latents_std.flatten(1).clone()}


def _original_vision(model: VFMTokAutoencoder, include: bool) -> dict[str, torch.Tensor]:
    if not include:
        return {}
    return {ORIGINAL_VISION_PREFIX + name: tensor for name, tensor in export_original_dinov2(model).items()}


def export_original_dinov2(model: VFMTokAutoencoder) -> dict[str, torch.Tensor]:
    """
    The vision model of a tokenizer or VFMAE under facebookresearch's DINOv2 names.

    Raises:
        ValueError: the vision model is of another type, or missing.
    """
    if model.vision_model is None:
        raise ValueError("This model has no vision weights: call load_vision_model first.")
    vision_config: Any = model.config.vision_config
    if vision_config.model_type != "dinov2_with_registers":
        raise ValueError(f"Only DINOv2 with registers has original names, not {vision_config.model_type!r}.")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(VISION_PREFIX)}
    return to_original(weights, dinov2_table(vision_config.num_hidden_layers))


def export_original_ar(model: VFMTokARForImageGeneration) -> dict[str, torch.Tensor]:
    """The model's weights under the original GPT's names, in its order."""
    return to_original(model.state_dict(), ar_table(model.config.num_hidden_layers))


def export_original_rar(model: VFMTokRARForImageGeneration) -> dict[str, torch.Tensor]:
    """The model's weights under the original RAR's names, in its order."""
    return to_original(model.state_dict(), rar_table(model.config.num_hidden_layers))


def export_original_dit(model: VFMTokDiTForImageGeneration) -> dict[str, torch.Tensor]:
    """The model's weights under the original DiTDH's names, in its order."""
    return to_original(model.state_dict(), dit_table(model.config))


def export_diffusers_dit(model: VFMTokDiTForImageGeneration) -> dict[str, torch.Tensor]:
    """
    The model's weights under the names of `RAEDiT2DModel`, which pull request 13231 adds to diffusers and no release of it
    has yet.
    """
    return to_original(model.state_dict(), dit_table(model.config, diffusers_names=True))


def _tokenizer_table(shapes: infer_config.Shapes) -> KeyTable:
    return tokenizer_table(**_counts(shapes, infer_config.tokenizer_fields(shapes)))


def _vfmae_table(shapes: infer_config.Shapes) -> KeyTable:
    fields = infer_config.vfmae_fields(shapes)
    feature_layers = fields["feature_decoder_num_layers"]
    return vfmae_table(feature_decoder_num_layers=feature_layers, **_counts(shapes, fields))


def _counts(shapes: infer_config.Shapes, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_levels": infer_config.num_feature_levels(shapes),
        "encoder_num_layers": fields["encoder_num_layers"],
        "decoder_num_layers": fields["decoder_num_layers"],
        "pixel_decoder_channels": infer_config.pixel_decoder_channels(shapes),
        "pixel_decoder_num_res_blocks": fields["pixel_decoder_num_res_blocks"],
    }


def _tokenizer_table_of(config: VFMTokConfig) -> KeyTable:
    return tokenizer_table(**_counts_of(config))


def _vfmae_table_of(config: VFMAEConfig) -> KeyTable:
    return vfmae_table(feature_decoder_num_layers=config.feature_decoder_num_layers, **_counts_of(config))


def _counts_of(config: VFMTokConfig | VFMAEConfig) -> dict[str, Any]:
    multipliers = reversed(config.pixel_decoder_channel_multipliers)
    return {
        "num_levels": len(config.vision_feature_layers),
        "encoder_num_layers": config.encoder_num_layers,
        "decoder_num_layers": config.decoder_num_layers,
        "pixel_decoder_channels": [config.pixel_decoder_base_channels * multiplier for multiplier in multipliers],
        "pixel_decoder_num_res_blocks": config.pixel_decoder_num_res_blocks,
    }


def _shapes(state_dict: StateDict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def _fill(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *parts: tuple[StateDict, KeyTable],
    **more_weights: torch.Tensor,
) -> Conversion:
    """A model of the tensors of `parts`, and of `more_weights` under our names."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = _shapes(model.state_dict())
    converted: dict[str, torch.Tensor] = dict(more_weights)
    dropped: dict[str, str] = {}
    for state_dict, table in parts:
        converted.update(to_ours(state_dict, table, shapes))
        dropped.update(
            {row.original: row.reason for row in table if isinstance(row, DroppedRow) and row.original in state_dict}
        )
    model.load_state_dict(converted, strict=True, assign=True)
    return Conversion(model.eval(), sum(len(state_dict) for state_dict, _ in parts), dropped)
