import pytest
import torch

from tests.conversion.originals import (
    AR,
    AR_CONFIG,
    DINOV2,
    LIGHT_CONFIG,
    RAR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    full_size,
    tiny,
)
from vfmtok_hf import VFMAEConfig, VFMTokARConfig, VFMTokConfig, VFMTokDiTConfig, VFMTokRARConfig
from vfmtok_hf.conversion import CheckpointError
from vfmtok_hf.conversion.build_models import build_ar, build_dit, build_rar, build_tokenizer, build_vfmae


def test_released_tokenizer_is_the_default_configuration():
    config = build_tokenizer(
        full_size("tokenizer_vq16_checkpoint"), {}, full_size("dinov2_vitl14_reg4_original")
    ).model.config
    expected, found = VFMTokConfig(feature_grid_size=24).to_dict(), config.to_dict()  # as the vision model gives it
    assert {name: found[name] for name in expected if found[name] != expected[name]} == {}


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "2B", "3B"])
def test_released_ar_sizes_are_the_named_variants(size):
    found = build_ar(full_size(f"gpt_{size.lower()}"), {}).model.config
    expected = VFMTokARConfig.from_variant(size)
    assert not [
        name for name in expected.to_dict() if "label" not in name and getattr(found, name) != getattr(expected, name)
    ]


@pytest.mark.parametrize("size", ["L", "XL", "XXL"])
def test_released_rar_sizes_are_the_named_variants(size):
    found = build_rar(full_size(f"rar_{size.lower()}"), {}).model.config
    expected = VFMTokRARConfig.from_variant(size)
    assert not [
        name for name in expected.to_dict() if "label" not in name and getattr(found, name) != getattr(expected, name)
    ]


def test_released_vfmae_is_the_default_configuration():
    config = build_vfmae(full_size("vfmae_checkpoint"), {}, full_size("dinov2_vitl14_reg4_original")).model.config
    expected, found = VFMAEConfig().to_dict(), config.to_dict()
    assert {name: found[name] for name in expected if found[name] != expected[name]} == {}


def test_released_diffusion_transformer_is_the_default_configuration():
    expected, found = VFMTokDiTConfig().to_dict(), build_dit(full_size("ditdh_xl"), {}).model.config.to_dict()
    assert {name for name in expected if found[name] != expected[name]} <= {"id2label", "label2id"}
    assert found["id2label"][207] == "golden retriever"


def test_thousand_classes_are_named_as_imagenet():
    names = build_ar(full_size("gpt_b"), {}).model.config.id2label
    assert len(names) == 1000
    assert (names[0], names[207]) == ("tench, Tinca tinca", "golden retriever")
    assert build_ar(tiny(AR), AR_CONFIG).model.config.id2label is None


def test_class_names_can_be_given_as_json_gives_them():
    names = {str(label): f"class {label}" for label in range(10)}
    assert build_ar(tiny(AR), {**AR_CONFIG, "id2label": names}).model.config.id2label[9] == "class 9"


def test_tiny_tokenizer_is_inferred_from_its_shapes():
    config = build_tokenizer(tiny(TOKENIZER), TOKENIZER_CONFIG, tiny(DINOV2)).model.config
    assert (config.num_anchors, config.hidden_size, config.codebook_size, config.codebook_dim) == (16, 64, 512, 12)
    assert (config.encoder_num_layers, config.encoder_num_heads, config.encoder_num_points) == (2, 8, 4)
    assert (config.encoder_intermediate_size, config.decoder_intermediate_size) == (256, 88)
    assert (config.decoder_num_layers, config.num_register_tokens, config.feature_grid_size) == (2, 4, 24)
    assert config.pixel_decoder_base_channels == 32
    assert config.pixel_decoder_channel_multipliers == [1, 1, 2, 2, 4]
    assert config.pixel_decoder_num_res_blocks == 1
    vision = config.vision_config
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("dinov2_with_registers", 32, 24)
    assert (vision.mlp_ratio, vision.patch_size, vision.image_size, vision.num_register_tokens) == (4, 14, 518, 4)


def test_tiny_rar_is_inferred_from_its_shapes():
    config = build_rar(tiny(RAR), {}).model.config
    assert (config.codebook_size, config.num_classes, config.num_image_tokens) == (256, 10, 16)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 3)


