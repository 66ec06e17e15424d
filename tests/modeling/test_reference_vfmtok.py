"""
The tokenizer against numbers that the original code computed, from the converted original checkpoint.

Bounds are those of the reference's README: 5e-5 for features, latents and losses, 1e-4 for the decoder grid, 1e-3 for
float32 images (the original's carry rounding noise of 2.2e-4; its float64 run is the sharp comparison), tokens equal.
"""

import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.testing import REFERENCE, REFERENCE_TOKENIZER_CONFIG, reference_images, reference_tensors
from vfmtok_hf import VFMTokImageProcessor, VFMTokModel
from vfmtok_hf.conversion import convert_tokenizer, export_original_tokenizer
from vfmtok_hf.cpu.packing import PackedLinear, pack_weights
from vfmtok_hf.modeling.autoencoder_vfmtok import resize_for_vision_model
from vfmtok_hf.training.arguments import TokenizerArguments
from vfmtok_hf.training.codebook import CodebookUsage
from vfmtok_hf.training.objective import TokenizerObjective
from vfmtok_hf.training.tokenizer_training import set_up_layers


BATCHES = {"b336": ("b336_0", "b336_1"), "b256": ("b256_0", "b256_1")}


@pytest.fixture(scope="module")
def tensors():
    return reference_tensors("tokenizer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for weights in ("ema", "model"):
        folders[weights] = tmp_path_factory.mktemp(weights) / "converted"
        convert_tokenizer(
            REFERENCE / "tokenizer" / "tokenizer.pt",
            folders[weights],
            vision_checkpoint=REFERENCE / "tokenizer" / "backbone.pt",
            weights=weights,
            config=REFERENCE_TOKENIZER_CONFIG,
        )
    return folders


@pytest.fixture(scope="module", params=[nn.Identity(), pack_weights], ids=["plain", "packed"])
def model(request, folders):
    return request.param(VFMTokModel.from_pretrained(folders["ema"]).eval())


@pytest.fixture(scope="module")
def trace(model):
    """For each batch of images, what passes through the parts of the model."""
    return {name: trace_model(model, reference_images(*images)) for name, images in BATCHES.items()}


@torch.no_grad()
def trace_model(model, images):
    """Run encode and decode, recording outputs of submodules by name."""
    seen = {}
    names = ["quant_proj", "post_quant_proj", "vit_decoder.layers.0", "vit_decoder", "pixel_decoder"]
    names += [f"anchor_encoder.projectors.{level}" for level in range(4)]
    for layer in range(2):
        names += [f"anchor_encoder.layers.{layer}{part}" for part in ("", ".cross_attn", ".self_attn")]

    def record(name):
        return lambda module, args, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    handles.append(model.vision_model.register_forward_pre_hook(lambda m, args: seen.__setitem__("pixels", args[0])))
    handles.append(
        model.pixel_decoder.register_forward_pre_hook(lambda m, args: seen.__setitem__("image_grid", args[0]))
    )
    seen["features"] = model.extract_vision_features(images)
    seen["encoded"] = model.encode(images, output_sampling_locations=True)
    seen["reconstruction"] = model.decode(image_tokens=seen["encoded"].image_tokens).reconstruction
    for handle in handles:
        handle.remove()
    return seen


def close(actual, expected, bound=5e-5):
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=bound, rtol=0)


def tokens_of(features):
    return features.flatten(2).transpose(1, 2)


# -- encoder


@pytest.mark.parametrize("batch", BATCHES)
def test_vision_input_and_levels(batch, trace, tensors):
    seen = trace[batch]
    pixels = seen["pixels"]
    if batch == "b336":
        close(pixels[:, :, ::10, ::10], tensors["b336.pixel_values.stride10"])
    close(pixels.double().sum((2, 3)), tensors[f"{batch}.pixel_values.channel_sum"], 1e-2)  # sums of 112,896 values
    # A float32 value that is rounded the other way changes its square by as much as 2**-23 of it. Versions of torch
    # resize with different roundings, and those of smooth images need not cancel.
    squares = tensors[f"{batch}.pixel_values.channel_sqsum"]
    torch.testing.assert_close(pixels.double().square().sum((2, 3)), squares, atol=0, rtol=2**-23)
    for level, features in enumerate(seen["features"]):
        tokens = tokens_of(features)
        key = f"{batch}.backbone_level{level}"
        close(*((tokens, tensors[key]) if key in tensors else (tokens[:, ::5], tensors[f"{key}.stride5"])))


