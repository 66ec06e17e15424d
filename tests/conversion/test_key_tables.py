import json

import pytest
import torch

from tests.conversion.originals import (
    AR,
    AR_CONFIG,
    DINOV2,
    DIT,
    GENERATORS,
    LATENT_STATISTICS,
    RAR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VFMAE,
    VFMAE_DINOV2,
    assert_equal,
    full_size,
    signature,
    tiny,
)
from tests.modeling.generators import tiny_dit
from tests.testing import REFERENCE, tiny_model, tiny_vfmae
from vfmtok_hf.conversion import (
    CheckpointError,
    export_diffusers_dit,
    export_latent_statistics,
    export_original_ar,
    export_original_dinov2,
    export_original_dit,
    export_original_rar,
    export_original_tokenizer,
    export_original_vfmae,
)
from vfmtok_hf.conversion.build_models import build_ar, build_dit, build_rar, build_tokenizer, build_vfmae
from vfmtok_hf.conversion.key_tables import (
    Row,
    ar_table,
    dinov2_table,
    dit_table,
    rar_table,
    to_original,
    to_ours,
    tokenizer_table,
    vfmae_table,
)
from vfmtok_hf.conversion.read_checkpoint import read_latent_statistics


# -- every full-size original, there and back


def build(name, state_dict, config=None):
    return (build_rar if name.startswith("rar") else build_ar)(state_dict, config or {})


def export(name, model):
    return (export_original_rar if name.startswith("rar") else export_original_ar)(model)


@pytest.mark.parametrize("name", GENERATORS)
def test_full_size_generators_convert_and_convert_back(name):
    original = full_size(name)
    model = build(name, original).model
    assert signature(export(name, model)) == signature(original)
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())
    size = name.replace("gpt", "GPT").replace("_", "-").upper()
    assert sum(parameter.numel() for parameter in model.parameters()) == counts[size]["total"]
    assert model.config.num_attention_heads == counts[size].get("n_head", counts[size].get("num_attention_heads"))


def test_rar_xl_of_the_other_mlp_width_converts_and_converts_back():
    original = full_size("rar_xl")
    for key, tensor in original.items():
        if ".mlp.fc" in key:
            original[key] = tensor.new_empty([5120 if side == 4096 else side for side in tensor.shape])
    model = build_rar(original, {}).model
    assert model.config.intermediate_size == 5120
    assert signature(export_original_rar(model)) == signature(original)


def test_full_size_tokenizer_converts_and_converts_back_as_light_checkpoint():
    original = full_size("tokenizer_vq16_checkpoint")
    conversion = build_tokenizer(original, {})
    config = conversion.model.config
    assert not config.save_vision_model
    assert config.vision_model_name_or_path == "facebook/dinov2-with-registers-large"
    assert list(conversion.dropped) == ["slot_quantize.codebook_used"]
    assert signature(export_original_tokenizer(conversion.model)) == signature(original)


def test_full_size_tokenizer_and_dinov2_convert_and_convert_back():
    original, dinov2 = full_size("tokenizer_vq16_checkpoint"), full_size("dinov2_vitl14_reg4_original")
    model = build_tokenizer(original, {}, dinov2).model
    assert model.config.save_vision_model
    assert model.config.vision_config.num_attention_heads == 16
    assert signature(export_original_tokenizer(model)) == signature(original)
    assert signature(export_original_dinov2(model)) == signature(dinov2)


def test_full_size_tokenizer_with_its_vision_model_inside_converts_and_converts_back():
    original = full_size("tokenizer_vq16_full")
    model = build_tokenizer(original, {}).model
    exported = export_original_tokenizer(model, include_vision_model=True)
    assert sorted(signature(exported)) == sorted(signature(original))


def test_full_size_vfmae_converts_and_converts_back():
    original, dinov2 = full_size("vfmae_checkpoint"), full_size("dinov2_vitl14_reg4_original")
    light = build_vfmae(original, {}).model
    assert light.config.vision_model_name_or_path == "facebook/dinov2-with-registers-large"
    assert signature(export_original_vfmae(light)) == signature(original)
    model = build_vfmae(original, {}, dinov2).model
    assert signature(export_original_vfmae(model)) == signature(original)
    assert signature(export_original_dinov2(model)) == signature(dinov2)
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == counts["VFMAE"]["total"]


def test_full_size_vfmae_with_its_vision_model_inside_converts_and_converts_back():
    original = full_size("vfmae_full")
    exported = export_original_vfmae(build_vfmae(original, {}).model, include_vision_model=True)
    assert sorted(signature(exported)) == sorted(signature(original))