def test_rar_tables_without_the_originals_surplus_need_the_number_of_tokens():
    state_dict = tiny(RAR)
    state_dict["timesteps_embeddings"] = state_dict["timesteps_embeddings"][:, :18]
    with pytest.raises(ValueError, match="set num_image_tokens in config"):
        build_rar(state_dict, {})
    assert build_rar(state_dict, {"num_image_tokens": 16}).model.config.num_timestep_embeddings == 18


# -- what shapes cannot tell must be told


def test_unknown_sizes_ask_for_their_heads():
    with pytest.raises(ValueError, match="3 layers of width 64 are not a released size: set num_attention_heads"):
        build_ar(tiny(AR), {})
    with pytest.raises(ValueError, match="No released model has width 64: set decoder_num_heads"):
        build_tokenizer(tiny(TOKENIZER), {"vision_config": {"num_attention_heads": 2}}, tiny(DINOV2))
    with pytest.raises(ValueError, match="No released DINOv2 has width 32: set num_attention_heads"):
        build_tokenizer(tiny(TOKENIZER), {"decoder_num_heads": 4}, tiny(DINOV2))


def test_unknown_vision_models_must_be_described():
    with pytest.raises(ValueError, match=r"\[32, 32, 32, 32\] wide, which does not match the released vision model"):
        build_tokenizer(tiny(TOKENIZER), {"decoder_num_heads": 4})
    config = build_tokenizer(tiny(TOKENIZER), LIGHT_CONFIG).model.config
    assert config.vision_config.model_type == "dinov2_with_registers"
    assert config.vision_model_name_or_path is None


def test_levels_of_a_shallower_vision_model_must_be_told():
    state_dict = {key: tensor for key, tensor in tiny(DINOV2).items() if "blocks" not in key or "blocks.1." in key}
    state_dict = {key.replace("blocks.1.", "blocks.0."): tensor for key, tensor in state_dict.items()}
    with pytest.raises(ValueError, match=r"vision_feature_layers \[6, 12, 18, 24\] must be in 1..1"):
        build_tokenizer(tiny(TOKENIZER), TOKENIZER_CONFIG, state_dict)


def test_vision_model_of_another_width_is_refused():
    config = {**LIGHT_CONFIG, "vision_config": {**LIGHT_CONFIG["vision_config"], "hidden_size": 48}}
    with pytest.raises(CheckpointError, match=r"projectors.0.mlp.0.weight \(64, 32\) instead of \(64, 48\)"):
        build_tokenizer(tiny(TOKENIZER), config)


def test_dinov2_without_registers_is_refused():
    state_dict = tiny(DINOV2)
    del state_dict["register_tokens"]
    with pytest.raises(CheckpointError, match="no register tokens"):
        build_tokenizer(tiny(TOKENIZER), TOKENIZER_CONFIG, state_dict)


# -- overrides are checked


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        ({"num_heads": 4}, "config contains 'num_heads', which VFMTokARConfig does not have"),
        ({"hidden_size": 128}, "config has hidden_size = 128, but the checkpoint has 64"),
        ({"num_image_tokens": 17}, "num_image_tokens must be a square number"),
        ({"num_image_tokens": "many"}, "'num_image_tokens' expected int"),
        ({"num_attention_heads": 5}, "must be divisible by num_attention_heads"),
    ],
)
def test_wrong_overrides_are_named(overrides, cause):
    with pytest.raises(ValueError, match=cause) as error:
        build_ar(tiny(AR), {**AR_CONFIG, **overrides})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", [0, "8", 7])
def test_impossible_encoder_heads_are_named(heads):
    with pytest.raises(ValueError, match="encoder_num_heads"):
        build_tokenizer(tiny(TOKENIZER), {**TOKENIZER_CONFIG, "encoder_num_heads": heads}, tiny(DINOV2))


def test_light_and_full_are_not_confused():
    with pytest.raises(ValueError, match="pass vision_checkpoint or vision_model"):
        build_tokenizer(tiny(TOKENIZER), {**LIGHT_CONFIG, "save_vision_model": True})
    with pytest.raises(ValueError, match="leave one of them out"):
        build_tokenizer(tiny(TOKENIZER), {**TOKENIZER_CONFIG, "save_vision_model": False}, tiny(DINOV2))


def test_embedded_vision_model_excludes_another():
    state_dict = tiny(TOKENIZER)
    state_dict["encode_transformer.backbone.pretrained_encoder.cls_token"] = torch.zeros(1, 1, 32)
    with pytest.raises(ValueError, match="contains its vision model"):
        build_tokenizer(state_dict, TOKENIZER_CONFIG, tiny(DINOV2))
