import copy

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from tests.testing import TINY_VISION_CONFIG, tiny_images, tiny_vfmae, tiny_vfmae_config
from vfmtok_hf import VFMAEConfig, VFMAEModel, VFMTokImageProcessor
from vfmtok_hf.cpu.packing import pack_weights, unpack_weights


def test_defaults_are_the_released_autoencoder():
    config = VFMAEConfig()
    with torch.device("meta"):
        model = VFMAEModel(config)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == 77_464_083
    assert sum(parameter.numel() for parameter in model.vision_model.parameters()) == 304_372_736
    assert config.latent_shape == (32, 16, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_anchors": 10}, "square number"),
        ({"vision_image_size": 36}, "vision_image_size must be 32, got 36"),
        ({"bottleneck_num_groups": 5}, "divisible by bottleneck_num_groups"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "class token.*'siglip_vision_model' gives none"),
        ({"codebook_size": 64}, "no field 'codebook_size'"),
    ],
)
def test_config_refuses_contradictions(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_vfmae_config(**overrides)


def test_auto_classes_and_saved_folders(tmp_path):
    model = tiny_vfmae()
    model.latents_mean.normal_()
    model.latents_std.uniform_(0.5, 2)
    model.save_pretrained(tmp_path)
    VFMTokImageProcessor(size=32).save_pretrained(tmp_path)
    assert VFMAEConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is VFMAEConfig
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is VFMAEModel
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VFMTokImageProcessor
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    half = VFMAEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.latents_mean.dtype == half.latents_std.dtype == torch.float32


@pytest.mark.parametrize("size", [32, 20, 80])
def test_encode_and_decode_shapes(size):
    model = tiny_vfmae()
    encoded = model.encode(tiny_images(size=size), output_sampling_locations=True, output_vision_features=True)
    assert encoded.latents.shape == (2, 4, 3, 3)
    assert [tuple(locations.shape) for locations in encoded.sampling_locations] == [(2, 9, 2, 3, 2, 2)] * 2
    assert [tuple(weights.shape) for weights in encoded.attention_weights] == [(2, 9, 2, 3, 2)] * 2
    assert [tuple(tokens.shape) for tokens in encoded.vision_features] == [(2, 65, 16)] * 3
    decoded = model.decode(encoded.latents, output_features=True)
    assert decoded.reconstruction.shape == (2, 3, 32, 32)
    assert decoded.reconstructed_features.shape == (2, 65, 16)
    plain = model.encode(tiny_images(size=size))
    assert plain.sampling_locations is None
    assert model.decode(plain.latents).reconstructed_features is None


@torch.no_grad()
def test_forward_is_encode_and_decode():
    model, images = tiny_vfmae(), tiny_images()
    out = model(images)
    assert torch.equal(out.latents, model.encode(images).latents)
    assert torch.equal(out.reconstruction, model.decode(out.latents).reconstruction)
    assert out.loss is None
    assert repr(out) == "VFMAEOutput(latents=float32[2, 4, 3, 3], reconstruction=float32[2, 3, 32, 32])"


@torch.no_grad()
def test_attention_goes_in_both_directions():
    """Changing the last anchor's query changes the states of all anchors."""
    model = tiny_vfmae()
    features = model._feature_maps(model.extract_vision_features(tiny_images()))
    before, _, _ = model.anchor_encoder(features)
    model.anchor_encoder.anchor_queries[:, -1] += torch.randn(32)
    after, _, _ = model.anchor_encoder(features)
    assert not torch.isclose(before, after).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("vision_type", ["clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_class_tokens_are_added_to_the_patches(vision_type):
    vision_config = {**TINY_VISION_CONFIG, "model_type": vision_type, "patch_size": 4}
    if vision_type in ("clip_vision_model", "dinov3_vit"):
        vision_config |= {"intermediate_size": 32}
    if vision_type != "dinov2_with_registers":
        del vision_config["num_register_tokens"]
    model = tiny_vfmae(vision_config=vision_config)
    features = model.extract_vision_features(tiny_images())
    last = model.vision_model(
        model._vision_input(tiny_images()), **({"interpolate_pos_encoding": True} if "clip" in vision_type else {})
    )
    assert [tuple(tokens.shape) for tokens in features] == [(2, 65, 16)] * 3
    for level, tokens in zip(model._feature_maps(features), features, strict=True):
        torch.testing.assert_close(level[:, :, 1, 2], tokens[:, 1 + 8 + 2] + tokens[:, 0])
    assert last.last_hidden_state.shape[1] >= 65


def test_loss_is_the_weighted_feature_loss():
    model, images = tiny_vfmae(), tiny_images()
    before = model(images, return_loss=True)
    assert torch.equal(before.loss, before.feature_loss)
    model.config.feature_loss_weight = 3.0
    torch.testing.assert_close(model(images, return_loss=True).loss, 3 * before.loss)


def test_every_trainable_parameter_gets_a_gradient():
    model = tiny_vfmae().train()
    out = model(tiny_images(), return_loss=True)
    (out.loss + out.reconstruction.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_gradient_checkpointing_changes_nothing():
    model, images = tiny_vfmae(decoder_dropout=0.0).train(), tiny_images()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(images, return_loss=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_normalized_latents():
    model = tiny_vfmae()
    latents = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model.normalize_latents(latents), latents / (1 + 1e-5))
    model.latents_mean.fill_(3)
    model.latents_std.fill_(0.5)
    normalized = model.normalize_latents(latents)
    torch.testing.assert_close(normalized, (latents - 3) / (0.5 + 1e-5))
    torch.testing.assert_close(model.denormalize_latents(normalized), latents)


@pytest.mark.parametrize("latents", [torch.zeros(1, 4, 9), torch.zeros(1, 3, 3, 3), torch.zeros(1, 4, 3, 3).long()])
def test_what_decode_refuses(latents):
    with pytest.raises(ValueError, match=r"latents must be floating point of shape \(batch_size, 4, 3, 3\)"):
        tiny_vfmae().decode(latents)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_compute_the_same(dtype):
    model, images = tiny_vfmae().to(dtype), tiny_images()
    packed = pack_weights(copy.deepcopy(model))
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    latents = model.encode(images).latents
    torch.testing.assert_close(packed.encode(images).latents, latents, atol=bound, rtol=bound)
    expected = model.decode(latents, output_features=True)
    actual = packed.decode(latents, output_features=True)
    for name in ("reconstruction", "reconstructed_features"):
        torch.testing.assert_close(actual[name], expected[name], atol=bound, rtol=bound)
    assert torch.equal(unpack_weights(packed).encode(images).latents, latents)


@torch.no_grad()
def test_eager_and_sdpa_attention_agree():
    model, images = tiny_vfmae(), tiny_images()
    out = model(images)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(images).reconstruction, out.reconstruction, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_light_checkpoint_decodes(tmp_path):
    model, images = tiny_vfmae(), tiny_images()
    model.vision_model.save_pretrained(tmp_path / "vision")
    model.config.save_vision_model = False
    model.save_pretrained(tmp_path / "light")
    light = VFMAEModel.from_pretrained(tmp_path / "light")
    latents = model.encode(images).latents
    assert torch.equal(light.decode(latents).reconstruction, model.decode(latents).reconstruction)
    with pytest.raises(ValueError, match="no vision weights"):
        light.encode(images)
    light.load_vision_model(str(tmp_path / "vision"))
    torch.testing.assert_close(light.encode(images).latents, latents)
