"""The training steps that benchmarks compare have the same loss, so that the comparison is one of speed alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import ViTConfig

from tests.modeling.generators import tiny_ar, tiny_batch, tiny_rar
from tests.testing import tiny_config, tiny_images, tiny_model
from vfmtok_hf.data.image_distances import LPIPS
from vfmtok_hf.data.token_sets import encode_sequences
from vfmtok_hf.training.objective import TokenizerObjective


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
JUDGE = ViTConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


class Distance(torch.nn.Module):
    """Stands for LPIPS."""

    def forward(self, reconstruction, target):
        return (reconstruction - target).abs().mean((1, 2, 3))


def test_tokenizer_losses_and_gradients_are_equal():
    from original_training import OriginalTokenizerStep
    from training_step import WEIGHTS, random_discriminator

    model, images = tiny_model(decoder_dropout=0.0).train(), tiny_images()
    original = OriginalTokenizerStep(model, Distance(), random_discriminator(JUDGE), autocast=False)
    expected, reconstruction = original.loss(images)
    expected.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model.zero_grad()
    out = TokenizerObjective(model, WEIGHTS, lpips=Distance())(images)
    out["loss"].backward()
    torch.testing.assert_close(out["reconstruction"], reconstruction)
    torch.testing.assert_close(out["loss"], expected)
    for name, gradient in gradients.items():
        # The term of weight 0 adds exact zeros; the passes sum in another order.
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


@torch.no_grad()
def test_distances_are_equal(tmp_path):
    from original_training import OriginalLPIPS
    from training_step import RandomLPIPS

    metric, images = RandomLPIPS(dropout=0.0), torch.rand(2, 1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(OriginalLPIPS(metric)(*images), metric(*images))

    weights = {f"features.{name}": tensor for name, tensor in metric.network.layers.state_dict().items()}
    save_file(weights, tmp_path / "vgg.safetensors")
    of_the_package = LPIPS("vgg", str(tmp_path / "vgg.safetensors"))
    for ours, theirs in zip(metric.network.lins, of_the_package.network.lins, strict=True):
        ours[1].weight.copy_(theirs.model[1].weight)
    torch.testing.assert_close(metric(*images), of_the_package(*images))


def test_second_nearest_tokens_are_equal():
    from original_training import nearest_two_tokens

    model, images = tiny_model(), tiny_images()
    expected = encode_sequences(model, images, codebook_top_k=2).flatten(0, 1)
    assert nearest_two_tokens(model, images).equal(expected)


def test_next_token_losses_are_equal():
    from original_training import OriginalARStep

    model = tiny_ar(class_dropout=0.0, token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0).train()
    labels, tokens = tiny_batch(model)
    expected = OriginalARStep(model, autocast=False).loss(labels, tokens)
    torch.testing.assert_close(model(labels, tokens, return_loss=True).loss, expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["ar", "rar"])
def test_generator_steps_train(kind, autocast):
    import training_step

    config = {"ar": tiny_ar, "rar": tiny_rar}[kind]().config
    for side in training_step.SIDES[f"{kind.upper()}-B"]:
        tokenizer = tiny_config(num_anchors=config.num_image_tokens, codebook_size=config.codebook_size)
        step = training_step.generator_step(side, autocast, 2, config, tokenizer, "cpu")
        step()
        step()


@pytest.mark.parametrize("side", ["straightforward", "ours"])
def test_tokenizer_steps_train(side, monkeypatch):
    import training_step

    monkeypatch.setattr(training_step, "RandomLPIPS", lambda dropout: Distance())
    monkeypatch.setattr(training_step, "OriginalLPIPS", lambda distance: distance)
    step = training_step.tokenizer_step(side, True, 2, tiny_config(), JUDGE, "cpu")
    step()
    step()