@torch.no_grad()
def test_shrinking_resize_blurs_first(model, tensors):
    pixels = resize_for_vision_model(reference_images("downsize_0"), 336).clamp(-1, 1)
    mean, std = (
        torch.tensor(c).view(3, 1, 1) for c in (model.config.vision_image_mean, model.config.vision_image_std)
    )
    pixels = ((pixels + 1) / 2 - mean) / std
    close(pixels[:, :, ::5, ::5], tensors["downsize.pixel_values.stride5"])
    close(pixels.double().sum((2, 3)), tensors["downsize.pixel_values.channel_sum"], 1e-2)


@pytest.mark.parametrize("batch", BATCHES)
def test_projected_levels(batch, trace, tensors):
    for level in range(4):
        key = f"{batch}.kv_level{level}.stride5"
        if key in tensors:
            close(trace[batch][f"anchor_encoder.projectors.{level}"][:, ::5], tensors[key])


def test_reference_points(model, tensors):
    points = model.anchor_encoder.reference_points(torch.device("cpu"))
    close(points[None, :, None].expand(2, -1, 4, -1), tensors["b336.reference_points"])
    shapes = tensors["b336.spatial_shapes"]
    assert shapes.tolist() == [[24, 24]] * 4
    # The original lists one start more than there are levels: the end.
    assert tensors["b336.level_start_index"].tolist() == [0, *shapes.prod(1).cumsum(0).tolist()]


@pytest.mark.parametrize("layer", [0, 1])
def test_encoder_layers(layer, trace, tensors):
    seen = trace["b336"]
    encoded = seen["encoded"]
    close(encoded.sampling_locations[layer][0], tensors[f"b336.enc_layer{layer}.sampling_locations.image0"])
    close(encoded.attention_weights[layer][0], tensors[f"b336.enc_layer{layer}.attention_weights.image0"])
    close(seen[f"anchor_encoder.layers.{layer}.cross_attn"], tensors[f"b336.enc_layer{layer}.cross_attn"])
    close(seen[f"anchor_encoder.layers.{layer}.self_attn"], tensors[f"b336.enc_layer{layer}.self_attn"])
    for batch in BATCHES:
        key = f"{batch}.enc_layer{layer}.output"
        if key in tensors:
            close(trace[batch][f"anchor_encoder.layers.{layer}"], tensors[key])


@pytest.mark.parametrize("batch", BATCHES)
def test_latents_and_tokens(batch, model, trace, tensors):
    encoded = trace[batch]["encoded"]
    close(trace[batch]["anchor_encoder.layers.1"], tensors[f"{batch}.slots"])
    close(encoded.latents, tensors[f"{batch}.prequant"])
    assert torch.equal(encoded.image_tokens, tensors[f"{batch}.indices"])
    close(encoded.quantized_latents, tensors[f"{batch}.quant_lookup"])
    close(model.quantizer(encoded.latents).quantized_latents, tensors[f"{batch}.quant_straight_through"])
    close(trace[batch]["post_quant_proj"], tensors[f"{batch}.postquant"])


@pytest.mark.parametrize("batch", BATCHES)
def test_two_nearest_rows(batch, model, trace, tensors):
    unit = F.normalize(trace[batch]["encoded"].latents, dim=-1)
    top = (unit @ model.quantizer.normalized_codebook().T).topk(2)
    # batch, anchors, rank -> batch, rank, anchors
    assert torch.equal(top.indices.transpose(1, 2), tensors[f"{batch}.top2_indices"])
    expected = tensors[f"{batch}.top2_distances"]
    distances = (2 - 2 * top.values).reshape(expected.shape if expected.shape[-1] == 2 else top.values.shape)
    close(distances, expected)


# -- decoder


def test_position_table_keeps_the_originals_scale(model, tensors):
    close(model.vit_decoder.image_position_embeddings()[:, ::3], tensors["decoder_position_embedding.stride3"])


def test_decoder_grid(trace, tensors):
    # The original's sequence has its registers at the end, which ours leaves out.
    expected = tensors["b336.dec_layer0.output.image0.stride3"]
    ours = trace["b336"]["vit_decoder.layers.0"][0, ::3]
    assert len(ours) + 1 == len(expected)
    close(ours, expected[: len(ours)])
    close(trace["b336"]["image_grid"], tensors["b336.z"], 1e-4)
    close(trace["b256"]["image_grid"][:, :, ::3, ::3], tensors["b256.z.stride3"], 1e-4)


