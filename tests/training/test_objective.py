import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.testing import tiny_images, tiny_model
from vfmtok_hf.training.codebook import CodebookUsage, restart_dead_rows
from vfmtok_hf.training.objective import TokenizerObjective


WEIGHTS = {"l1": 0.5, "mse": 2.0, "lpips": 0.0, "perceptual": 0.7}
CONFIG_WEIGHTS = {
    "feature_loss_weight": 0.3,
    "codebook_loss_weight": 1.1,
    "commitment_loss_weight": 0.2,
    "entropy_loss_weight": 0.1,
}


def tiny_objective(train_encoder=True, model=None, **weights):
    config_weights = {name: weights.pop(name, weight) for name, weight in CONFIG_WEIGHTS.items()}
    model = model or tiny_model(decoder_dropout=0.0, **config_weights)
    return TokenizerObjective(model, WEIGHTS | weights, train_encoder).train()


def total(terms, weights):
    """The weighted sum; the model has weighted the quantizer's terms."""
    weights = {"feature": 0.3, "codebook": 1, "commitment": 1, "entropy": 1} | weights
    return sum(weights[name] * value.item() for name, value in terms.items())


def test_the_loss_is_the_weighted_sum_of_named_terms():
    objective, images = tiny_objective(), tiny_images()
    out = objective(images)
    terms = out["terms"]
    assert set(terms) == {"l1", "mse", "perceptual", "feature", "codebook", "commitment", "entropy"}
    assert out["loss"].item() == pytest.approx(total(terms, WEIGHTS))
    # What the model itself calls its loss is part of it.
    own = objective.model(images, return_loss=True).loss
    torch.testing.assert_close(out["loss"] - out["image_loss"], own)
    on_pixels = sum(WEIGHTS[name] * terms[name].item() for name in ("l1", "mse", "perceptual"))
    assert out["image_loss"].item() == pytest.approx(on_pixels)
    assert terms["mse"].item() == pytest.approx((out["reconstruction"] - images).square().mean().item())


def test_lpips_takes_part():
    model = tiny_model(**CONFIG_WEIGHTS)
    lpips = torch.nn.Module()
    lpips.forward = lambda reconstruction, target: (reconstruction - target).abs().amax((1, 2, 3))
    objective, images = TokenizerObjective(model, WEIGHTS | {"lpips": 3.0}, lpips=lpips), tiny_images()
    out = objective(images)
    expected = (out["reconstruction"] - images).abs().amax((1, 2, 3)).mean()
    torch.testing.assert_close(out["terms"]["lpips"], expected)
    assert out["loss"].item() == pytest.approx(total(out["terms"], WEIGHTS | {"lpips": 3.0}))


@pytest.mark.parametrize(
    ("options", "quantize"),
    [({}, True), ({}, False), ({"train_encoder": False}, True)]
    + [({name: 0.0}, True) for name in (*WEIGHTS, *CONFIG_WEIGHTS) if name != "lpips"]
    + [(dict.fromkeys((*CONFIG_WEIGHTS, "perceptual"), 0.0), True)],
)
def test_every_trainable_parameter_gets_a_gradient_whatever_is_off(options, quantize):
    """What DDP without a search for unused parameters needs; parameters that no term reaches are frozen."""
    objective = tiny_objective(**options)
    objective(tiny_images(), quantize)["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_terms_that_are_off_cost_nothing():
    objective = tiny_objective(perceptual=0.0, feature_loss_weight=0.0)
    passes = []
    objective.model.vision_model.register_forward_hook(lambda *args: passes.append("vision"))
    objective.model.vit_decoder.feature_head.register_forward_hook(lambda *args: passes.append("feature"))
    assert set(objective(tiny_images())["terms"]) == {"l1", "mse", "codebook", "commitment", "entropy"}
    assert passes == ["vision"]


def test_losses_are_float32_under_autocast():
    """From the bf16 outputs of the networks on, each term is what float64 gives."""
    objective, images, seen = tiny_objective(), tiny_images(8), {}
    model = objective.model
    for name in ("quant_proj", "pixel_decoder", "vit_decoder.feature_head"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.detach())
        )
    features = []
    extract = model.extract_vision_features
    model.extract_vision_features = lambda pixels: features.append(extract(pixels)) or features[-1]
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(images)
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}
    for value in (out["loss"], out["image_loss"], *out["terms"].values(), out["reconstruction"]):
        assert value.dtype == torch.float32

    latents = F.normalize(seen["quant_proj"].double(), dim=-1)
    rows = F.normalize(model.quantizer.codebook.weight.double(), dim=-1)
    distances, tokens = torch.cdist(latents, rows).square().min(-1)
    assert torch.equal(out["image_tokens"], tokens)
    reconstruction = seen["pixel_decoder"].double()
    target, ours = (
        features[0][-1].flatten(2).transpose(1, 2).double(),
        seen["vit_decoder.feature_head"].double(),
    )
    levels = [
        (F.normalize(a.double(), dim=1) - F.normalize(b.double(), dim=1)).square().sum(1).mean()
        for a, b in zip(features[1], features[0], strict=True)
    ]
    expected = {
        "l1": (reconstruction - images).abs().mean(),
        "mse": (reconstruction - images).square().mean(),
        "codebook": 1.1 * distances.mean() / 4,
        "commitment": 0.2 * distances.mean() / 4,
        "feature": 1 - F.cosine_similarity(ours, target, dim=-1).mean(),
        "perceptual": torch.stack(levels).mean(),
    }
    for name, value in expected.items():
        assert out["terms"][name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_graph_is_whole_and_gradients_are_those_of_eager_execution():
    """One graph without breaks is what torch.compile needs to be worth it; generating code is not the point here."""
    model = tiny_model(decoder_dropout=0.0, encoder_num_layers=1, decoder_num_layers=1, entropy_loss_weight=0.1)
    objective, images = tiny_objective(model=model), tiny_images()
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    gradients = []
    for function in (objective, compiled):
        objective.zero_grad()
        function(images)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in objective.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


class NothingReadBack(TorchDispatchMode):
    """Fails where a value leaves the device: `item`, a tensor in a condition, shapes that depend on values."""

    forbidden = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal.default", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.forbidden), func
        return func(*args, **(kwargs or {}))


def test_the_check_for_synchronization_finds_one():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingReadBack():
        torch.ones(()).item()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingReadBack():
        bool(torch.ones(()))


def test_a_step_and_its_codebook_statistics_read_nothing_back():
    objective, images = tiny_objective(), tiny_images()
    usage = CodebookUsage(64)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], fused=True)
    with NothingReadBack():
        for step in range(3):
            out = objective(images)
            out["loss"].backward()
            optimizer.step()
            usage.update(out["image_tokens"])
            codebook = objective.model.quantizer.codebook.weight.data
            restarted = restart_dead_rows(codebook, usage, out["latents"], patience=2, seed=step)
    assert restarted > 0
    assert 0 < usage.usage() < 1


def test_restarts_depend_on_the_seed_alone():
    """Processes that gathered the same tokens and latents replace the same rows by the same vectors."""
    codebooks, latents = [], torch.randn(2, 9, 4)
    for seed in (5, 5, 6):
        torch.manual_seed(len(codebooks))  # the processes' own random states differ
        usage, codebook = CodebookUsage(64), torch.zeros(64, 4)
        usage.update(torch.arange(18))
        restart_dead_rows(codebook, usage, latents, patience=1, seed=seed)
        codebooks.append(codebook)
    assert torch.equal(codebooks[0], codebooks[1])
    assert not torch.equal(codebooks[0], codebooks[2])