@pytest.mark.parametrize("size", ["XL", "S"])
def test_full_size_diffusion_transformers_convert_and_convert_back(size):
    original = full_size(f"ditdh_{size.lower()}")
    model = build_dit(original, {}).model
    assert signature(export_original_dit(model)) == signature(original)
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())[f"DiTDH-{size}"]
    assert sum(parameter.numel() for parameter in model.parameters()) == counts["without_fixed_pos_embed_and_W"]
    assert sum(tensor.numel() for tensor in export_original_dit(model).values()) == counts["state_dict_elements"]
    heads = [model.config.num_attention_heads, model.config.head_num_attention_heads]
    assert heads == counts["num_heads"]


# -- values


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_tokenizer_values_survive_there_and_back(weights):
    original, dinov2 = tiny(TOKENIZER, weights), tiny(DINOV2)
    model = build_tokenizer(original, TOKENIZER_CONFIG, dinov2).model
    exported = export_original_tokenizer(model)
    # The history of used codes is the one thing dropped: it is all zeros in moving averages, and after conversion.
    assert not exported.pop("slot_quantize.codebook_used").any()
    original.pop("slot_quantize.codebook_used")
    assert_equal(exported, original)
    assert_equal(export_original_dinov2(model), dinov2)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_ar_values_survive_there_and_back(weights):
    original = tiny(AR, weights)
    assert_equal(export_original_ar(build_ar(original, AR_CONFIG).model), original)


def test_rar_values_survive_there_and_back():
    original = tiny(RAR)
    assert_equal(export_original_rar(build_rar(original, {}).model), original)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_vfmae_values_survive_there_and_back(weights):
    original, dinov2 = tiny(VFMAE, weights), tiny(VFMAE_DINOV2)
    statistics = read_latent_statistics(LATENT_STATISTICS)
    conversion = build_vfmae(original, TOKENIZER_CONFIG, dinov2, statistics=statistics)
    assert not conversion.dropped
    assert_equal(export_original_vfmae(conversion.model), original)
    assert_equal(export_original_dinov2(conversion.model), dinov2)
    exported = export_latent_statistics(conversion.model)
    assert_equal(exported, {"mean": statistics.mean, "std": statistics.std})


def test_statistics_are_zero_and_one_until_they_are_known():
    model = build_vfmae(tiny(VFMAE), TOKENIZER_CONFIG, tiny(VFMAE_DINOV2)).model
    assert not model.latents_mean.any()
    assert (model.latents_std == 1).all()


def test_statistics_of_another_model_are_refused():
    statistics = read_latent_statistics(LATENT_STATISTICS)
    other = type(statistics)(statistics.mean[:, :9], statistics.std[:, :9])
    with pytest.raises(CheckpointError, match=r"shape \(8, 9\), the checkpoint's latents \(8, 16\)"):
        build_vfmae(tiny(VFMAE), TOKENIZER_CONFIG, tiny(VFMAE_DINOV2), statistics=other)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_diffusion_transformer_values_survive_there_and_back(weights):
    original = tiny(DIT, weights)
    exported = export_original_dit(build_dit(original, {}).model)
    # The rotary tables are not kept but computed.
    for key in [key for key in original if "rope" in key]:
        torch.testing.assert_close(exported.pop(key), original.pop(key), atol=1e-6, rtol=0)
    assert_equal(exported, original)


def test_rotary_tables_of_another_embedding_are_refused():
    original = tiny(DIT)
    original["dec_feat_rope.freqs_sin"] = original["dec_feat_rope.freqs_sin"].flip(0)
    with pytest.raises(CheckpointError, match="'dec_feat_rope.freqs_sin' is not what this model computes"):
        build_dit(original, {})


def test_equally_wide_parts_need_the_number_of_layers():
    original = export_original_dit(tiny_dit(hidden_size=24))
    with pytest.raises(ValueError, match="equally wide: set num_hidden_layers"):
        build_dit(original, {})
    config = build_dit(original, {"num_hidden_layers": 2}).model.config
    assert (config.num_hidden_layers, config.head_num_hidden_layers) == (2, 1)
    with pytest.raises(ValueError, match="num_hidden_layers = 3, but the checkpoint has 3 layers"):
        build_dit(original, {"num_hidden_layers": 3})