@pytest.mark.parametrize("batch", BATCHES)
def test_reconstruction(batch, trace, tensors):
    image = trace[batch]["reconstruction"]
    close(image[:, :, ::5, ::5], tensors[f"{batch}.recon.stride5"], 1e-3)
    if batch == "b336":
        close(image[:, :, :24, :24], tensors["b336.recon.corner_tl"], 1e-3)
        close(image[:, :, -24:, -24:], tensors["b336.recon.corner_br"], 1e-3)
        close(image[:, :, 136:200, 136:200], tensors["b336.recon.center"], 1e-3)
        # 1e-3 a pixel is the bound of a value; sums of 112,896 of them, whose noise cancels, stay within 10.
        close(image.double().sum((2, 3)), tensors["b336.recon.channel_sum"], 10)
        close(image.double().square().sum((2, 3)), tensors["b336.recon.channel_sqsum"], 10)


def test_reconstruction_against_float64(model, trace, tensors):
    # torch's group norm of channels-last tensors takes the variance in one pass, which loses digits.
    bound = 3e-4 if isinstance(model.quant_proj, PackedLinear) else 5e-5
    close(trace["b336"]["reconstruction"][:, :, ::5, ::5], tensors["b336.f64.recon.stride5"], bound)


def test_float64_run(folders, tensors):
    """The whole network in float64; only the input's normalization stays float32, as in the reference."""
    model = VFMTokModel.from_pretrained(folders["ema"], dtype=torch.float64).eval()
    seen = trace_model(model.double(), reference_images(*BATCHES["b336"]))
    # From the latents back the two runs differ in where float32 constants enter: 1e-5, says the README.
    close(seen["anchor_encoder.layers.1"], tensors["b336.f64.slots"], 1e-5)
    close(seen["encoded"].latents, tensors["b336.f64.prequant"], 1e-5)
    # Our quantizer rounds its rows to float32, which is the bound from here on.
    close(seen["post_quant_proj"], tensors["b336.f64.postquant"], 1e-6)
    close(seen["image_grid"][:, :, ::3, ::3], tensors["b336.f64.z.stride3"], 1e-5)
    close(seen["reconstruction"][:, :, ::5, ::5], tensors["b336.f64.recon.stride5"], 1e-5)


