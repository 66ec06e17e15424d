"""
VFMAE against numbers that the original code computed, from the converted original checkpoint.

Bounds are those of the reference's README: 2e-6 for the vision model's input (3e-6 on torch 2.9), 5e-5 for features, latents, the decoder grid
and losses, 1e-3 for float32 images (the original's carry rounding noise of 5.7e-5; its float64 run is the sharp comparison).
"""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.testing import REFERENCE, REFERENCE_TOKENIZER_CONFIG, reference_images, reference_tensors
from vfmtok_hf import VFMAEModel, VFMTokImageProcessor
from vfmtok_hf.conversion import convert_vfmae, export_original_vfmae
from vfmtok_hf.cpu.packing import PackedLinear, pack_weights
from vfmtok_hf.modeling.autoencoder_vfmtok import resize_for_vision_model


FOLDER = REFERENCE / "vfmae"
BATCHES = {name: (f"{name}_0", f"{name}_1") for name in ("b256", "b224", "b160")}
# Of the batches the first is recorded more densely.
TOKEN_STRIDE = {"b256": 4, "b224": 20, "b160": 20}


def images_of(*names):
    return reference_images(*names, model="vfmae")


@pytest.fixture(scope="module")
def tensors():
    return reference_tensors("vfmae")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for weights in ("ema", "model"):
        folders[weights] = tmp_path_factory.mktemp(weights) / "converted"
        convert_vfmae(
            FOLDER / "vfmae.pt",
            folders[weights],
            vision_checkpoint=FOLDER / "backbone.pt",
            latent_statistics=FOLDER / "stats.pt",
            weights=weights,
            config=REFERENCE_TOKENIZER_CONFIG,
        )
    return folders


@pytest.fixture(scope="module", params=[nn.Identity(), pack_weights], ids=["plain", "packed"])
def model(request, folders):
    return request.param(VFMAEModel.from_pretrained(folders["ema"]).eval())


@pytest.fixture(scope="module")
def trace(model):
    """For each batch of images, what passes through the parts of the model."""
    return {name: trace_model(model, images_of(*images)) for name, images in BATCHES.items()}


@torch.no_grad()
def trace_model(model, images):
    """Run encode and decode, recording outputs of submodules by name."""
    seen = {}
    names = ["latent_proj", "bottleneck.norm", "vision_model", "pixel_decoder"]
    names += [f"anchor_encoder.projectors.{level}" for level in range(4)]
    names += [f"anchor_encoder.layers.{layer}{part}" for layer in (0, 1) for part in ("", ".cross_attn", ".self_attn")]
    names += ["vit_decoder.layers.0", "vit_decoder.layers.2", "vit_decoder.feature_layers.0"]

    def record(name):
        def hook(module, args, output):
            seen[name] = output[0] if isinstance(output, tuple) else output
            seen[f"{name}.input"] = args[0] if args else None

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    seen["encoded"] = model.encode(images, output_sampling_locations=True, output_vision_features=True)
    seen["decoded"] = model.decode(seen["encoded"].latents, output_features=True)
    for handle in handles:
        handle.remove()
    return seen


def close(actual, expected, bound=5e-5):
    torch.testing.assert_close(actual.to(expected.dtype), expected, atol=bound, rtol=0)


def check_sums(image, tensors, key, relative):
    for name, values in (("channel_sum", image.double()), ("channel_sqsum", image.double().square())):
        torch.testing.assert_close(values.sum((2, 3)), tensors[f"{key}.{name}"], rtol=relative, atol=0)


# -- encoder


