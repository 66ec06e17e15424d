"""
The discriminators. `fixtures/dino_discriminator.safetensors` holds weights, logits and gradients of the public DINO
discriminator code that the original uses (from the authors of VAR), at 32 pixels, width 16 and depth 8.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTModel

from tests.testing import REFERENCE
from vfmtok_hf.training.discriminator import (
    DinoDiscriminator,
    DiscriminatorObjective,
    LocalBatchNorm,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    check_virtual_batches,
    frozen,
    load_dino,
)


def tiny_vit(**overrides) -> ViTModel:
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    return ViTModel(ViTConfig(**{**fields, **overrides}), add_pooling_layer=False)


@pytest.fixture(scope="module")
def golden():
    return load_file(REFERENCE.parent / "dino_discriminator.safetensors")


HEAD_PARTS = {
    "0.0": "conv_in",
    "0.1": "norm_in",
    "1.fn.0": "conv_neighbours",
    "1.fn.1": "norm_neighbours",
    "2": "conv_out",
}
SPECTRAL = {"weight_orig": "parametrizations.weight.original"}
SPECTRAL |= {f"weight_{vector}": f"parametrizations.weight.0._{vector}" for vector in "uv"}


def head_names(golden, prefix):
    """Names of the heads' tensors: there -> here."""
    names = {}
    for name in golden:
        if name.startswith(f"{prefix}heads."):
            _, level, rest = name.removeprefix(prefix).split(".", 2)
            part, tensor = rest.rsplit(".", 1)
            names[name] = f"heads.{level}.{HEAD_PARTS[part]}.{SPECTRAL.get(tensor, tensor)}"
    return names


