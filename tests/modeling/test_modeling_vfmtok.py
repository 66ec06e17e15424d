import copy
import json

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig, AutoModel

from tests.testing import tiny_config, tiny_images, tiny_model
from vfmtok_hf import VFMTokARConfig, VFMTokConfig, VFMTokModel, VFMTokRARConfig
from vfmtok_hf.modeling.modeling_vfmtok import MultiScaleDeformableAttention
from vfmtok_hf.modeling.pixel_decoder_vfmtok import VFMTokPixelUpsample


def assert_frozen(model):
    assert not any(parameter.requires_grad for parameter in model.vision_model.parameters())
    assert not any(module.training for module in model.vision_model.modules())


# -- configuration


def test_defaults_are_the_released_tokenizer():
    config = VFMTokConfig()
    with torch.device("meta"):
        model = VFMTokModel(config)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # 73,286,831 in the original (spec 1.1), of which 4 x 512 register tokens are a buffer here.
    assert trainable == 73_286_831 - 4 * 512
    assert sum(parameter.numel() for parameter in model.vision_model.parameters()) == 304_372_736
    assert (config.anchor_grid_size, config.image_grid_size) == (16, 21)


def test_config_survives_json(tmp_path):
    config = tiny_config(vision_image_mean=[0.1, 0.2, 0.3])
    config.save_pretrained(tmp_path)
    assert VFMTokConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VFMTokConfig)


def test_old_configurations_mean_the_same(tmp_path):
    config = tiny_config(commitment_cost=0.5, entropy_loss_ratio=0.1)
    assert (config.commitment_loss_weight, config.entropy_loss_weight) == (0.5, 0.1)
    assert (config.commitment_cost, config.entropy_loss_ratio) == (0.5, 0.1)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["commitment_loss_weight"], saved["entropy_loss_weight"]) == (0.5, 0.1)
    assert not saved.keys() & {"commitment_cost", "entropy_loss_ratio"}
    for new, old in (("commitment_loss_weight", "commitment_cost"), ("entropy_loss_weight", "entropy_loss_ratio")):
        saved[old] = saved.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert VFMTokConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("config_class", [VFMTokConfig, VFMTokARConfig, VFMTokRARConfig])
def test_unknown_fields_are_refused(config_class, tmp_path):
    with pytest.raises(ValueError, match=f"{config_class.__name__} has no field 'hiden_size'.*mean hidden_size"):
        config_class(hiden_size=32)
    config_class().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "codebook_sise": 3}))
    with pytest.raises(ValueError, match="no field 'codebook_sise'.*mean codebook_size"):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"feature_loss_weight": -1}, "feature_loss_weight must be 0"),
        ({"num_anchors": 10}, "square number"),
        ({"hidden_size": 33}, "divisible by encoder_num_heads"),
        ({"image_size": 30}, "divisible by 4"),
        ({"pixel_decoder_base_channels": 6}, "pixel_decoder_num_groups"),
        ({"vision_feature_layers": [2, 1]}, "ascending"),
        ({"vision_feature_layers": [1, 4]}, "must be in 1..3"),
        ({"vision_config": {"model_type": "bert"}}, "not supported"),
    ],
)
def test_config_refuses_contradictions(overrides, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**overrides)


# -- encode, decode


def test_encode_and_decode_shapes():
    model, images = tiny_model(), tiny_images()
    encoded = model.encode(images, output_sampling_locations=True)
    assert encoded.image_tokens.shape == (2, 9)
    assert encoded.image_tokens.dtype == torch.int64
    assert encoded.latents.shape == encoded.quantized_latents.shape == (2, 9, 4)
    assert [tuple(locations.shape) for locations in encoded.sampling_locations] == [(2, 9, 2, 3, 2, 2)] * 2
    for weights in encoded.attention_weights:
        assert weights.shape == (2, 9, 2, 3, 2)
        torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 9, 2))
    decoded = model.decode(image_tokens=encoded.image_tokens, output_features=True)
    assert decoded.reconstruction.shape == (2, 3, 32, 32)
    assert decoded.reconstructed_features.shape == (2, 16, 16)
    assert decoded.image_embeds.shape == (2, 32)
    assert model.encode(images).sampling_locations is None


