"""Reconstruction metrics."""

import lpips
import numpy as np
import pytest
import torch
import torchvision

from tests.evaluation.folders import write_images
from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.data import image_distances
from vfmtok_hf.evaluation.features import OwnVisionFeatures
from vfmtok_hf.evaluation.reconstruction import evaluate_reconstruction, load_lpips, psnr, ssim


def test_psnr_of_a_known_error():
    originals = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    reconstructions = originals.clone()
    reconstructions[0] += 10
    decibels = psnr(originals, reconstructions)
    torch.testing.assert_close(decibels[0], torch.tensor(28.130803608679102, dtype=torch.float64))  # 20 lg 25.5
    assert decibels[1] == torch.inf


def test_psnr_does_not_wrap_around_at_eight_bits():
    black, white = (torch.full((1, 3, 2, 2), level, dtype=torch.uint8) for level in (0, 255))
    assert psnr(black, white) == psnr(white, black) == 0


def images_and_noisy_copies(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    originals = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    noise = torch.randint(-30, 31, originals.shape)
    return originals, (originals + noise).clamp(0, 255).to(torch.uint8)


def brute_force_ssim(
    first: np.ndarray, second: np.ndarray, window: np.ndarray, data_range: float, sample: bool
) -> float:
    """Mean over channels and whole windows of the formula of Wang et al. 2004, by loops."""
    side = len(window)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    correction = window.size / (window.size - 1) if sample else 1.0
    values = []
    for x, y in zip(first, second, strict=True):
        for top in range(x.shape[0] - side + 1):
            for left in range(x.shape[1] - side + 1):
                a, b = (image[top : top + side, left : left + side] for image in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b, cov = (
                    correction * ((window * p * q).sum() - m * n)
                    for p, q, m, n in ((a, a, mean_a, mean_a), (b, b, mean_b, mean_b), (a, b, mean_a, mean_b))
                )
                values.append(
                    (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return float(np.mean(values))


def test_ssim_conventions_against_brute_force():
    originals, copies = images_and_noisy_copies()
    uniform = np.full((7, 7), 1 / 49)
    ramp = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    gaussian = np.outer(ramp, ramp) / ramp.sum() ** 2
    for convention, window, data_range, sample in (
        ("original", uniform, 2.0, True),
        ("standard", gaussian, 1.0, False),
    ):
        values = ssim(originals, copies, convention)
        for value, first, second in zip(values, originals.numpy() / 255, copies.numpy() / 255, strict=True):
            assert value.item() == pytest.approx(brute_force_ssim(first, second, window, data_range, sample), abs=1e-9)


def test_the_originals_convention_flatters():
    originals, copies = images_and_noisy_copies()
    assert (ssim(originals, copies, "original") > ssim(originals, copies, "standard")).all()
    assert ssim(originals, originals).tolist() == [1, 1]


def test_images_smaller_than_ssims_window_are_refused():
    originals, copies = images_and_noisy_copies(11)
    assert ssim(originals, copies, "standard").isfinite().all()
    for size, convention in ((10, "standard"), (6, "original")):
        with pytest.raises(ValueError, match=f"window of .* got {size}"):
            ssim(*images_and_noisy_copies(size), convention)


def test_lpips_is_that_of_its_authors_on_8_bit_images(monkeypatch):
    """On one random AlexNet, as the trained one is a download."""
    network = torchvision.models.alexnet(weights=None)
    monkeypatch.setattr(image_distances, "_cached_weights", lambda _: network.state_dict())
    monkeypatch.setattr(lpips.pretrained_networks.tv, "alexnet", lambda **_: network)
    distance = load_lpips("alex")
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    originals, copies = images_and_noisy_copies(64)
    with torch.no_grad():
        expected = reference(originals.float() / 127.5 - 1, copies.float() / 127.5 - 1).flatten()
    torch.testing.assert_close(distance(originals, copies).float(), expected)
    assert expected.min() > 0
    assert distance(originals, originals).abs().max() < 1e-7


def test_evaluate_reconstruction_follows_the_protocol(tmp_path):
    pipe = tiny_pipeline()
    files = write_images(tmp_path, 5, size=(40, 36))
    done = []
    result = evaluate_reconstruction(
        pipe, files, OwnVisionFeatures(pipe.vq_model), size=24, batch_size=2, progress_callback=done.append
    )
    assert done == [2, 2, 1]
    assert set(result.values) == {
        "psnr", "ssim", "rfid", "rsfid", "precision", "recall", "codebook_usage", "codebook_perplexity"
    }  # fmt: skip
    assert result.protocol["resize"] == "reconstruction"
    # By hand: 8 bits at the model's size, then PIL's bicubic, on both sides.
    pixel_values = pipe.image_processor(files, return_tensors="pt")["pixel_values"]
    sides = [
        pipe.image_processor.postprocess(images, "uint8", 24, "reconstruction")
        for images in (pixel_values, pipe.vq_model(pixel_values).reconstruction)
    ]
    assert result.values["psnr"] == pytest.approx(psnr(*sides).mean().item(), rel=1e-6)
    tokens = pipe.tokenize(files)
    assert result.values["codebook_usage"] == len(tokens.unique()) / 64
    other = evaluate_reconstruction(pipe, files, size=24, resize_mode="generation")
    assert other.values["psnr"] != result.values["psnr"]
    assert "rfid" not in other.values


@pytest.mark.parametrize(("side", "call"), [("originals", 1), ("reconstructions", 2)])
def test_features_that_are_not_finite_are_refused_on_both_sides(tmp_path, side, call):
    pipe = tiny_pipeline()
    extractor = OwnVisionFeatures(pipe.vq_model)
    calls = []

    def broken(images):
        features = extractor(images)
        calls.append(images)
        if len(calls) == call:
            features.pooled[0, 0] = torch.nan
        return features

    with pytest.raises(ValueError, match=f"Of the {side}, images 1 to 2 have features that are NaN"):
        evaluate_reconstruction(pipe, write_images(tmp_path, 2), broken)


def test_a_damaged_file_is_named(tmp_path):
    files = write_images(tmp_path, 2)
    files[1].write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"001\.png"):
        evaluate_reconstruction(tiny_pipeline(), files)