def test_uint8_images(trace, tensors):
    """At most 1 step, in at most 1 % of the values: what float32 against float64 changes, says the README."""
    reconstruction = trace["b336"]["reconstruction"]
    processor = VFMTokImageProcessor()
    # batch, height, width, channels
    at_256 = torch.from_numpy(np.stack(processor.postprocess(reconstruction, output_type="pil", size=256)))
    native = torch.from_numpy(np.stack(processor.postprocess(reconstruction, output_type="pil")))
    for ours, key in (
        (at_256[0], "b336.codes_to_img_256.image0"),
        (at_256[:, ::4, ::4], "b336.codes_to_img_256.stride4"),
        (native[:, ::8, ::8], "b336.codes_to_img_native.stride8"),
    ):
        difference = (ours.int() - tensors[key].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 0.01


# -- the other weights, and training


def test_model_weights_are_another_choice(folders, tensors):
    model = VFMTokModel.from_pretrained(folders["model"]).eval()
    seen = trace_model(model, reference_images(*BATCHES["b336"]))
    close(seen["anchor_encoder.layers.1"], tensors["model_weights.b336.slots"])
    close(seen["encoded"].latents, tensors["model_weights.b336.prequant"])
    assert torch.equal(seen["encoded"].image_tokens, tensors["model_weights.b336.indices"])
    close(seen["image_grid"][:, :, ::3, ::3], tensors["model_weights.b336.z.stride3"], 1e-4)
    close(seen["reconstruction"][:, :, ::15, ::15], tensors["model_weights.b336.recon.stride15"], 1e-3)


@pytest.mark.parametrize("entropy_ratio", [0.0, 0.1])
def test_training_losses_and_gradients(entropy_ratio, folders, tensors):
    model = VFMTokModel.from_pretrained(folders["model"]).train()
    model.config.entropy_loss_weight = entropy_ratio
    images = reference_images(*BATCHES["b336"])
    out = model(images, return_loss=True)
    assert torch.equal(out.image_tokens, tensors["train.indices"])
    close(out.codebook_loss, tensors["train.vq_loss"].squeeze())
    close(out.commitment_loss, tensors["train.commit_loss"].squeeze())
    close(out.feature_loss, tensors["train.cosine_loss"].squeeze())
    close(out.entropy_loss, tensors[f"train.entropy_ratio_{entropy_ratio}.entropy_loss"].squeeze())
    close(out.reconstruction[:, :, ::15, ::15], tensors["train.recon.stride15"], 1e-3)

    probe_loss = out.reconstruction.square().mean() + out.loss
    close(probe_loss, tensors[f"train.entropy_ratio_{entropy_ratio}.probe_loss"].squeeze())
    probe_loss.backward()
    assert_original_gradients(model, entropy_ratio)


@pytest.mark.parametrize("layers", ["plain", "set up"])
@pytest.mark.parametrize("entropy_ratio", [0.0, 0.1])
def test_objective_of_the_training_script(entropy_ratio, layers, folders, tensors):
    """The same numbers from the module that trains, with the original's weights; its pixel loss counts twice."""
    model = VFMTokModel.from_pretrained(folders["model"])
    model.config.entropy_loss_weight = entropy_ratio
    weights = {"l1": 0.0, "mse": 2.0, "lpips": 0.0, "perceptual": 0.0}
    objective = TokenizerObjective(model, weights).train()
    if layers == "set up":
        arguments = TokenizerArguments(train_data="", output="", attention="eager")
        set_up_layers(objective, arguments, torch.device("cpu"))
    images = reference_images(*BATCHES["b336"])
    out = objective(images)
    terms = out["terms"]
    assert torch.equal(out["image_tokens"], tensors["train.indices"])
    close(terms["codebook"], tensors["train.vq_loss"].squeeze())
    close(terms["commitment"], tensors["train.commit_loss"].squeeze())
    close(terms["feature"], tensors["train.cosine_loss"].squeeze())
    close(terms["entropy"], tensors[f"train.entropy_ratio_{entropy_ratio}.entropy_loss"].squeeze())
    close(out["reconstruction"][:, :, ::15, ::15], tensors["train.recon.stride15"], 1e-3)
    close(out["image_loss"], 2 * F.mse_loss(out["reconstruction"], images))

    probe_loss = out["loss"] - out["image_loss"] + out["reconstruction"].square().mean()
    close(probe_loss, tensors[f"train.entropy_ratio_{entropy_ratio}.probe_loss"].squeeze())
    probe_loss.backward()
    assert_original_gradients(model, entropy_ratio)


def assert_original_gradients(model, entropy_ratio):
    """Norms of the probe loss's gradients, by the original's names."""
    original = export_original_tokenizer_gradients(model)
    norms = json.loads((REFERENCE / "tokenizer" / "train_grad_norms.json").read_text())
    expected = norms[next(key for key in norms if key.endswith(str(entropy_ratio)))]
    largest = max(expected.values())
    compared = 0
    for name, norm in expected.items():
        if norm > 1e-5 * largest:
            assert original[name].double().norm().item() == pytest.approx(norm, rel=1e-3), name
            compared += 1
    assert compared > 200


def export_original_tokenizer_gradients(model):
    """Gradients under the original's names: the converter works on any tensors of those names and shapes."""
    gradients = VFMTokModel(model.config)
    gradients.load_state_dict(model.state_dict())
    with torch.no_grad():
        for (name, target), (_, source) in zip(gradients.named_parameters(), model.named_parameters(), strict=True):
            target.copy_(torch.zeros_like(target) if source.grad is None else source.grad), name
    return export_original_tokenizer(gradients)


def test_reconstructed_features(folders, tensors):
    model = VFMTokModel.from_pretrained(folders["model"]).eval()
    with torch.no_grad():
        features = model.extract_vision_features(reference_images(*BATCHES["b336"]))
        quantized = model.quantizer(model.encode_features(features)).quantized_latents
        decoded = model.decode(quantized_latents=quantized, output_features=True)
    target = tokens_of(features[-1])
    close(decoded.reconstructed_features[:, ::3], tensors["train.dinov2.stride3"])
    close(target[:, ::5], tensors["train.latent_target.stride5"])
    cosine = F.cosine_similarity(decoded.reconstructed_features, target, dim=-1, eps=1e-6)
    close(1 - cosine, tensors["train.cosine_loss_map"])


def test_codebook_usage_statistic(tensors):
    """The history of the last 65,536 tokens, carried on from the original checkpoint and from an empty one."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(REFERENCE / "tokenizer" / "tokenizer.pt", weights_only=True)
    history = checkpoint["model"]["slot_quantize.codebook_used"]
    for start, key in (
        (history, "train.codebook_usage"),
        (torch.zeros_like(history), "train.codebook_usage_from_empty_history"),
    ):
        usage = CodebookUsage(codebook_size=512)
        usage.history = start.long()
        usage.update(tensors["train.indices"])
        assert usage.usage() == pytest.approx(tensors[key].item(), abs=1e-9)
        if start is history:
            assert torch.equal(usage.history[-6000:].float(), tensors["train.codebook_used_tail6000_after"])
