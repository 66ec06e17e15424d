"""
Convert original state dicts to models, and models to original state dicts, without files.

Models are created on the `meta` device and filled with the converted tensors, so memory holds the weights only once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vfmtok_hf.modeling.configuration_vfmtok import VFMTokConfig
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration

from . import infer_config
from .key_tables import (
    ORIGINAL_VISION_PREFIX,
    VISION_PREFIX,
    DroppedRow,
    KeyTable,
    ar_table,
    check_keys,
    dinov2_table,
    rar_table,
    to_original,
    to_ours,
    tokenizer_table,
)


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
    overrides = dict(overrides)
    vision_overrides = overrides.pop("vision_config", {})
    if not isinstance(vision_overrides, Mapping):
        raise ValueError(f"config's vision_config must be an object of fields, got {vision_overrides!r}.")
    tokenizer = {key: tensor for key, tensor in state_dict.items() if not key.startswith(ORIGINAL_VISION_PREFIX)}
    embedded = {key: tensor for key, tensor in state_dict.items() if key not in tokenizer}
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

    shapes = _shapes(tokenizer)
    table = _tokenizer_table(shapes)
    check_keys(tokenizer, table)
    vision_table = _vision_table(vision, prefix)
    if vision:
        vision_config = infer_config.dinov2_config(_shapes(vision), vision_overrides, prefix)
    elif vision_model is not None:
        vision_config = infer_config.pretrained_vision_config(vision_model, vision_overrides)
    else:
        vision_config = infer_config.described_vision_config(shapes, vision_overrides)
    # Build the vision model only if there are weights for it; whether it is saved may differ.
    config = infer_config.tokenizer_config(shapes, vision_config, {**overrides, "save_vision_model": bool(vision)})
    conversion = _fill(VFMTokModel, config, (tokenizer, table), (vision, vision_table))
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


def export_original_tokenizer(model: VFMTokModel, include_vision_model: bool = False) -> dict[str, torch.Tensor]:
    """
    The model's weights under the original tokenizer's names, in its order, as the original's `ema` and `model` entries.

    The original's history of used codes, which conversion drops, is zero, as in the original's moving averages.

    Args:
        include_vision_model: add the vision model, a DINOv2 with registers, as `export_original_dinov2` names it but
            under the original's backbone prefix. Original checkpoints leave it out.
    """
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(VISION_PREFIX)}
    original = to_original(weights, _table_of(model.config))
    if include_vision_model:
        vision = export_original_dinov2(model)
        original.update({ORIGINAL_VISION_PREFIX + name: tensor for name, tensor in vision.items()})
    return original


def export_original_dinov2(model: VFMTokModel) -> dict[str, torch.Tensor]:
    """
    The tokenizer's vision model under facebookresearch's DINOv2 names.

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


def _tokenizer_table(shapes: infer_config.Shapes) -> KeyTable:
    fields = infer_config.tokenizer_fields(shapes)
    return tokenizer_table(
        num_levels=infer_config.num_feature_levels(shapes),
        encoder_num_layers=fields["encoder_num_layers"],
        decoder_num_layers=fields["decoder_num_layers"],
        pixel_decoder_channels=infer_config.pixel_decoder_channels(shapes),
        pixel_decoder_num_res_blocks=fields["pixel_decoder_num_res_blocks"],
    )


def _table_of(config: VFMTokConfig) -> KeyTable:
    multipliers = reversed(config.pixel_decoder_channel_multipliers)
    return tokenizer_table(
        num_levels=len(config.vision_feature_layers),
        encoder_num_layers=config.encoder_num_layers,
        decoder_num_layers=config.decoder_num_layers,
        pixel_decoder_channels=[config.pixel_decoder_base_channels * multiplier for multiplier in multipliers],
        pixel_decoder_num_res_blocks=config.pixel_decoder_num_res_blocks,
    )


def _shapes(state_dict: StateDict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def _fill(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *parts: tuple[StateDict, KeyTable]
) -> Conversion:
    with torch.device("meta"):
        model = model_class(config)
    shapes = _shapes(model.state_dict())
    converted: dict[str, torch.Tensor] = {}
    dropped: dict[str, str] = {}
    for state_dict, table in parts:
        converted.update(to_ours(state_dict, table, shapes))
        dropped.update(
            {row.original: row.reason for row in table if isinstance(row, DroppedRow) and row.original in state_dict}
        )
    model.load_state_dict(converted, strict=True, assign=True)
    return Conversion(model.eval(), sum(len(state_dict) for state_dict, _ in parts), dropped)
