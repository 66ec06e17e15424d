"""Layers that compute faster in training on CPUs: equal results, and everything else about them stays."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.cpu import training as cpu_training
from vfmtok_hf.cpu.training import WinogradConvolution, can_transform, pack_frozen_weights, use_winograd


@pytest.fixture
def linear():
    return nn.Linear(20, 30)


def test_frozen_products(linear, monkeypatch):
    inputs = torch.randn(2, 20)
    expected = linear(inputs)
    model = nn.Sequential(linear)
    with torch.autocast("cpu", torch.bfloat16):
        expected_half = model(inputs)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    pack_frozen_weights(model, torch.bfloat16)
    assert "forward" not in vars(linear)
    monkeypatch.undo()
    pack_frozen_weights(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    for module in (model, twin, pickle.loads(pickle.dumps(model))):  # noqa: S301
        torch.testing.assert_close(module(inputs), expected, rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(module(inputs), expected_half)
        assert module.state_dict().keys() == {"0.weight", "0.bias"}
    passing = inputs.clone().requires_grad_()
    model(passing).sum().backward()
    torch.testing.assert_close(passing.grad, linear.weight.sum(0).expand(2, -1))


needs_nnpack = pytest.mark.skipif(
    not torch.backends.nnpack.is_available(), reason="torch has no NNPACK here: x86 with AVX2 or ARM runs this"
)


@pytest.fixture
def always_winograd(monkeypatch):
    monkeypatch.setattr(cpu_training, "MIN_CHANNELS", 1)
    monkeypatch.setattr(cpu_training, "MIN_WORK", 1)


@needs_nnpack
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("size", [(6, 6), (37, 50), (64, 20)])
@pytest.mark.parametrize("channels", [(16, 16), (24, 7), (65, 128)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_convolutions(batch_size, size, channels, bias, always_winograd):
    layer = nn.Conv2d(*channels, 3, padding=1, bias=bias)
    images = torch.randn(batch_size, channels[0], *size)
    images = images.to(memory_format=torch.channels_last) if batch_size > 1 else images
    inputs = [images.requires_grad_(), *layer.parameters()]
    expected = F.conv2d(images.double(), *(parameter.double() for parameter in layer.parameters()), padding=1)
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)

    use_winograd(layer)
    assert isinstance(layer.forward, WinogradConvolution)
    outputs = layer(images)
    # The bound that the class states.
    assert (outputs - expected).abs().max() < 1e-4 * expected.std()
    gradients = torch.autograd.grad((outputs * weight).sum(), inputs)
    assert (gradients[0] - expected_gradients[0]).abs().max() < 1e-4 * expected_gradients[0].std()
    for gradient, plain in zip(gradients[1:], expected_gradients[1:], strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-3)


@needs_nnpack
def test_winograd_of_frozen_layers(always_winograd):
    layer, images = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), torch.randn(1, 8, 12, 12)
    expected, (gradient,) = gradients_of_images(layer, images)
    use_winograd(layer)
    outputs, (transformed,) = gradients_of_images(layer, images)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(transformed, gradient, rtol=0, atol=1e-4)


def gradients_of_images(layer: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    images = images.clone().requires_grad_()
    outputs = layer(images)
    return outputs, torch.autograd.grad(outputs.sum(), images)


@needs_nnpack
def test_winograd_layers_are_saved_and_copied_as_they_were(always_winograd):
    model, images = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 9, 9)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_winograd(model)
    assert model.state_dict().keys() == weights.keys()
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        nn.init.zeros_(model[0].weight)
        assert twin(images).equal(expected)
        model.load_state_dict(weights)


@needs_nnpack
def test_where_convolutions_stay_plain(monkeypatch):
    layer = nn.Conv2d(64, 64, 3, padding=1)
    small, double = torch.randn(1, 64, 20, 20), torch.randn(1, 64, 200, 200, dtype=torch.float64)
    large = double.float()
    expected, expected_large = layer(small), layer(large)
    with torch.autocast("cpu", torch.bfloat16):
        expected_half = layer(large)
    use_winograd(layer)
    assert layer(small).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(large).equal(expected_half)
    assert not layer(large).equal(expected_large)
    assert copy.deepcopy(layer).double()(double).dtype == torch.float64
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: False)
    other = nn.Conv2d(64, 64, 3, padding=1)
    use_winograd(other)
    assert "forward" not in vars(other)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"stride": 2}, False),
        ({"padding": 0}, False),
        ({"dilation": 2}, False),
        ({"groups": 2}, False),
        ({"padding_mode": "reflect"}, False),
        ({"kernel_size": 1}, False),
        ({"out_channels": 32}, False),
    ],
)
def test_kinds_of_convolutions(options, expected):
    layer = nn.Conv2d(**{"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1} | options)
    assert can_transform(layer) is expected
