"""What users call works on devices without float64, such as Apple's MPS, and on the CPU gives what it gave before."""

import pytest
import torch

from tests.limited_device import limited_device
from tests.modeling.generators import tiny_ar, tiny_rar
from tests.testing import tiny_images, tiny_model
from vfmtok_hf.modeling.generation_vfmtok import has_float64, sample_tokens, uniform_numbers


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


SETTINGS = [
    {"do_sample": False},
    {"temperature": 0.7, "top_k": 5},
    {"guidance_scale": 2.0, "guidance_interval": 3, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "top-k", "guided"])
@pytest.mark.parametrize("make_model", [tiny_ar, tiny_rar])
def test_generators(make_model, settings):
    """A CPU generator's numbers give the CPU's tokens, of which float32 sums change none here."""
    model = make_model()
    labels = torch.tensor([0, 3, 4])
    expected = model.generate(labels, generator=generators(), **settings)
    with limited_device(model) as device:
        tokens = model.generate(labels.to(device), generator=generators(), **settings)
        assert tokens.device == device
        assert torch.equal(tokens.cpu(), expected)
        drawn_there = model.generate(labels.to(device), **settings).cpu()
    assert ((drawn_there >= 0) & (drawn_there < 32)).all()


def test_inpainting_in_a_given_order():
    model = tiny_rar()
    labels, tokens = torch.tensor([0, 3, 4]), torch.arange(27).view(3, 9)
    keep_mask, orders = torch.arange(9) < 4, torch.arange(9).flip(0)
    expected = model.generate(labels, image_tokens=tokens, keep_mask=keep_mask, orders=orders, generator=generators())
    with limited_device(model) as device:
        inputs = {"image_tokens": tokens, "keep_mask": keep_mask, "orders": orders}
        inputs = {name: value.to(device) for name, value in inputs.items()}
        redrawn = model.generate(labels.to(device), generator=generators(), **inputs)
        assert torch.equal(redrawn.cpu(), expected)


@pytest.mark.parametrize("make_model", [tiny_ar, tiny_rar])
def test_losses_of_generators(make_model):
    model = make_model()
    labels, tokens = torch.tensor([0, 3]), torch.arange(18).view(2, 9)
    expected = model(labels, tokens, return_loss=True).loss
    with limited_device(model) as device:
        loss = model(labels.to(device), tokens.to(device), return_loss=True).loss
        torch.testing.assert_close(loss.cpu(), expected)


def test_tokenizer():
    model = tiny_model()
    images = tiny_images(2, size=40)
    expected = model(images, return_loss=True)
    with limited_device(model) as device:
        output = model(images.to(device), return_loss=True)
        assert torch.equal(output.image_tokens.cpu(), expected.image_tokens)
        torch.testing.assert_close(output.loss.cpu(), expected.loss)
        decoded = model.decode(output.image_tokens, output_features=True)
        torch.testing.assert_close(decoded.image_embeds.cpu(), expected.pooler_output, rtol=1e-4, atol=1e-5)
        assert model.get_image_features(images.to(device)).shape == (2, 32)


def test_precision_of_uniform_numbers():
    cpu = uniform_numbers(2, 3, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert cpu.dtype == torch.float64
    with limited_device() as device:
        assert not has_float64(device)
        numbers = uniform_numbers(2, 3, torch.Generator().manual_seed(0), device)
        assert numbers.device == device
        assert torch.equal(numbers.cpu(), cpu.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rounding_draws_a_token_without_probability(dtype):
    """The largest numbers are 1 once they are float32, and times the total of the probabilities in float64."""
    logits = torch.randn(2000, 50).masked_fill(torch.arange(50) >= 40, -torch.inf)
    largest = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    assert sample_tokens(logits, largest.to(dtype).expand(2000)).max() < 40