@pytest.mark.parametrize("batch", BATCHES)
def test_vision_input_and_levels(batch, trace, tensors):
    seen, stride = trace[batch], TOKEN_STRIDE[batch]
    pixels = seen["vision_model.input"]
    # 2.2e-6, and 3.7e-6 of the sums, with torch 2.9, whose bicubic resize rounds differently.
    close(pixels[:, :, ::7, ::7], tensors[f"{batch}.pixel_values.stride7"], 3e-6)
    check_sums(pixels, tensors, f"{batch}.pixel_values", 5e-6)
    for level, tokens in enumerate(seen["encoded"].vision_features):
        # The original's have 4 registers behind the class token.
        expected = tensors[f"{batch}.backbone_level{level}.stride{stride}"]
        positions = [index for index in range(0, 261, stride) if not 1 <= index <= 4]
        close(tokens[:, [max(index - 4, 0) for index in positions]], expected[:, [i // stride for i in positions]])
        projected = seen[f"anchor_encoder.projectors.{level}"]
        close(projected[:, ::stride], tensors[f"{batch}.kv_level{level}.stride{stride}"])


@torch.no_grad()
def test_shrinking_resize_blurs_first(model, tensors):
    pixels = resize_for_vision_model(images_of("downsize_0"), 224).clamp(-1, 1)
    mean, std = (
        torch.tensor(c).view(3, 1, 1) for c in (model.config.vision_image_mean, model.config.vision_image_std)
    )
    pixels = ((pixels + 1) / 2 - mean) / std
    close(pixels[:, :, ::7, ::7], tensors["downsize.pixel_values.stride7"], 2e-6)
    check_sums(pixels, tensors, "downsize.pixel_values", 1e-6)


def test_reference_points(model, tensors):
    points = model.anchor_encoder.reference_points(torch.device("cpu"))
    close(points[None, :, None].expand(2, -1, 4, -1), tensors["b256.reference_points"])
    shapes = tensors["b256.spatial_shapes"]
    assert shapes.tolist() == [[16, 16]] * 4
    # The original lists one start more than there are levels: the end.
    assert tensors["b256.level_start_index"].tolist() == [0, *shapes.prod(1).cumsum(0).tolist()]


@pytest.mark.parametrize("layer", [0, 1])
def test_encoder_layers(layer, trace, tensors):
    seen = trace["b256"]
    encoded = seen["encoded"]
    close(encoded.sampling_locations[layer][0], tensors[f"b256.enc_layer{layer}.sampling_locations.image0"])
    close(encoded.attention_weights[layer][0], tensors[f"b256.enc_layer{layer}.attention_weights.image0"])
    close(seen[f"anchor_encoder.layers.{layer}.cross_attn"], tensors[f"b256.enc_layer{layer}.cross_attn"])
    close(seen[f"anchor_encoder.layers.{layer}.self_attn"], tensors[f"b256.enc_layer{layer}.self_attn"])
    for batch in BATCHES:
        close(trace[batch][f"anchor_encoder.layers.{layer}"], tensors[f"{batch}.enc_layer{layer}.output"])


@pytest.mark.parametrize("batch", BATCHES)
def test_latents(batch, trace, tensors):
    seen = trace[batch]
    close(seen["anchor_encoder.layers.1"], tensors[f"{batch}.slots"])
    if batch == "b256":
        close(seen["bottleneck.norm"].flatten(2)[:, :, None], tensors["b256.bottleneck.group_norm"])
    close(seen["encoded"].latents, tensors[f"{batch}.encode_imgs"])
    close(seen["encoded"].latents.flatten(2)[:, :, None], tensors[f"{batch}.posterior"])
    close(seen["latent_proj"], tensors[f"{batch}.postquant"])


def test_latent_statistics(model, tensors):
    latents = tensors["latent_statistics.posteriors"]
    close(model.latents_mean.flatten(1), tensors["latent_statistics.mean"], 1e-7)
    close(model.latents_std.flatten(1), tensors["latent_statistics.std"], 1e-7)
    normalized = model.normalize_latents(latents)
    expected = reference_tensors("ditdh")["pipeline.latents_normalised_from_images"]
    close(normalized[: len(expected)], expected, 1e-6)
    close(normalized.std(0), torch.ones(model.config.latent_shape), 1e-3)
    close(model.denormalize_latents(normalized), latents, 1e-6)


# -- decoder


def test_decoder_layers(trace, tensors):
    seen = trace["b256"]
    close(seen["vit_decoder.layers.0.input"][0, ::3], tensors["b256.dec_layer0.input.image0.stride3"])
    for layer in (0, 2):
        close(seen[f"vit_decoder.layers.{layer}"][0, ::3], tensors[f"b256.dec_layer{layer}.output.image0.stride3"])


@pytest.mark.parametrize("batch", BATCHES)
def test_reconstruction(batch, trace, tensors):
    grid, image = trace[batch]["pixel_decoder.input"], trace[batch]["decoded"].reconstruction
    check_sums(image, tensors, f"{batch}.recon", 1e-3)
    if batch != "b256":
        close(grid[:, :, ::3, ::3], tensors[f"{batch}.z.stride3"])
        close(image[:, :, ::8, ::8], tensors[f"{batch}.recon.stride8"], 1e-3)
        return
    close(grid, tensors["b256.z"])
    close(image[:, :, ::4, ::4], tensors["b256.recon.stride4"], 1e-3)
    close(image[:, :, :24, :24], tensors["b256.recon.corner24"], 1e-3)
    close(image[:, :, 104:152, 104:152], tensors["b256.recon.center48"], 1e-3)


@torch.no_grad()
def test_reconstruction_against_float64(model, trace, tensors):
    # torch's group norm of channels-last tensors takes the variance in one pass, which loses digits.
    bound = 3e-4 if isinstance(model.latent_proj, PackedLinear) else 5e-5
    close(trace["b256"]["decoded"].reconstruction[:, :, ::4, ::4], tensors["b256.f64.recon.stride4"], bound)
    decoded = model.decode(tensors["b256.encode_imgs"])
    close(decoded.reconstruction[:, :, ::4, ::4], tensors["decode.f64.recon.stride4"], bound)


def test_float64_run(folders, tensors):
    """The whole network in float64; only the input's normalization stays float32, as in the reference."""
    model = VFMAEModel.from_pretrained(folders["ema"], dtype=torch.float64).eval()
    seen = trace_model(model, images_of(*BATCHES["b256"]))
    close(seen["anchor_encoder.layers.1"], tensors["b256.f64.slots"], 1e-5)
    close(seen["encoded"].latents.flatten(2)[:, :, None], tensors["b256.f64.posterior"], 1e-5)
    close(seen["latent_proj"], tensors["b256.f64.postquant"], 1e-5)
    close(seen["pixel_decoder.input"][:, :, ::3, ::3], tensors["b256.f64.z.stride3"], 1e-5)
    close(seen["decoded"].reconstruction[:, :, ::4, ::4], tensors["b256.f64.recon.stride4"], 1e-5)


def test_uint8_images(trace, tensors):
    """At most 1 step, in at most 1 % of the values: what float32 against float64 changes, says the README."""
    reconstruction, processor = trace["b256"]["decoded"].reconstruction, VFMTokImageProcessor(size=256)
    for size, key in ((None, "b256.imgs_native.stride4"), (192, "b256.imgs_192.stride4")):
        ours = processor.postprocess(reconstruction, "uint8", size).permute(0, 2, 3, 1)[:, ::4, ::4]
        difference = (ours.int() - tensors[key].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 0.01


# -- the other weights, and training


def test_feature_target(trace, tensors):
    close(trace["b256"]["encoded"].vision_features[-1][:, ::2], tensors["b256.feature_target.stride2"])


def test_model_weights_are_another_choice(folders, tensors):
    seen = trace_model(VFMAEModel.from_pretrained(folders["model"]).eval(), images_of(*BATCHES["b256"]))
    close(seen["anchor_encoder.layers.1"], tensors["model_weights.b256.slots"])
    close(seen["encoded"].latents.flatten(2)[:, :, None], tensors["model_weights.b256.posterior"])
    close(seen["pixel_decoder.input"][:, :, ::3, ::3], tensors["model_weights.b256.z.stride3"])
    close(seen["decoded"].reconstruction[:, :, ::12, ::12], tensors["model_weights.b256.recon.stride12"], 1e-3)
    # The feature branch, which the original runs in training only.
    feature_layer = "vit_decoder.feature_layers.0"
    close(seen[f"{feature_layer}.input"][0, ::3], tensors["train.feature_layer0.input.image0.stride3"])
    close(seen[feature_layer][0, ::3], tensors["train.feature_layer0.output.image0.stride3"])
    features = seen["decoded"].reconstructed_features
    target = seen["encoded"].vision_features[-1]
    close(features[:, ::2], tensors["train.features.stride2"])
    close(target[:, ::2], tensors["train.feature_target.stride2"])
    close(1 - F.cosine_similarity(features, target, dim=-1, eps=1e-6), tensors["train.cosine_loss_map"])


def test_training_losses_and_gradients(folders, tensors):
    model, images = VFMAEModel.from_pretrained(folders["model"]).train(), images_of(*BATCHES["b256"])
    out = model(images, return_loss=True)
    close(out.latents.flatten(2)[:, :, None], tensors["train.posterior"])
    close(out.feature_loss, tensors["train.cosine_loss"].squeeze())
    close(out.reconstruction[:, :, ::12, ::12], tensors["train.recon.stride12"], 1e-3)
    pixel_loss = 2 * F.mse_loss(out.reconstruction, images)
    close(pixel_loss, tensors["train.rec_loss"].squeeze())
    objective = pixel_loss + out.loss
    close(objective, tensors["train.objective"].squeeze())
    objective.backward()
    assert_original_gradients(model)


def assert_original_gradients(model):
    """Norms of the objective's gradients, by the original's names: the converter works on any tensors of their shapes."""
    gradients = VFMAEModel(model.config)
    for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
        target.data = torch.zeros_like(target) if source.grad is None else source.grad
    original = export_original_vfmae(gradients)
    expected = json.loads((FOLDER / "train_grad_norms.json").read_text())
    largest = max(expected.values())
    compared = {name: norm for name, norm in expected.items() if norm > 1e-5 * largest}
    assert len(compared) > 250
    for name, norm in compared.items():
        assert original[name].double().norm().item() == pytest.approx(norm, rel=1e-3), name
