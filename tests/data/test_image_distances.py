"""LPIPS against the `lpips` package, on files of random weights: what a machine without network can check."""

import pickle
import urllib.error
from types import SimpleNamespace

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from vfmtok_hf.data.image_distances import BACKBONES, LPIPS, unit_difference, vision_perceptual_loss


@pytest.fixture(scope="module")
def vgg():
    """The convolutions of torchvision's VGG-16 with random weights."""
    with torch.device("meta"):
        layers = torchvision.models.vgg16().features
    layers.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return layers


@pytest.fixture(scope="module")
def vgg_file(vgg, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    state = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    # The real file is in torch's old format.
    torch.save({**state, "classifier.0.bias": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    return file


@pytest.fixture(scope="module")
def metric(vgg_file):
    return LPIPS("vgg", str(vgg_file))


@pytest.fixture(scope="module")
def package(vgg):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "vgg16", lambda pretrained: SimpleNamespace(features=vgg))
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture
def images():
    return (torch.rand(2, 3, 3, 40, 48) * 2 - 1).unbind()


def test_distance_and_gradient_are_those_of_the_package(metric, package, images):
    reconstruction, target = images
    results = []
    for distance in (metric.eval(), package):
        reconstruction.requires_grad_().grad = None
        result = distance(reconstruction, target).flatten()
        result.mean().backward()
        results.append((result.detach(), reconstruction.grad.clone()))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert ours.shape == (3,)
    assert ours.min() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    # Rounding of 13 convolutions, against gradients of up to 1e-4.
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-8, rtol=1e-3)
    assert metric(target, target).abs().max() == 0


def test_nothing_is_trained_and_the_target_gets_no_gradient(metric, images):
    reconstruction, target = (image.requires_grad_() for image in images)
    metric(reconstruction, target).sum().backward()
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_distances_are_float32_under_autocast(metric, images):
    """The convolutions run in bf16; from their outputs on everything is as exact as in float64."""
    stages = []
    handle = metric.network.net.register_forward_hook(lambda *args: stages.append(args[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        distance = metric.eval()(*images)
    handle.remove()
    assert distance.dtype == torch.float32
    assert all(stage.dtype == torch.bfloat16 for pair in stages for stage in pair)
    expected = 0.0
    for theirs, ours, layer in zip(*stages, metric.network.lins, strict=True):
        units = [stage.double() / stage.double().norm(dim=1, keepdim=True) for stage in (ours, theirs)]
        expected += ((units[0] - units[1]).square() * layer.model[1].weight[0]).sum(1).mean((1, 2))
    torch.testing.assert_close(distance.double(), expected, atol=0, rtol=1e-5)


def test_dropout_acts_in_training_only_and_keeps_the_mean(vgg_file, metric, images):
    noisy = LPIPS("vgg", str(vgg_file), dropout=0.5)
    images = [image[:1, :, :16, :16] for image in images]
    expected = metric(*images)
    assert torch.equal(noisy.eval()(*images), expected)
    noisy.train()
    draws = torch.stack([noisy(*images) for _ in range(20)])
    # The mean of 20 draws scatters by their deviation / 4.5.
    assert draws.std() > 0
    assert (draws.mean() - expected).abs() < draws.std()


def test_features_of_zeros_have_a_finite_gradient():
    dead = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_difference(dead, torch.ones(1, 4, 2, 2)).sum().backward()
    assert dead.grad.isfinite().all()


def test_vision_perceptual_loss_ignores_scale():
    features = [torch.randn(2, 4, 3, 3), torch.randn(2, 8, 2, 2)]
    assert vision_perceptual_loss(features, [3 * level for level in features]) < 1e-12
    assert vision_perceptual_loss(features, [-level for level in features]).item() == pytest.approx(4.0)


# -- where the weights come from


def test_weights_from_safetensors_and_from_torchs_cache(vgg, vgg_file, metric, images, tmp_path, monkeypatch, caplog):
    file = tmp_path / "vgg.safetensors"
    save_file({f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}, file)
    expected = metric.eval()(*images)
    assert torch.equal(LPIPS("vgg", str(file)).eval()(*images), expected)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / vgg_file.name).symlink_to(vgg_file)
    assert torch.equal(LPIPS().eval()(*images), expected)
    assert caplog.text == ""


@pytest.mark.parametrize("backbone", ["alex", "squeeze"])
def test_the_other_backbones_are_the_packages(backbone, images, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[backbone]()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(torchvision.models, model_name(backbone), lambda pretrained: model)
    package = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    monkeypatch.undo()
    # Larger than the fixture's: three poolings of AlexNet leave nothing of those.
    pair = [torch.nn.functional.interpolate(image, size=80) for image in images]
    ours = LPIPS(backbone, str(tmp_path / "weights.pth")).eval()(*pair)
    torch.testing.assert_close(ours, package(*pair).flatten(), atol=1e-6, rtol=1e-5)


def model_name(backbone):
    return {"alex": "alexnet", "squeeze": "squeezenet1_1"}[backbone]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_download_is_announced_and_its_failure_says_what_to_fetch(backbone, tmp_path, monkeypatch, caplog):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    url = BACKBONES[backbone].url
    with pytest.raises(FileNotFoundError, match=f"Download {url} .*checkpoints.*--vgg_weights"):
        LPIPS(backbone)
    assert f"downloading {url} to {tmp_path}" in caplog.text
    with pytest.raises(FileNotFoundError, match="The weights none.pth of LPIPS do not exist"):
        LPIPS("vgg", "none.pth")


def test_other_files_are_refused(tmp_path, vgg):
    wrong = tmp_path / "wrong.pth"
    torch.save({"features.0.weight": torch.zeros(2)}, wrong)
    with pytest.raises(ValueError, match=r"features.0.weight has shape \(2,\), expected shape \(64, 3, 3, 3\)"):
        LPIPS("vgg", str(wrong))
    torch.save({}, wrong)
    with pytest.raises(ValueError, match="features.0.weight is missing"):
        LPIPS("vgg", str(wrong))
    wrong.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged or contains more than tensors"):
        LPIPS("vgg", str(wrong))
    # A pickle that would run code.
    wrong.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(ValueError, match="damaged or contains more than tensors"):
        LPIPS("vgg", str(wrong))


def test_without_the_package_the_error_says_how_to_install_it(vgg_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lpips"):
        LPIPS("vgg", str(vgg_file))
