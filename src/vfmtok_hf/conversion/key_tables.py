"""
Tables of the original's parameter names and ours, and pure functions that apply them in either direction.

A table lists *all* tensors of a network in the original's order. It is generated from the few counts (layers, levels)
that determine which tensors exist. Names: https://github.com/CVMI-Lab/VFMTok,
https://github.com/CVMI-Lab/VFMTok-RAR and https://github.com/CVMI-Lab/VFMTok2 (`state_dict()` of their networks),
https://github.com/facebookresearch/dinov2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from vfmtok_hf.modeling.configuration_vfmtok_dit import VFMTokDiTConfig
from vfmtok_hf.modeling.rotary_vfmtok import rotary_table

from .errors import CheckpointError, listing


# Where the original tokenizer keeps its vision model. Released files leave it out.
ORIGINAL_VISION_PREFIX = "encode_transformer.backbone.pretrained_encoder."
VISION_PREFIX = "vision_model."


@dataclass(frozen=True)
class Row:
    """One tensor of the original, which may be several of our tensors stacked along dimension 0."""

    original: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class DroppedRow:
    """
    A tensor of the original that is not a weight of ours. Converting back writes zeros of `shape`, or `values` where our
    model computes the tensor. An original must contain the same values.
    """

    original: str
    shape: tuple[int, ...]
    reason: str
    values: torch.Tensor | None = None


KeyTable = list[Row | DroppedRow]


def _tensor(original: str, *ours: str) -> Iterator[Row]:
    yield Row(original, ours)


def _weight(original: str, *ours: str) -> Iterator[Row]:
    yield Row(f"{original}.weight", tuple(f"{name}.weight" for name in ours))


def _layer(original: str, *ours: str) -> Iterator[Row]:
    yield from _weight(original, *ours)
    yield Row(f"{original}.bias", tuple(f"{name}.bias" for name in ours))


def _query_key_value(ours: str) -> list[str]:
    return [f"{ours}.{name}_proj" for name in "qkv"]


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer


def tokenizer_table(
    *,
    num_levels: int,
    encoder_num_layers: int,
    decoder_num_layers: int,
    pixel_decoder_channels: Sequence[int],
    pixel_decoder_num_res_blocks: int,
) -> KeyTable:
    """
    Rows of the tokenizer without its vision model.

    Args:
        pixel_decoder_channels: channels of each resolution, coarse to fine.
    """
    return [
        *_pixel_decoder(pixel_decoder_channels, pixel_decoder_num_res_blocks),
        *_anchor_encoder(num_levels, encoder_num_layers),
        *_vit_decoder(decoder_num_layers),
        DroppedRow(
            "slot_quantize.codebook_used", (65536,), "history of codes seen in training, not used by any forward pass"
        ),
        *_weight("slot_quantize.embedding", "quantizer.codebook"),
        *_layer("pre_slots_quant", "quant_proj"),
        *_layer("post_slots_quant", "post_quant_proj"),
    ]


def vfmae_table(
    *,
    num_levels: int,
    encoder_num_layers: int,
    decoder_num_layers: int,
    feature_decoder_num_layers: int,
    pixel_decoder_channels: Sequence[int],
    pixel_decoder_num_res_blocks: int,
) -> KeyTable:
    """Rows of VFMAE without its vision model; arguments as of [`tokenizer_table`]."""
    return [
        *_pixel_decoder(pixel_decoder_channels, pixel_decoder_num_res_blocks),
        *_anchor_encoder(num_levels, encoder_num_layers),
        *_vfmae_vit_decoder(decoder_num_layers, feature_decoder_num_layers),
        *_layer("slots_quant.norm_out", "bottleneck.norm"),
        *_layer("slots_quant.conv_out", "bottleneck.conv"),
        *_layer("post_slots_quant", "latent_proj"),
    ]


def _pixel_decoder(channels: Sequence[int], num_res_blocks: int) -> Iterator[Row]:
    yield from _layer("decoder.conv_in", "pixel_decoder.conv_in")
    yield from _resnet("decoder.mid.0", "pixel_decoder.mid_block.resnet_in")
    attention = "pixel_decoder.mid_block.attention"
    yield from _layer("decoder.mid.1.norm", f"{attention}.norm")
    for name in "qkv":
        yield from _layer(f"decoder.mid.1.{name}", f"{attention}.{name}_proj")
    yield from _layer("decoder.mid.1.proj_out", f"{attention}.o_proj")
    yield from _resnet("decoder.mid.2", "pixel_decoder.mid_block.resnet_out")
    before = channels[0]
    for level, after in enumerate(channels):
        original, ours = f"decoder.conv_blocks.{level}", f"pixel_decoder.up_blocks.{level}"
        for block in range(num_res_blocks + 1):
            has_shortcut = block == 0 and before != after
            yield from _resnet(f"{original}.res.{block}", f"{ours}.resnets.{block}", has_shortcut)
        if level < len(channels) - 1:
            yield from _layer(f"{original}.upsample.conv", f"{ours}.upsample")
        before = after
    yield from _layer("decoder.norm_out", "pixel_decoder.norm_out")
    yield from _layer("decoder.conv_out", "pixel_decoder.conv_out")


def _resnet(original: str, ours: str, has_shortcut: bool = False) -> Iterator[Row]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from _layer(f"{original}.{name}", f"{ours}.{name}")
    if has_shortcut:
        yield from _layer(f"{original}.nin_shortcut", f"{ours}.shortcut")


def _anchor_encoder(num_levels: int, num_layers: int) -> Iterator[Row]:
    yield from _tensor("encode_transformer.carrier_tokens", "anchor_encoder.anchor_queries")
    yield from _tensor("encode_transformer.slots_pos", "anchor_encoder.anchor_position_embeddings")
    for level in range(num_levels):
        original, ours = f"encode_transformer.projectors.{level}.mlp", f"anchor_encoder.projectors.{level}"
        yield from _weight(f"{original}.0", f"{ours}.fc1")
        yield from _layer(f"{original}.1", f"{ours}.norm1")
        yield from _weight(f"{original}.3", f"{ours}.fc2")
        yield from _layer(f"{original}.4", f"{ours}.norm2")
    for level in range(num_levels):
        yield from _layer(f"encode_transformer.norm_layers.{level}", f"anchor_encoder.projectors.{level}.output_norm")
    for index in range(num_layers):
        yield from _anchor_encoder_layer(
            f"encode_transformer.transformer.layers.{index}", f"anchor_encoder.layers.{index}"
        )
    yield from _layer("encode_transformer.norm_pre1", "anchor_encoder.query_norm")


def _anchor_encoder_layer(original: str, ours: str) -> Iterator[Row]:
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        yield from _layer(f"{original}.cross_attn.{name}", f"{ours}.cross_attn.{name}")
    yield from _layer(f"{original}.norm1", f"{ours}.cross_attn_norm")
    yield from _layer(f"{original}.linear1", f"{ours}.mlp.fc1")
    yield from _layer(f"{original}.linear2", f"{ours}.mlp.fc2")
    yield from _layer(f"{original}.norm2", f"{ours}.mlp_norm")
    yield from _self_attention(f"{original}.self_attn", f"{ours}.self_attn")
    yield from _layer(f"{original}.norm3", f"{ours}.self_attn_norm")


def _self_attention(original: str, ours: str) -> Iterator[Row]:
    for name in "qkv":
        yield from _layer(f"{original}.{name}_proj", f"{ours}.{name}_proj")
    yield from _layer(f"{original}.out_proj", f"{ours}.o_proj")


def _vit_decoder(num_layers: int) -> Iterator[Row]:
    for original, ours in (
        ("position_embedding", "position_embeddings"),
        ("slot_position_embedding", "anchor_position_embeddings"),
        ("mask_embedding", "image_mask_token"),
        ("mask_dino", "feature_mask_token"),
        ("cls_token", "cls_token"),
        ("register_tokens", "register_tokens"),
    ):
        yield from _tensor(f"decode_transformer.{original}", f"vit_decoder.{ours}")
    yield from _vit_decoder_layers("decode_transformer.transformer.layers", "vit_decoder.layers", num_layers)
    yield from _vit_decoder_outputs()


def _vit_decoder_layers(original_list: str, our_list: str, num_layers: int) -> Iterator[Row]:
    for index in range(num_layers):
        original, ours = f"{original_list}.{index}", f"{our_list}.{index}"
        yield from _layer(f"{original}.norm1", f"{ours}.self_attn_norm")
        yield from _self_attention(f"{original}.attn1", f"{ours}.self_attn")
        yield from _layer(f"{original}.norm2", f"{ours}.mlp_norm")
        yield from _layer(f"{original}.ffnet.w12", f"{ours}.mlp.gate_proj", f"{ours}.mlp.up_proj")
        yield from _layer(f"{original}.ffnet.w3", f"{ours}.mlp.down_proj")


def _vit_decoder_outputs() -> Iterator[Row]:
    yield from _layer("decode_transformer.norm_post1", "vit_decoder.image_norm")
    yield from _layer("decode_transformer.norm_post2", "vit_decoder.feature_norm")
    yield from _layer("decode_transformer.proj", "vit_decoder.feature_head")


def _vfmae_vit_decoder(num_layers: int, feature_num_layers: int) -> Iterator[Row]:
    for original, ours in (
        ("position_embedding", "position_embeddings"),
        ("slot_position_embedding", "anchor_position_embeddings"),
        ("mask_embedding", "image_mask_token"),
        ("dino_mask", "feature_mask_token"),
        ("cls_token", "cls_token"),
    ):
        yield from _tensor(f"decode_transformer.{original}", f"vit_decoder.{ours}")
    for original, ours, count in (
        ("transformer", "layers", num_layers),
        ("dino_transformer", "feature_layers", feature_num_layers),
    ):
        yield from _vit_decoder_layers(f"decode_transformer.{original}.layers", f"vit_decoder.{ours}", count)
    yield from _vit_decoder_outputs()


def _dinov2_projections() -> list[str]:
    """Names of an attention's query, key, value and output layers, which differ between transformers' versions."""
    with torch.device("meta"):
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_hidden_layers=1))
    attention = model.encoder.layer[0].attention
    return [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]  # type: ignore[union-attr]


def dinov2_table(num_layers: int, original_prefix: str = "", prefix: str = VISION_PREFIX) -> KeyTable:
    """Rows of a DINOv2 with registers and plain MLPs (S, B, L): facebookresearch's names and transformers'."""
    projections = _dinov2_projections()
    rows: KeyTable = []
    for original, ours in (
        ("cls_token", "cls_token"),
        ("pos_embed", "position_embeddings"),
        ("register_tokens", "register_tokens"),
        ("mask_token", "mask_token"),
    ):
        rows += _tensor(original_prefix + original, f"{prefix}embeddings.{ours}")
    rows += _layer(f"{original_prefix}patch_embed.proj", f"{prefix}embeddings.patch_embeddings.projection")
    for index in range(num_layers):
        original, ours = f"{original_prefix}blocks.{index}", f"{prefix}encoder.layer.{index}"
        rows += _layer(f"{original}.norm1", f"{ours}.norm1")
        *query_key_value, output = (f"{ours}.attention.{name}" for name in projections)
        rows += _layer(f"{original}.attn.qkv", *query_key_value)
        rows += _layer(f"{original}.attn.proj", output)
        rows += _tensor(f"{original}.ls1.gamma", f"{ours}.layer_scale1.lambda1")
        rows += _layer(f"{original}.norm2", f"{ours}.norm2")
        rows += _layer(f"{original}.mlp.fc1", f"{ours}.mlp.fc1")
        rows += _layer(f"{original}.mlp.fc2", f"{ours}.mlp.fc2")
        rows += _tensor(f"{original}.ls2.gamma", f"{ours}.layer_scale2.lambda1")
    rows += _layer(f"{original_prefix}norm", f"{prefix}layernorm")
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Generators


def ar_table(num_layers: int) -> KeyTable:
    """Rows of the next-token generator (LlamaGen's GPT)."""
    rows: KeyTable = []
    rows += _weight("cls_embedding.embedding_table", "class_embedding")
    rows += _weight("tok_embeddings", "embed_tokens")
    for index in range(num_layers):
        layer = f"layers.{index}"
        rows += _weight(f"{layer}.attention.wqkv", *_query_key_value(f"{layer}.self_attn"))
        rows += _weight(f"{layer}.attention.wo", f"{layer}.self_attn.o_proj")
        rows += _weight(f"{layer}.feed_forward.w1", f"{layer}.mlp.gate_proj")
        rows += _weight(f"{layer}.feed_forward.w3", f"{layer}.mlp.up_proj")
        rows += _weight(f"{layer}.feed_forward.w2", f"{layer}.mlp.down_proj")
        rows += _weight(f"{layer}.attention_norm", f"{layer}.input_layernorm")
        rows += _weight(f"{layer}.ffn_norm", f"{layer}.post_attention_layernorm")
    rows += _weight("norm", "norm")
    rows += _weight("output", "lm_head")
    return rows


def rar_table(num_layers: int) -> KeyTable:
    """Rows of the randomized-order generator (RAR)."""
    rows: KeyTable = []
    for original, ours in (
        ("cls_token", "cls_token"),
        ("pos_embed", "position_embeddings"),
        ("target_aware_pos_embed", "target_position_embeddings"),
        ("timesteps_embeddings", "timestep_embeddings"),
    ):
        rows += _tensor(original, ours)
    for index in range(num_layers):
        original, ours = f"blocks.{index}", f"layers.{index}"
        rows += _layer(f"{original}.norm1", f"{ours}.norm1")
        rows += _layer(f"{original}.attn.qkv", *_query_key_value(f"{ours}.self_attn"))
        rows += _layer(f"{original}.attn.q_norm", f"{ours}.self_attn.q_norm")
        rows += _layer(f"{original}.attn.k_norm", f"{ours}.self_attn.k_norm")
        rows += _layer(f"{original}.attn.proj", f"{ours}.self_attn.o_proj")
        rows += _layer(f"{original}.norm2", f"{ours}.norm2")
        rows += _layer(f"{original}.mlp.fc1", f"{ours}.mlp.fc1")
        rows += _layer(f"{original}.mlp.fc2", f"{ours}.mlp.fc2")
        rows += _layer(f"{original}.adaLN_modulation.1", f"{ours}.modulation")
    rows += _weight("embeddings", "embed_tokens")
    rows += _layer("adaln_before_head.adaLN_modulation.1", "norm_modulation")
    rows += _layer("lm_head", "lm_head")
    return rows


def dit_table(config: VFMTokDiTConfig, diffusers_names: bool = False) -> KeyTable:
    """
    Rows of the diffusion transformer (RAE's DiTDH).

    Args:
        diffusers_names: the names that `RAEDiT2DModel` of diffusers' pull request 13231 has in place of the original's.
    """
    rows: KeyTable = []
    rows += _tensor("pos_embed", "position_embeddings")
    rows += _layer("x_embedder.proj", "head_embed")
    rows += _layer("s_embedder.proj", "encoder_embed")
    if config.hidden_size != config.head_hidden_size:
        rows += _layer("s_projector", "condition_proj")
    rows += _tensor("t_embedder.W", "time_embedding.frequencies")
    rows += _layer("t_embedder.mlp.0", "time_embedding.fc1")
    rows += _layer("t_embedder.mlp.2", "time_embedding.fc2")
    rows += _weight("y_embedder.embedding_table", "class_embedding")
    rows += _weight("final_layer.norm_final", "norm")
    rows += _layer("final_layer.linear", "velocity_proj")
    rows += _layer("final_layer.adaLN_modulation.1", "norm_modulation")
    rows += _rotary_buffers("enc_feat_rope", config, config.hidden_size // config.num_attention_heads)
    rows += _rotary_buffers("dec_feat_rope", config, config.head_hidden_size // config.head_num_attention_heads)
    encoder_layers = [f"encoder_layers.{index}" for index in range(config.num_hidden_layers)]
    head_layers = [f"head_layers.{index}" for index in range(config.head_num_hidden_layers)]
    for index, ours in enumerate([*encoder_layers, *head_layers]):
        rows += (_diffusers_dit_layer if diffusers_names else _dit_layer)(f"blocks.{index}", ours)
    return rows


def _dit_layer(original: str, ours: str) -> Iterator[Row]:
    yield from _weight(f"{original}.norm1", f"{ours}.norm1")
    yield from _weight(f"{original}.norm2", f"{ours}.norm2")
    yield from _layer(f"{original}.attn.qkv", *_query_key_value(f"{ours}.self_attn"))
    yield from _layer(f"{original}.attn.proj", f"{ours}.self_attn.o_proj")
    yield from _layer(f"{original}.mlp.w12", f"{ours}.mlp.gate_proj", f"{ours}.mlp.up_proj")
    yield from _layer(f"{original}.mlp.w3", f"{ours}.mlp.down_proj")
    yield from _layer(f"{original}.adaLN_modulation.1", f"{ours}.modulation")


def _diffusers_dit_layer(theirs: str, ours: str) -> Iterator[Row]:
    yield from _weight(f"{theirs}.norm1", f"{ours}.norm1")
    yield from _weight(f"{theirs}.norm2", f"{ours}.norm2")
    for name in "qkv":
        yield from _layer(f"{theirs}.attn.to_{name}", f"{ours}.self_attn.{name}_proj")
    yield from _layer(f"{theirs}.attn.to_out.0", f"{ours}.self_attn.o_proj")
    # diffusers gates by the second half.
    yield from _layer(f"{theirs}.mlp.net.0.proj", f"{ours}.mlp.up_proj", f"{ours}.mlp.gate_proj")
    yield from _layer(f"{theirs}.mlp.net.2", f"{ours}.mlp.down_proj")
    yield from _layer(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation")


def _rotary_buffers(original: str, config: VFMTokDiTConfig, head_dim: int) -> Iterator[DroppedRow]:
    positions = 1 + torch.arange(config.sample_size**2)
    cosines, signed_sines = rotary_table(positions, config.sample_size, head_dim, config.rope_theta)
    sines = signed_sines[:, 1::2].repeat_interleave(2, dim=-1)
    for name, values in (("freqs_cos", cosines), ("freqs_sin", sines)):
        yield DroppedRow(f"{original}.{name}", tuple(values.shape), "the rotary embedding of the grid", values)


# ---------------------------------------------------------------------------------------------------------------
# Applying a table


def check_keys(keys: Sequence[str] | Mapping, table: KeyTable) -> None:
    """
    Check that keys and rows correspond one to one; only keys of dropped rows may be missing.

    Raises:
        CheckpointError: names the first unmapped or missing key and the number of others.
    """
    known = {row.original for row in table}
    if unmapped := [key for key in keys if key not in known]:
        raise CheckpointError(f"The checkpoint contains {listing(unmapped)}, which this model does not have.")
    if missing := [row.original for row in table if isinstance(row, Row) and row.original not in keys]:
        raise CheckpointError(f"The checkpoint lacks {listing(missing)}.")


def to_ours(
    state_dict: Mapping[str, torch.Tensor], table: KeyTable, shapes: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """
    The original's tensors under our names, each with its own storage.

    Args:
        shapes: the model's shape for each of our names.

    Raises:
        CheckpointError: a key is unmapped, missing or mis-shaped, or values are not finite floating-point numbers.
    """
    check_keys(state_dict, table)
    rows = [row for row in table if row.original in state_dict]
    _check_shapes(state_dict, rows, shapes)
    converted: dict[str, torch.Tensor] = {}
    for row in rows:
        if isinstance(row, DroppedRow):
            _check_computed_values(row, state_dict[row.original])
            continue
        tensor = state_dict[row.original]
        _check_values(row.original, tensor)
        # Clone, because tensors may share storage, which safetensors refuses, or be memory-mapped.
        parts = (part.clone(memory_format=torch.contiguous_format) for part in tensor.chunk(len(row.ours)))
        converted.update(zip(row.ours, parts, strict=True))
    return converted


def to_original(state_dict: Mapping[str, torch.Tensor], table: KeyTable) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`, in the original's order. Keys of `state_dict` without a row are an error."""
    ours = {name for row in table if isinstance(row, Row) for name in row.ours}
    if unmapped := [key for key in state_dict if key not in ours]:
        raise CheckpointError(f"The original has no name for {listing(unmapped)}.")
    if missing := [name for name in ours if name not in state_dict]:
        raise CheckpointError(f"The model lacks {listing(sorted(missing))}.")
    reference = next(iter(state_dict.values()))
    original = {}
    for row in table:
        if isinstance(row, DroppedRow):
            values = torch.zeros(row.shape) if row.values is None else row.values.clone()
            original[row.original] = values.to(reference.device)
        else:
            # Also copies a single tensor, so the result never shares memory with the model.
            original[row.original] = torch.cat([state_dict[name].detach() for name in row.ours])
    return original


def _check_shapes(state_dict: Mapping[str, torch.Tensor], rows: KeyTable, shapes: Mapping[str, Sequence[int]]) -> None:
    wrong = [
        f"{row.original} {tuple(state_dict[row.original].shape)} instead of {expected}"
        for row in rows
        if tuple(state_dict[row.original].shape) != (expected := _original_shape(row, shapes))
    ]
    if wrong:
        raise CheckpointError(f"The checkpoint does not match the size of its configuration: {listing(wrong)}.")


def _original_shape(row: Row | DroppedRow, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    if isinstance(row, DroppedRow):
        return row.shape
    first, *rest = shapes[row.ours[0]]
    return (first * len(row.ours), *rest)


def _check_computed_values(row: DroppedRow, tensor: torch.Tensor) -> None:
    if row.values is not None and not tensor.is_meta and (tensor.float() - row.values).abs().max() > 1e-5:
        raise CheckpointError(f"{row.original!r} is not what this model computes in its place: {row.reason}.")


def _check_values(key: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{key!r} has dtype {tensor.dtype}, but weights must be floating-point.")
    if not tensor.is_meta and not tensor.isfinite().all():
        raise CheckpointError(f"{key!r} contains NaN or infinity: the checkpoint is damaged, use another one.")