@pytest.fixture
def converted(golden, tmp_path):
    """The vision model is read from a file with the names of those on the Hub, whatever transformers calls its layers."""
    vit = {
        "embeddings.cls_token": golden["weights.dino.cls_token"],
        "embeddings.position_embeddings": golden["weights.dino.pos_embed"],
    }
    for kind in ("weight", "bias"):
        vit[f"embeddings.patch_embeddings.projection.{kind}"] = golden[f"weights.dino.patch_embed.proj.{kind}"]
        for layer in range(8):
            published, original = f"encoder.layer.{layer}", f"weights.dino.blocks.{layer}"
            projections = golden[f"{original}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), projections, strict=True):
                vit[f"{published}.attention.attention.{name}.{kind}"] = part.clone()
            for name, part in {
                "attention.output.dense": "attn.proj",
                "layernorm_before": "norm1",
                "layernorm_after": "norm2",
                "intermediate.dense": "mlp.fc1",
                "output.dense": "mlp.fc2",
            }.items():
                vit[f"{published}.{name}.{kind}"] = golden[f"{original}.{part}.{kind}"]
        vit[f"layernorm.{kind}"] = torch.zeros(16)  # read by nobody
    tiny_vit().config.save_pretrained(tmp_path)
    save_file(vit, tmp_path / "model.safetensors", {"format": "pt"})
    model = DinoDiscriminator(load_dino(str(tmp_path)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    heads = {ours: golden[theirs] for theirs, ours in head_names(golden, "weights.").items()}
    heads = {name: tensor.reshape(shapes[name]) for name, tensor in heads.items()}
    missing, unexpected = model.load_state_dict(heads, strict=False)
    assert all(name.startswith("vision_model.") for name in missing)
    assert unexpected == []
    return model.eval()


def golden_images(golden):
    return golden["images"] / 127.5 - 1


@pytest.mark.parametrize("case", ["shrunk", "enlarged"])
def test_logits_and_image_gradients_are_the_originals(case, converted, golden, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.9)
    images = golden_images(golden)
    images = images if case == "shrunk" else images[:4, :, :24, :24]
    images.requires_grad_()
    logits = converted(images)
    torch.testing.assert_close(logits, golden[f"{case}.logits"], atol=2e-5, rtol=1e-4)
    adversarial_loss(logits).backward()
    torch.testing.assert_close(images.grad[:, :, ::4, ::4], golden[f"{case}.image_gradient"], atol=1e-7, rtol=1e-3)
    assert all(parameter.grad is None for parameter in converted.vision_model.parameters())


def test_discriminator_loss_and_gradient_norms_are_the_originals(converted, golden, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.9)
    images = golden_images(golden)
    out = DiscriminatorObjective(converted).eval()(images[4:12].flip(-1), images[:8])
    torch.testing.assert_close(out["discriminator"], golden["hinge_loss"])
    out["discriminator"].backward()
    gradients = {name: parameter.grad for name, parameter in converted.named_parameters()}
    names = head_names(golden, "gradient_norm.")
    assert len(names) == 5 * 10
    for theirs, ours in names.items():
        # A bias in front of a normalization has no gradient but rounding.
        assert gradients[ours].norm().item() == pytest.approx(golden[theirs].item(), rel=1e-3, abs=1e-6), ours


def test_size_of_the_heads():
    """7,386,245 trained parameters on the width of ViT-S, counted on the original."""
    vit = tiny_vit(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=8)
    trained = [p for p in DinoDiscriminator(vit).parameters() if p.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 7_386_245


def test_levels_are_the_quarters_of_the_depth():
    assert DinoDiscriminator(tiny_vit(num_hidden_layers=12)).levels == [0, 3, 6, 9, 12]


def test_half_of_the_calls_see_a_random_window(monkeypatch):
    model = DinoDiscriminator(tiny_vit())
    images = torch.randn(2, 3, 40, 48)
    monkeypatch.setattr(random, "random", lambda: 0.5)
    windows = [model._resize(images) for _ in range(20)]
    places = set()
    for window in windows:
        found = [
            (top, left)
            for top in range(9)
            for left in range(17)
            if torch.equal(window, images[..., top : top + 32, left : left + 32])
        ]
        places |= set(found)
        assert len(found) == 1
    assert len(places) > 5
    monkeypatch.setattr(random, "random", lambda: 0.51)
    torch.testing.assert_close(model._resize(images), F.adaptive_avg_pool2d(images, 32))
    # As large as the vision model or smaller: nothing to crop.
    monkeypatch.setattr(random, "random", lambda: 0.0)
    assert model._resize(torch.randn(1, 3, 24, 24)).shape == (1, 3, 32, 32)


def test_vision_model_stays_frozen_and_the_rest_trains():
    model = DinoDiscriminator(tiny_vit()).train()
    assert not model.vision_model.training
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    model(images).square().mean().backward()
    assert images.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("vision_model."), name


def test_local_batch_norm_groups_and_precision():
    norm, states = LocalBatchNorm(3), torch.randn(16, 3, 5) * 2 + 1
    normed = norm(states)
    for group in (slice(0, 8), slice(8, 16)):
        assert normed[group].mean((0, 2)).abs().max() < 1e-5
        torch.testing.assert_close(normed[group].var((0, 2), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        low = norm(states.bfloat16())
    assert low.dtype == torch.float32
    assert torch.equal(low, norm(states.bfloat16().float()))
    check_virtual_batches(5)
    check_virtual_batches(24)
    with pytest.raises(ValueError, match="--batch_size 9 does not split into 2"):
        check_virtual_batches(9)


def test_runs_in_mixed_precision():
    model, images = DinoDiscriminator(tiny_vit()).eval(), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = DiscriminatorObjective(model).train()(images, images.flip(0))
        loss = adversarial_loss(model(images))
    assert loss.dtype == logits["discriminator"].dtype == torch.float32
    # Two of some 80 logits of magnitude 1 in bf16; far from the difference to another image.
    torch.testing.assert_close(loss, adversarial_loss(model(images)), atol=0.05, rtol=0)


def test_weights_that_cannot_be_had_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download nobody/dino.*--discriminator_model"):
        load_dino("nobody/dino")
    tiny_vit(hidden_act="gelu", layer_norm_eps=1e-12).save_pretrained(tmp_path)
    model = load_dino(str(tmp_path))
    assert model.pooler is None
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_each_loss_moves_its_own_network():
    model, images = PatchDiscriminator(8, num_groups=2), torch.randn(2, 3, 16, 16, requires_grad=True)
    with frozen(list(model.parameters())):
        adversarial = adversarial_loss(model(images))
    adversarial.backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    images.grad = None
    out = DiscriminatorObjective(model)(images, torch.randn(2, 3, 16, 16))
    out["discriminator"].backward()
    assert images.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hinge_loss():
    constants = nn.Module()
    constants.forward = lambda images: images.mean((1, 2, 3))
    fake, real = torch.full((2, 3, 4, 4), -0.25), torch.full((2, 3, 4, 4), 3.0)
    out = DiscriminatorObjective(constants)(fake, real)
    assert out["discriminator"].item() == pytest.approx((0.75 + 0.0) / 2)
    assert (out["logits_fake"].item(), out["logits_real"].item()) == (-0.25, 3.0)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight, x = torch.randn(5, requires_grad=True), torch.randn(5)
    image_loss, adversarial = 3 * (weight * x).sum(), (0.5 * weight * x).sum()
    ratio = adaptive_weight(image_loss, adversarial, weight)
    assert ratio.item() == pytest.approx((3 * x.norm() / (0.5 * x.norm() + 1e-4)).item())
    assert not ratio.requires_grad
    (image_loss + ratio * adversarial).backward()
    assert adaptive_weight(3 * weight.sum(), 0 * weight.sum(), weight) == 1e4