def test_diffusion_transformers_have_names_in_diffusers_too():
    original = full_size("ditdh_xl")
    model = build_dit(original, {}).model
    theirs = export_diffusers_dit(model)
    assert len(theirs) == 502
    assert {key for key in theirs if ".attn" not in key and ".mlp" not in key} == {
        key for key in original if ".attn" not in key and ".mlp" not in key
    }
    tiny_model = build_dit(tiny(DIT), {}).model
    original, theirs = tiny(DIT), export_diffusers_dit(tiny_model)
    stacked = torch.cat([theirs[f"blocks.0.attn.to_{name}.weight"] for name in "qkv"])
    assert torch.equal(stacked, original["blocks.0.attn.qkv.weight"])
    gate, up = original["blocks.0.mlp.w12.weight"].chunk(2)
    assert torch.equal(theirs["blocks.0.mlp.net.0.proj.weight"], torch.cat([up, gate]))
    table = dit_table(tiny_model.config, diffusers_names=True)
    shapes = {name: tensor.shape for name, tensor in tiny_model.state_dict().items()}
    assert_equal(to_ours(theirs, table, shapes), tiny_model.state_dict())


def test_stacked_projections_are_split_in_the_original_order():
    original = tiny(AR)
    layer = build_ar(original, AR_CONFIG).model.layers[0]
    stacked = [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
    assert torch.equal(torch.cat(stacked), original["layers.0.attention.wqkv.weight"])
    assert torch.equal(layer.mlp.gate_proj.weight, original["layers.0.feed_forward.w1.weight"])
    assert torch.equal(layer.mlp.up_proj.weight, original["layers.0.feed_forward.w3.weight"])


def test_converted_tensors_share_no_storage():
    original = tiny(TOKENIZER)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in original.values()}
    assert len(pointers) < len(original), "the file no longer tests shared storage"
    converted = build_tokenizer(original, TOKENIZER_CONFIG, tiny(DINOV2)).model.state_dict()
    storages = [tensor.untyped_storage() for tensor in converted.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert not pointers & {storage.data_ptr() for storage in storages}
    assert all(storage.nbytes() == tensor.nbytes for storage, tensor in zip(storages, converted.values(), strict=True))


def test_exported_tensors_do_not_alias_the_model():
    model = build_rar(tiny(RAR), {}).model
    export_original_rar(model)["cls_token"].zero_()
    assert model.cls_token.any()


# -- totality


TABLES = [
    tokenizer_table(
        num_levels=4,
        encoder_num_layers=2,
        decoder_num_layers=2,
        pixel_decoder_channels=[8, 4, 4],
        pixel_decoder_num_res_blocks=1,
    ),
    dinov2_table(2),
    ar_table(2),
    rar_table(2),
    vfmae_table(
        num_levels=4,
        encoder_num_layers=2,
        decoder_num_layers=2,
        feature_decoder_num_layers=1,
        pixel_decoder_channels=[8, 4, 4],
        pixel_decoder_num_res_blocks=2,
    ),
    dit_table(tiny_dit().config),
    dit_table(tiny_dit().config, diffusers_names=True),
]


@pytest.mark.parametrize("table", TABLES, ids=["tokenizer", "dinov2", "ar", "rar", "vfmae", "dit", "diffusers dit"])
def test_tables_map_one_to_one(table):
    originals = [row.original for row in table]
    ours = [name for row in table if isinstance(row, Row) for name in row.ours]
    assert len(set(originals)) == len(originals)
    assert len(set(ours)) == len(ours)


STATE_DICTS = {
    "tokenizer": (TOKENIZER, lambda state_dict: build_tokenizer(state_dict, TOKENIZER_CONFIG, tiny(DINOV2))),
    "dinov2": (DINOV2, lambda state_dict: build_tokenizer(tiny(TOKENIZER), TOKENIZER_CONFIG, state_dict)),
    "ar": (AR, lambda state_dict: build_ar(state_dict, AR_CONFIG)),
    "rar": (RAR, lambda state_dict: build_rar(state_dict, {})),
    "vfmae": (VFMAE, lambda state_dict: build_vfmae(state_dict, TOKENIZER_CONFIG, tiny(VFMAE_DINOV2))),
    "dit": (DIT, lambda state_dict: build_dit(state_dict, {})),
}


@pytest.fixture(params=STATE_DICTS)
def original(request):
    path, build = STATE_DICTS[request.param]
    return tiny(path), build


def test_unmapped_keys_are_named(original):
    state_dict, build = original
    state_dict |= {"extra.weight": torch.zeros(1), "more": torch.zeros(1), "blocks.0.odd": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"^The checkpoint contains 'extra.weight' \(and 2 more\)"):
        build(state_dict)


@pytest.mark.parametrize("position", [0, 1, 20, -1])
def test_missing_keys_are_named(original, position):
    state_dict, build = original
    key = list(state_dict)[position]
    del state_dict[key]
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        build(state_dict)


def test_missing_keys_are_counted(original):
    state_dict, build = original
    gone = [key for key in state_dict if key.endswith(("norm1.weight", "ffn_norm.weight"))]
    state_dict = {key: tensor for key, tensor in state_dict.items() if key not in gone}
    with pytest.raises(CheckpointError, match=rf"lacks '{gone[0]}' \(and {len(gone) - 1} more\)"):
        build(state_dict)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("tokenizer", "decoder.mid.1.q.weight"),
        ("tokenizer", "encode_transformer.transformer.layers.1.linear1.bias"),
        ("tokenizer", "decode_transformer.transformer.layers.1.ffnet.w12.weight"),
        ("tokenizer", "decode_transformer.proj.weight"),
        ("tokenizer", "slot_quantize.codebook_used"),
        ("dinov2", "blocks.3.attn.qkv.weight"),
        ("ar", "layers.2.attention.wqkv.weight"),
        ("ar", "output.weight"),
        ("rar", "blocks.1.attn.qkv.bias"),
        ("rar", "adaln_before_head.adaLN_modulation.1.weight"),
        ("vfmae", "slots_quant.norm_out.weight"),
        ("vfmae", "decode_transformer.dino_transformer.layers.0.norm1.weight"),
        ("dit", "blocks.1.attn.qkv.weight"),
        ("dit", "blocks.4.adaLN_modulation.1.bias"),
    ],
)
def test_misshaped_keys_are_named_with_both_shapes(kind, key):
    path, build = STATE_DICTS[kind]
    state_dict = tiny(path)
    right = tuple(state_dict[key].shape)
    state_dict[key] = torch.cat([state_dict[key], state_dict[key][:1]])
    wrong = tuple(state_dict[key].shape)
    with pytest.raises(CheckpointError) as error:
        build(state_dict)
    assert f"{key} {wrong} instead of {right}" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(original, value):
    state_dict, build = original
    key = list(state_dict)[-1]
    state_dict[key] = state_dict[key].clone()
    state_dict[key].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"'{key}' contains NaN or infinity"):
        build(state_dict)