def test_outputs_print_shapes_instead_of_values():
    model = tiny_model()
    encoded = model.encode(torch.zeros(1, 3, 32, 32), output_vision_features=True)
    assert repr(encoded).startswith("VFMTokEncoderOutput(image_tokens=int64[1, 9], quantized_latents=float32[1, 9, ")
    assert "vision_features=(float32[1, " in repr(encoded)
    assert repr(model.decode(encoded.image_tokens)) == "VFMTokDecoderOutput(reconstruction=float32[1, 3, 32, 32])"


def test_output_has_image_size_whatever_the_input_size():
    model = tiny_model(vision_image_size=48)
    assert model(tiny_images(1, size=20)).reconstruction.shape == (1, 3, 32, 32)


@torch.no_grad()
def test_decoding_tokens_equals_decoding_quantized_latents():
    model = tiny_model()
    encoded = model.encode(tiny_images())
    torch.testing.assert_close(model.quantizer.lookup(encoded.image_tokens), encoded.quantized_latents)
    by_tokens = model.decode(image_tokens=encoded.image_tokens).reconstruction
    by_latents = model.decode(quantized_latents=encoded.quantized_latents).reconstruction
    assert torch.equal(by_tokens, by_latents)


@torch.no_grad()
def test_feature_branch_does_not_touch_the_image_branch():
    model = tiny_model()
    tokens = torch.randint(64, (2, 9))
    both = model.decode(image_tokens=tokens, output_features=True)
    torch.testing.assert_close(
        model.decode(image_tokens=tokens).reconstruction, both.reconstruction, atol=1e-5, rtol=1e-5
    )
    embeds = model.get_image_features(image_tokens=tokens)
    torch.testing.assert_close(embeds, both.image_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_share_one_pass_of_the_memory(attention):
    """Each layer sees the memory once for both branches, and computes what two passes compute, gradients too."""
    model = tiny_model(decoder_dropout=0.0)
    model.set_attn_implementation(attention)
    decoder, lengths = model.vit_decoder, []
    for layer in decoder.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    tokens = torch.randint(64, (2, 9))
    results = []
    for shared in (True, False):
        model.zero_grad()
        lengths.clear()
        memory = model._memory(tokens, None)
        if shared:
            image, features, _ = decoder(memory, output_features=True)
            assert lengths == [9 + (1 + 64) + (1 + 16)] * 2
        else:
            image, _, _ = decoder(memory)
            _, features, _ = decoder(memory, output_image=False, output_features=True)
            assert sorted(lengths) == [9 + (1 + 16)] * 2 + [9 + (1 + 64)] * 2
        (image.square().mean() + features.square().mean()).backward()
        gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
        results.append((image, features, gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_image_features_are_those_of_the_tokens():
    model, images = tiny_model(), tiny_images()
    image_tokens = model.encode(images).image_tokens
    decoded = model.decode(image_tokens=image_tokens, output_features=True)
    torch.testing.assert_close(model.get_image_features(images), decoded.image_embeds, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_image_features(image_tokens=image_tokens), model.get_image_features(images))
    for arguments in ({}, {"pixel_values": images, "image_tokens": image_tokens}):
        with pytest.raises(ValueError, match="exactly one of pixel_values and image_tokens"):
            model.get_image_features(**arguments)


@torch.no_grad()
def test_anchor_self_attention_is_causal():
    """Changing anchor i + 1 leaves the states of anchors up to i as they were."""
    model = tiny_model()
    features = model.extract_vision_features(tiny_images())
    before, _, _ = model.anchor_encoder(features)
    model.anchor_encoder.anchor_queries[:, 5] += torch.randn(32)
    after, _, _ = model.anchor_encoder(features)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


def test_straight_through_gradient_is_the_identity():
    model = tiny_model()
    latents = torch.randn(2, 9, 4)
    unit = F.normalize(latents, dim=-1).requires_grad_()
    gradient = torch.randn(2, 9, 4)
    model.quantizer(unit).quantized_latents.backward(gradient)
    # Through the normalization of an already unit vector the radial part vanishes, the rest passes unchanged.
    tangential = gradient - (gradient * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(unit.grad, tangential, atol=1e-5, rtol=1e-5)


def test_quantizer_picks_the_nearest_rows():
    model = tiny_model()
    latents = torch.randn(3, 9, 4)
    distances = torch.cdist(F.normalize(latents, dim=-1), F.normalize(model.quantizer.codebook.weight, dim=-1))
    assert torch.equal(model.quantizer.nearest(latents), distances.argmin(-1))
    assert torch.equal(model.quantizer(latents).image_tokens, distances.argmin(-1))
    assert torch.equal(model.quantizer.top_k(latents, 3), distances.topk(3, largest=False).indices)


LOSSES = ("codebook_loss", "commitment_loss", "entropy_loss", "feature_loss")


def test_loss_is_the_sum_of_its_terms():
    out = tiny_model(entropy_loss_weight=0.1)(tiny_images(), return_loss=True)
    torch.testing.assert_close(out.loss, sum(out[name] for name in LOSSES))
    assert all(out[name].requires_grad for name in LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_weight_multiplies_its_term(name):
    model, images = tiny_model(entropy_loss_weight=0.5), tiny_images()
    before = model(images, return_loss=True)
    setattr(model.config, f"{name}_weight", 3 * getattr(model.config, f"{name}_weight"))
    after = model(images, return_loss=True)
    for other in LOSSES:
        torch.testing.assert_close(after[other], (3 if other == name else 1) * before[other])


@torch.no_grad()
def test_forward_is_encode_and_decode():
    model, images = tiny_model(), tiny_images()
    out = model(images)
    encoded = model.encode(images, output_vision_features=True)
    decoded = model.decode(image_tokens=encoded.image_tokens, output_features=True)
    assert torch.equal(out.image_tokens, encoded.image_tokens)
    assert torch.equal(out.quantized_latents, encoded.quantized_latents)
    assert torch.equal(out.reconstruction, decoded.reconstruction)
    assert torch.equal(out.pooler_output, decoded.image_embeds)
    assert [tuple(level.shape) for level in encoded.vision_features] == [(2, 16, 4, 4)] * 3
    assert out.loss is None


def test_without_a_loss_quantized_latents_are_exactly_codebook_rows():
    model, images = tiny_model(), tiny_images()
    encoded = model.encode(images)
    assert torch.equal(encoded.quantized_latents, model.quantizer.codebook()[encoded.image_tokens])
    trained = model.encode(images, return_loss=True)
    assert torch.equal(trained.image_tokens, encoded.image_tokens)
    trained.quantized_latents.sum().backward()
    assert model.quant_proj.weight.grad is not None


def test_every_trainable_parameter_gets_a_gradient():
    model = tiny_model().train()
    out = model(tiny_images(), return_loss=True)
    (out.loss + out.reconstruction.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_decoder_dropout_acts_in_training_only():
    model = tiny_model(decoder_dropout=0.5)
    tokens = torch.randint(64, (1, 9))
    assert torch.equal(model.decode(tokens).reconstruction, model.decode(tokens).reconstruction)
    model.train()
    assert not torch.equal(model.decode(tokens).reconstruction, model.decode(tokens).reconstruction)


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(tmp_path):
    model, images = tiny_model(), tiny_images()
    model.save_pretrained(tmp_path)
    eager = VFMTokModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager.encode(images).latents, model.encode(images).latents, atol=1e-5, rtol=1e-5)
    tokens = model.encode(images).image_tokens
    for name in ("reconstruction", "reconstructed_features"):
        torch.testing.assert_close(
            eager.decode(tokens, output_features=True)[name],
            model.decode(tokens, output_features=True)[name],
            atol=1e-5,
            rtol=1e-5,
        )
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_gradient_checkpointing_changes_nothing():
    model, images = tiny_model(decoder_dropout=0.0).train(), tiny_images()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(images, return_loss=True)
        (out.loss + out.reconstruction.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_frozen(model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


# -- precision


@torch.no_grad()
def test_half_precision_stays_close(tmp_path):
    model, images = tiny_model(), tiny_images(8)
    model.save_pretrained(tmp_path)
    latents = F.normalize(model.encode(images).latents, dim=-1)
    tokens = model.encode(images).image_tokens
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        half = VFMTokModel.from_pretrained(tmp_path, dtype=dtype).eval()
        assert half.dtype == dtype
        assert half.quantizer.codebook.weight.dtype == torch.float32
        # The mean difference of unit vectors; bf16 has 8 bits of mantissa, through some ten layers.
        assert (F.normalize(half.encode(images).latents.float(), dim=-1) - latents).abs().mean() < bound
        # Pixels of the same tokens, on a range of about 2.
        difference = half.decode(tokens).reconstruction.float() - model.decode(tokens).reconstruction
        assert difference.abs().mean() < bound


@torch.no_grad()
def test_codebook_lookup_is_fp32_under_autocast():
    model, latents = tiny_model(), torch.randn(4, 9, 4)
    expected = model.quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = model.quantizer(latents)
        assert torch.equal(model.quantizer.nearest(latents), expected.image_tokens)
    assert quantized.quantized_latents.dtype == torch.float32
    assert torch.equal(quantized.quantized_latents, expected.quantized_latents)


# -- saving, loading, freezing


def test_save_and_load_is_exact_and_stays_frozen(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for load in (VFMTokModel.from_pretrained, AutoModel.from_pretrained):
        loaded = load(tmp_path)
        assert isinstance(loaded, VFMTokModel)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert_frozen(loaded)
        assert loaded.vit_decoder.cls_token.requires_grad


def test_vision_model_stays_frozen():
    model = tiny_model()
    assert_frozen(model)
    assert_frozen(model.train())
    assert model.training
    assert model.vit_decoder.training
    assert_frozen(copy.deepcopy(model))
    assert_frozen(AutoModel.from_config(model.config).train())
    model.load_state_dict(model.state_dict())
    assert_frozen(model)


def test_gradient_reaches_pixels_but_not_the_vision_model():
    model = tiny_model()
    images = tiny_images().requires_grad_()
    sum(level.square().mean() for level in model.extract_vision_features(images)).backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())


def test_light_checkpoint(tmp_path):
    full = tiny_model()
    full.vision_model.save_pretrained(tmp_path / "vision")
    full.config.save_vision_model = False
    light = VFMTokModel(full.config).eval()
    light.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("vision_model.")})
    light.save_pretrained(tmp_path / "light")

    light = VFMTokModel.from_pretrained(tmp_path / "light").eval()
    tokens = torch.randint(64, (1, 9))
    assert torch.equal(light.decode(tokens).reconstruction, full.decode(tokens).reconstruction)
    with pytest.raises(ValueError, match="no vision weights.*load_vision_model"):
        light.encode(tiny_images())
    with pytest.raises(ValueError, match="does not say where"):
        light.load_vision_model()

    light.load_vision_model(str(tmp_path / "vision"))
    assert_frozen(light)
    images = tiny_images()
    assert torch.equal(light.encode(images).image_tokens, full.encode(images).image_tokens)
    light.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size < 1.1 * (
        tmp_path / "light" / "model.safetensors"
    ).stat().st_size
    assert VFMTokModel.from_pretrained(tmp_path / "again").vision_model is None


def test_wrong_vision_weights_are_refused(tmp_path):
    config = tiny_config(save_vision_model=False)
    other = AutoModel.from_config(tiny_config().vision_config)
    del other.encoder.layer[2]
    other.config.num_hidden_layers = 2
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 18 weights"):
        VFMTokModel(config).load_vision_model(str(tmp_path))


# -- bad input


def test_bad_pixel_values():
    model = tiny_model()
    for bad in (torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pixel_values must be floating point of shape"):
            model.encode(bad)
    picture = Image.new("RGB", (32, 32))
    for bad in (picture, [picture], [[0.5]]):
        for method in (model.encode, model.get_image_features, model):
            with pytest.raises(TypeError, match="Create it from images with VFMTokImageProcessor"):
                method(bad)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.encode(torch.full((1, 3, 32, 32), torch.nan))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.long), "9 tokens per image, got 8"),
        (torch.zeros(9, dtype=torch.long), "of shape"),
        (torch.zeros(1, 9), "must be integers"),
        (torch.full((1, 9), 64), r"in \[0, 64\), got values from 64 to 64"),
        (torch.full((1, 9), -1), "got values from -1"),
    ],
)
def test_bad_image_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().decode(image_tokens=tokens)


def test_decode_takes_tensors():
    with pytest.raises(TypeError, match="image_tokens must be a tensor, got list: convert with torch.as_tensor"):
        tiny_model().decode([[0] * 9])


def test_image_features_take_exactly_one_input():
    with pytest.raises(ValueError, match="exactly one of pixel_values and image_tokens"):
        tiny_model().get_image_features()


def test_decode_takes_exactly_one_input():
    model = tiny_model()
    with pytest.raises(ValueError, match="exactly one"):
        model.decode()
    with pytest.raises(ValueError, match="exactly one"):
        model.decode(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, 4))
    with pytest.raises(ValueError, match="quantized_latents must have shape"):
        model.decode(quantized_latents=torch.zeros(1, 9, 5))


# -- deformable sampling


def test_sampling_a_pixel_center_reads_that_pixel():
    height, width = 3, 4
    value = torch.randn(1, height * width, 1, 2)
    for row, column in ((0, 0), (2, 3), (1, 2)):
        location = torch.tensor([(column + 0.5) / width, (row + 0.5) / height]).view(1, 1, 1, 1, 1, 2)
        output = MultiScaleDeformableAttention()(
            value, None, [(height, width)], None, location, torch.ones(1, 1, 1, 1, 1), 1
        )
        torch.testing.assert_close(output[0, 0], value[0, row * width + column, 0])


def test_levels_of_different_sizes_are_kept_apart():
    shapes = [(2, 2), (4, 3)]
    value = torch.cat([torch.full((1, 4, 1, 1), 1.0), torch.full((1, 12, 1, 1), 10.0)], dim=1)
    locations = torch.full((1, 1, 1, 2, 1, 2), 0.5)
    weights = torch.tensor([0.25, 0.75]).view(1, 1, 1, 2, 1)
    output = MultiScaleDeformableAttention()(value, None, shapes, None, locations, weights, 1)
    torch.testing.assert_close(output.item(), 0.25 * 1 + 0.75 * 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_what_float32_samples(dtype):
    """At a batch of one the feature maps are strided views, for which torch's own half-precision sampling is wrong."""
    torch.manual_seed(0)
    value = torch.randn(1, 24 * 24, 8, 64).to(dtype)
    locations = (torch.rand(1, 256, 8, 1, 4, 2) * 1.2 - 0.1).to(dtype)
    weights = torch.rand(1, 256, 8, 1, 4).softmax(-1).to(dtype)
    sampler = MultiScaleDeformableAttention()
    expected = sampler(value.float(), None, [(24, 24)], None, locations.float(), weights.float(), 1)
    output = sampler(value, None, [(24, 24)], None, locations, weights, 1)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# -- pixel decoder


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_is_a_convolution_of_repeated_pixels(memory_format):
    layer = VFMTokPixelUpsample(6).double()
    hidden_states = torch.randn(2, 6, 5, 7, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    inputs = [hidden_states, layer.weight, layer.bias]
    result = layer(hidden_states)
    repeated = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(repeated, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_upsampling_in_bfloat16():
    torch.manual_seed(0)
    layer = VFMTokPixelUpsample(6)
    hidden_states = torch.randn(2, 6, 5, 7)
    expected = layer(hidden_states)
    result = layer.bfloat16()(hidden_states.bfloat16()).float()
    # Weights, sums of weights and inputs are each rounded to 8 bits: 3 x 2^-9 of the largest terms.
    torch.testing.assert_close(result, expected, rtol=0, atol=0.02)
