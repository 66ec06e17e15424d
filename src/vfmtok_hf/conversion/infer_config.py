"""
Infer configurations from the shapes of a checkpoint's tensors, from known models and from overrides.

`*_fields` read counts and sizes from shapes; `*_config` add what shapes do not show.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from vfmtok_hf.modeling.autoencoder_config_vfmtok import RELEASED_VISION_CONFIG
from vfmtok_hf.modeling.configuration_vfmae import VFMAEConfig
from vfmtok_hf.modeling.configuration_vfmtok import VFMTokConfig
from vfmtok_hf.modeling.configuration_vfmtok_ar import VARIANTS, VFMTokARConfig
from vfmtok_hf.modeling.configuration_vfmtok_dit import VFMTokDiTConfig
from vfmtok_hf.modeling.configuration_vfmtok_rar import VFMTokRARConfig

from .errors import CheckpointError, listing


Shapes = Mapping[str, tuple[int, ...]]

# Heads of the released next-token generators, by (layers, width).
AR_HEADS = {
    (size["num_hidden_layers"], size["hidden_size"]): size["num_attention_heads"] for size in VARIANTS.values()
}
# The original's anchor encoder always has 8 heads; those of its ViT decoder depend on the width.
ENCODER_HEADS = 8
DECODER_HEADS = {512: 8}
# DINOv2 S, B and L: heads by width.
DINOV2_HEADS = {384: 6, 768: 12, 1024: 16}
RELEASED_VISION_MODEL = "facebook/dinov2-with-registers-large"
# Additional rows of RAR's tables besides the image tokens.
RAR_SPARE_POSITIONS = 1024
RAR_SPARE_TIMESTEPS = 100


class _Sizes:
    """Shapes by key, with an error that names a missing key or an unexpected rank."""

    def __init__(self, shapes: Shapes, prefix: str = ""):
        self.shapes = shapes
        self.prefix = prefix

    def of(self, key: str, rank: int) -> tuple[int, ...]:
        key = self.prefix + key
        if key not in self.shapes:
            raise CheckpointError(f"The checkpoint lacks {key!r}.")
        shape = tuple(self.shapes[key])
        if len(shape) != rank:
            raise CheckpointError(f"{key!r} has shape {shape}, expected {rank} dimensions.")
        return shape

    def count(self, list_name: str) -> int:
        """Length of a numbered list, at least one: `count("layers.")` for keys `layers.0.a`, `layers.1.a` is 2."""
        pattern = re.compile(re.escape(self.prefix + list_name) + r"(\d+)\.")
        members = {match[1] for key in self.shapes if (match := pattern.match(key))}
        if not members:
            raise CheckpointError(f"The checkpoint lacks every '{self.prefix}{list_name}*'.")
        return len(members)


def _grid_side(key: str, positions: int) -> int:
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise CheckpointError(f"{key!r} has {positions} positions, expected a class position and a square grid.")
    return side


# ---------------------------------------------------------------------------------------------------------------
# Fields inferred from shapes


def _autoencoder_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields that the shapes of the tokenizer and of VFMAE determine on their own."""
    sizes = _Sizes(shapes)
    _, num_anchors, hidden_size = sizes.of("encode_transformer.carrier_tokens", 3)
    channels = pixel_decoder_channels(shapes)
    base_channels = math.gcd(*channels)
    return {
        "num_anchors": num_anchors,
        "hidden_size": hidden_size,
        "encoder_num_layers": sizes.count("encode_transformer.transformer.layers."),
        "encoder_intermediate_size": sizes.of("encode_transformer.transformer.layers.0.linear1.weight", 2)[0],
        "decoder_num_layers": sizes.count("decode_transformer.transformer.layers."),
        "decoder_intermediate_size": sizes.of("decode_transformer.transformer.layers.0.ffnet.w3.weight", 2)[1],
        "pixel_decoder_base_channels": base_channels,
        "pixel_decoder_channel_multipliers": [width // base_channels for width in reversed(channels)],
        "pixel_decoder_num_res_blocks": sizes.count("decoder.conv_blocks.0.res.") - 1,
    }


def _position_grid_size(shapes: Shapes) -> int:
    """Side of the ViT decoder's position table."""
    table = "decode_transformer.position_embedding"
    return _grid_side(table, _Sizes(shapes).of(table, 3)[1])


def tokenizer_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields of `VFMTokConfig` that the tokenizer's shapes determine on their own."""
    sizes = _Sizes(shapes)
    codebook_size, codebook_dim = sizes.of("slot_quantize.embedding.weight", 2)
    return {
        **_autoencoder_fields(shapes),
        "num_register_tokens": sizes.of("decode_transformer.register_tokens", 3)[1],
        "feature_grid_size": _position_grid_size(shapes),
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
    }


def vfmae_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields of `VFMAEConfig` that the shapes determine on their own."""
    sizes = _Sizes(shapes)
    upsampling_factor = 2 ** (len(pixel_decoder_channels(shapes)) - 1)
    return {
        **_autoencoder_fields(shapes),
        "image_size": _position_grid_size(shapes) * upsampling_factor,
        "latent_channels": sizes.of("slots_quant.conv_out.weight", 4)[0],
        "feature_decoder_num_layers": sizes.count("decode_transformer.dino_transformer.layers."),
    }


def latent_shape(shapes: Shapes) -> tuple[int, int, int]:
    """Channels, height and width of VFMAE's latents."""
    sizes = _Sizes(shapes)
    side = math.isqrt(sizes.of("encode_transformer.carrier_tokens", 3)[1])
    return sizes.of("slots_quant.conv_out.weight", 4)[0], side, side


def pixel_decoder_channels(shapes: Shapes) -> list[int]:
    """Channels of each of the pixel decoder's resolutions, coarse to fine."""
    sizes = _Sizes(shapes)
    levels = range(sizes.count("decoder.conv_blocks."))
    return [sizes.of(f"decoder.conv_blocks.{level}.res.0.conv1.weight", 4)[0] for level in levels]


def num_feature_levels(shapes: Shapes) -> int:
    """Levels of vision features that the tokenizer reads."""
    return _Sizes(shapes).count("encode_transformer.projectors.")


def vision_feature_widths(shapes: Shapes) -> list[int]:
    """Channels of each feature level that the tokenizer reads."""
    sizes = _Sizes(shapes)
    levels = range(num_feature_levels(shapes))
    return [sizes.of(f"encode_transformer.projectors.{level}.mlp.0.weight", 2)[1] for level in levels]


def dinov2_fields(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """Fields of `Dinov2WithRegistersConfig` that the shapes of an original DINOv2 determine."""
    sizes = _Sizes(shapes, prefix)
    if f"{prefix}register_tokens" not in shapes:
        raise CheckpointError(
            "This DINOv2 has no register tokens, which original tokenizers use. To use another vision model, pass its "
            "Hugging Face repository as vision_model."
        )
    if f"{prefix}blocks.0.mlp.w12.weight" in shapes:
        raise CheckpointError(
            "DINOv2 giant (SwiGLU) cannot be converted from its original file: pass its Hugging Face repository as "
            "vision_model."
        )
    hidden_size, _, patch_size, _ = sizes.of("patch_embed.proj.weight", 4)
    return {
        "model_type": "dinov2_with_registers",
        "hidden_size": hidden_size,
        "num_hidden_layers": sizes.count("blocks."),
        "mlp_ratio": sizes.of("blocks.0.mlp.fc1.weight", 2)[0] // hidden_size,
        "patch_size": patch_size,
        "image_size": _grid_side(f"{prefix}pos_embed", sizes.of("pos_embed", 3)[1]) * patch_size,
        "num_register_tokens": sizes.of("register_tokens", 3)[1],
    }


def ar_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields of `VFMTokARConfig` that the shapes determine: all except the number of heads and of image tokens."""
    sizes = _Sizes(shapes)
    codebook_size, hidden_size = sizes.of("tok_embeddings.weight", 2)
    return {
        "codebook_size": codebook_size,
        "hidden_size": hidden_size,
        "num_classes": sizes.of("cls_embedding.embedding_table.weight", 2)[0] - 1,
        "num_hidden_layers": sizes.count("layers."),
        "intermediate_size": sizes.of("layers.0.feed_forward.w1.weight", 2)[0],
    }


def rar_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields of `VFMTokRARConfig` that the shapes determine: all except the number of image tokens."""
    sizes = _Sizes(shapes)
    vocabulary, hidden_size = sizes.of("embeddings.weight", 2)
    codebook_size = sizes.of("lm_head.weight", 2)[0]
    return {
        "codebook_size": codebook_size,
        # After the image tokens: a mask token, the classes and the null class.
        "num_classes": vocabulary - codebook_size - 2,
        "hidden_size": hidden_size,
        "num_hidden_layers": sizes.count("blocks."),
        "num_attention_heads": hidden_size // sizes.of("blocks.0.attn.q_norm.weight", 1)[0],
        "intermediate_size": sizes.of("blocks.0.mlp.fc1.weight", 2)[0],
        "num_position_embeddings": sizes.of("pos_embed", 3)[1],
        "num_timestep_embeddings": sizes.of("timesteps_embeddings", 3)[1],
    }


def dit_fields(shapes: Shapes) -> dict[str, Any]:
    """
    Fields of `VFMTokDiTConfig` that the shapes determine: all but how many of the layers are the head's where both parts are
    equally wide.
    """
    sizes = _Sizes(shapes)
    num_layers = sizes.count("blocks.")
    widths = [sizes.of(f"blocks.{index}.attn.proj.weight", 2)[0] for index in range(num_layers)]
    grid, head_dim = sizes.of("enc_feat_rope.freqs_cos", 2)
    head_head_dim = sizes.of("dec_feat_rope.freqs_cos", 2)[1]
    fields = {
        "latent_channels": sizes.of("final_layer.linear.weight", 2)[0],
        "sample_size": math.isqrt(grid),
        "num_classes": sizes.of("y_embedder.embedding_table.weight", 2)[0] - 1,
        "hidden_size": widths[0],
        "num_attention_heads": widths[0] // head_dim,
        "intermediate_size": sizes.of("blocks.0.mlp.w3.weight", 2)[1],
        "head_hidden_size": widths[-1],
        "head_num_attention_heads": widths[-1] // head_head_dim,
        "head_intermediate_size": sizes.of(f"blocks.{num_layers - 1}.mlp.w3.weight", 2)[1],
        "time_embedding_size": sizes.of("t_embedder.W", 1)[0],
    }
    if widths[0] != widths[-1]:
        fields["num_hidden_layers"] = widths.count(widths[0])
    return fields


# ---------------------------------------------------------------------------------------------------------------
# Whole configurations


def tokenizer_config(shapes: Shapes, vision_config: PreTrainedConfig, overrides: Mapping[str, Any]) -> VFMTokConfig:
    """
    Args:
        vision_config: configuration of the tokenizer's vision model.
        overrides: `VFMTokConfig` fields, without `vision_config`.
    """
    return _autoencoder_config(VFMTokConfig, tokenizer_fields(shapes), shapes, vision_config, overrides)


def vfmae_config(shapes: Shapes, vision_config: PreTrainedConfig, overrides: Mapping[str, Any]) -> VFMAEConfig:
    """Arguments as of `tokenizer_config`; `overrides` are `VFMAEConfig` fields."""
    inferred = vfmae_fields(shapes)
    # Configurations of timm models, which `VFMAEConfig` refuses, have no `patch_size`.
    inferred["vision_image_size"] = _position_grid_size(shapes) * getattr(vision_config, "patch_size", 1)
    return _autoencoder_config(VFMAEConfig, inferred, shapes, vision_config, overrides)


def _autoencoder_config(
    config_class,
    inferred: dict[str, Any],
    shapes: Shapes,
    vision_config: PreTrainedConfig,
    overrides: Mapping[str, Any],
):
    decoder_heads = DECODER_HEADS.get(inferred["hidden_size"])
    if decoder_heads is None and "decoder_num_heads" not in overrides:
        raise ValueError(f"No released model has width {inferred['hidden_size']}: set decoder_num_heads in config.")
    encoder_heads = overrides.get("encoder_num_heads", ENCODER_HEADS)
    if not isinstance(encoder_heads, int) or encoder_heads < 1:
        raise ValueError(f"encoder_num_heads must be a positive integer, got {encoder_heads!r}.")
    num_levels = num_feature_levels(shapes)
    weights = "encode_transformer.transformer.layers.0.cross_attn.attention_weights.bias"
    (locations,) = _Sizes(shapes).of(weights, 1)
    if locations % (encoder_heads * num_levels):
        raise CheckpointError(
            f"{weights!r} has {locations} entries, which {encoder_heads} encoder_num_heads and {num_levels} feature "
            "levels do not divide."
        )
    inferred["encoder_num_points"] = locations // (encoder_heads * num_levels)
    known = {"encoder_num_heads": encoder_heads, "decoder_num_heads": decoder_heads}
    config = _build(config_class, inferred, known, {**overrides, "vision_config": vision_config})
    if len(config.vision_feature_layers) != num_levels:
        raise ValueError(
            f"The checkpoint uses {num_levels} levels of vision features, but the configuration names "
            f"{config.vision_feature_layers}: set vision_feature_layers in config."
        )
    return config


def dinov2_config(shapes: Shapes, overrides: Mapping[str, Any], prefix: str = "") -> PreTrainedConfig:
    """Configuration of an original DINOv2. `overrides` are fields of it."""
    inferred = dinov2_fields(shapes, prefix)
    heads = DINOV2_HEADS.get(inferred["hidden_size"])
    if heads is None and "num_attention_heads" not in overrides:
        raise ValueError(
            f"No released DINOv2 has width {inferred['hidden_size']}: "
            "set num_attention_heads in config's vision_config."
        )
    _check_overrides(inferred, overrides)
    return AutoConfig.for_model(**{"num_attention_heads": heads, **inferred, **overrides})


def described_vision_config(shapes: Shapes, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """
    Vision configuration of a tokenizer without vision weights: the released DINOv2-L if the widths match.

    Args:
        overrides: fields of the vision configuration. If the widths do not match, all that differ from its defaults.
    """
    released = RELEASED_VISION_CONFIG
    widths = vision_feature_widths(shapes)
    fits_released = set(widths) == {released["hidden_size"]}
    if not fits_released and not overrides:
        raise ValueError(
            f"The checkpoint's vision features are {widths} wide, which does not match the released vision model: pass "
            "vision_checkpoint or vision_model, or configure the vision model in config's vision_config."
        )
    described = {"model_type": released["model_type"], **overrides}
    if fits_released and described["model_type"] == released["model_type"]:
        described = {**released, **described}
    return AutoConfig.for_model(**described)


def pretrained_vision_config(name_or_path: str, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Configuration of a transformers vision model; of two-tower models the vision tower's."""
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name_or_path} is not a folder or repository of a vision model: {reason}") from error
    config = getattr(config, "vision_config", config)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def ar_config(shapes: Shapes, overrides: Mapping[str, Any]) -> VFMTokARConfig:
    """`overrides` are fields of `VFMTokARConfig`."""
    inferred = ar_fields(shapes)
    size = (inferred["num_hidden_layers"], inferred["hidden_size"])
    if size not in AR_HEADS and "num_attention_heads" not in overrides:
        raise ValueError(
            f"{size[0]} layers of width {size[1]} are not a released size: set num_attention_heads in config."
        )
    known = {"num_attention_heads": AR_HEADS.get(size), **_imagenet_labels(inferred["num_classes"])}
    return _build(VFMTokARConfig, inferred, known, overrides)


def rar_config(shapes: Shapes, overrides: Mapping[str, Any]) -> VFMTokRARConfig:
    """`overrides` are fields of `VFMTokRARConfig`."""
    inferred = rar_fields(shapes)
    num_image_tokens = inferred["num_position_embeddings"] - RAR_SPARE_POSITIONS
    agree = num_image_tokens == inferred["num_timestep_embeddings"] - RAR_SPARE_TIMESTEPS
    if not agree and "num_image_tokens" not in overrides:
        raise ValueError(
            f"{inferred['num_position_embeddings']} positions and {inferred['num_timestep_embeddings']} timesteps are "
            "not consistent with the original's number of image tokens: set num_image_tokens in config."
        )
    known = {"num_image_tokens": num_image_tokens, **_imagenet_labels(inferred["num_classes"])}
    return _build(VFMTokRARConfig, inferred, known, overrides)


def dit_config(shapes: Shapes, overrides: Mapping[str, Any]) -> VFMTokDiTConfig:
    """`overrides` are fields of `VFMTokDiTConfig`."""
    inferred = dit_fields(shapes)
    if "num_hidden_layers" not in inferred | dict(overrides):
        raise ValueError(
            "Encoder and head are equally wide: set num_hidden_layers, the number of layers of the encoder, in config."
        )
    num_layers, num_hidden_layers = _Sizes(shapes).count("blocks."), {**overrides, **inferred}["num_hidden_layers"]
    if num_hidden_layers >= num_layers:
        raise ValueError(
            f"config has num_hidden_layers = {num_hidden_layers}, but the checkpoint has {num_layers} layers, and at least "
            "one of them is the head's."
        )
    inferred["head_num_hidden_layers"] = num_layers - num_hidden_layers
    return _build(VFMTokDiTConfig, inferred, _imagenet_labels(inferred["num_classes"]), overrides)


def _imagenet_labels(num_classes: int) -> dict[str, Any]:
    """The released generators' classes are ImageNet-1k's in its usual order."""
    if num_classes != 1000:
        return {}
    from timm.data import ImageNetInfo  # slow to import, and only needed here

    names = ImageNetInfo("imagenet-1k")
    return {"id2label": {index: names.index_to_description(index) for index in range(1000)}}


def _build(config_class, inferred: Mapping[str, Any], known: Mapping[str, Any], overrides: Mapping[str, Any]):
    if unknown := sorted(set(overrides) - config_class.default_fields().keys()):
        raise ValueError(f"config contains {listing(unknown)}, which {config_class.__name__} does not have.")
    _check_overrides(inferred, overrides)
    try:
        return config_class(**{**known, **inferred, **overrides})
    except (StrictDataclassError, ValueError) as error:
        # For a wrong type, the second of two lines describes the error.
        raise ValueError(f"The configuration is invalid: {str(error).splitlines()[-1].strip()}") from error


def _check_overrides(inferred: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    for name in sorted(set(inferred) & set(overrides)):
        if inferred[name] != overrides[name]:
            raise CheckpointError(f"config has {name} = {overrides[name]}, but the checkpoint has {inferred[name]}.")