def test_integers_are_no_weights(original):
    state_dict, build = original
    key = list(state_dict)[-1]
    state_dict[key] = state_dict[key].long()
    with pytest.raises(CheckpointError, match=f"'{key}' has dtype torch.int64"):
        build(state_dict)


def test_usage_history_may_be_absent():
    state_dict = tiny(TOKENIZER)
    del state_dict["slot_quantize.codebook_used"]
    assert not build_tokenizer(state_dict, TOKENIZER_CONFIG, tiny(DINOV2)).dropped


def test_exporting_is_total_too():
    table, ours = ar_table(1), build_ar(tiny(AR), AR_CONFIG).model.state_dict()
    with pytest.raises(CheckpointError, match=r"no name for 'layers.1.*' \(and 17 more\)"):
        to_original(ours, table)
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight'"):
        to_original({name: ours[name] for row in table for name in row.ours if name != "lm_head.weight"}, table)


def test_to_ours_and_to_original_are_inverse():
    table = ar_table(3)
    ours = build_ar(tiny(AR), AR_CONFIG).model.state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert_equal(to_ours(to_original(ours, table), table, shapes), ours)


def test_only_dinov2_has_original_vision_names():
    light = tiny_model(save_vision_model=False)
    with pytest.raises(ValueError, match="no vision weights"):
        export_original_dinov2(light)
    other = tiny_model()
    other.config.vision_config.model_type = "dinov2"
    with pytest.raises(ValueError, match="not 'dinov2'"):
        export_original_dinov2(other)


def test_models_born_here_have_original_names_too():
    model = tiny_model()
    exported = export_original_tokenizer(model, include_vision_model=True)
    overrides = {
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
        "image_size": 32,
        "vision_image_size": 32,
        "vision_feature_layers": [1, 2, 3],
        "pixel_decoder_num_groups": 4,
        "vision_config": {"num_attention_heads": 2},
    }
    assert_equal(build_tokenizer(exported, overrides).model.state_dict(), model.state_dict())


def test_autoencoders_born_here_have_original_names_too():
    model = tiny_vfmae()
    exported = export_original_vfmae(model, include_vision_model=True)
    overrides = {
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
        "vision_feature_layers": [1, 2, 3],
        "bottleneck_num_groups": 8,
        "pixel_decoder_num_groups": 4,
        "vision_config": {"num_attention_heads": 2},
    }
    assert_equal(build_vfmae(exported, overrides).model.state_dict(), model.state_dict())
