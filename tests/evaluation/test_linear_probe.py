"""Linear probes, on representations whose accuracy is known and on small folders."""

import pytest
import torch

from tests.evaluation.folders import write_color_classes, write_images
from tests.testing import tiny_model
from vfmtok_hf.evaluation.linear_probe import (
    LabeledImages,
    ProbeSettings,
    evaluate_linear_probe,
    represent,
    train_linear_probe,
)


def test_classes_far_apart_are_told_apart():
    labels = torch.arange(200) % 4
    centers = torch.randn(4, 16) * 5
    values = centers[labels] + torch.randn(2, 200, 16)
    result = train_linear_probe(values, labels, centers[labels] + torch.randn(200, 16), labels, ProbeSettings())
    assert result.top1 > 0.95
    assert result.channels == 16


def test_noise_stays_at_chance():
    labels = torch.arange(400) % 4
    settings = ProbeSettings(epochs=20, warmup_epochs=2)
    result = train_linear_probe(torch.randn(2, 400, 16), labels, torch.randn(400, 16), labels, settings)
    assert result.top1 == pytest.approx(0.25, abs=0.1)


def test_small_classes_count_as_much_in_the_mean_over_classes():
    """A probe that always answers class 0: right on 90 of 100 images, and on one class of two."""
    train_labels = torch.tensor([0] * 199 + [1])
    test_labels = torch.tensor([0] * 90 + [1] * 10)
    settings = ProbeSettings(epochs=20, warmup_epochs=2)
    result = train_linear_probe(torch.zeros(1, 200, 3), train_labels, torch.zeros(100, 3), test_labels, settings)
    assert result.top1 == pytest.approx(0.9)
    assert result.mean_class_accuracy == pytest.approx(0.5)


def test_probes_of_a_tokenizer_on_folders(tmp_path):
    """Raw pixels tell red, green and blue apart."""
    model = tiny_model()
    train, test = (
        LabeledImages.open(write_color_classes(tmp_path / name, count, seed))
        for name, count, seed in (("a", 40, 0), ("b", 4, 1))
    )
    done = []
    settings = ProbeSettings(epochs=20, warmup_epochs=2, views=2)
    results = evaluate_linear_probe(model, train, test, settings, batch_size=32, progress_callback=done.append)
    assert set(results) == {"image_embeds", "token_embeddings", "vision_model", "pixels"}
    assert results["pixels"].top1 == 1
    assert results["image_embeds"].channels == 32
    assert results["token_embeddings"].channels == 9 * 4
    assert sum(done) == 2 * 120 + 12


def test_what_is_probed_is_what_the_model_gives():
    model = tiny_model()
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    found = represent(model, pixel_values)
    with torch.no_grad():
        torch.testing.assert_close(found["image_embeds"], model.get_image_features(pixel_values))
        torch.testing.assert_close(found["token_embeddings"], model.encode(pixel_values).quantized_latents.flatten(1))


def test_views_are_augmentations_that_repeat(tmp_path):
    images = LabeledImages.open(write_color_classes(tmp_path / "train", 2, 0))
    first, again, other = (next(images.batches(16, 6, view)) for view in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (6, 3, 16, 16)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    train = LabeledImages.open(write_color_classes(tmp_path / "train", 2, 0))
    write_images(tmp_path / "test" / "cat", 2)
    write_images(tmp_path / "test" / "dog", 2)
    with pytest.raises(ValueError, match="different classes: blue, cat, dog, green, red"):
        LabeledImages.open(tmp_path / "test").labels_as_in(train)
    with pytest.raises(ValueError, match="at least 20 training images.*got 6"):
        evaluate_linear_probe(tiny_model(), train, train)
    write_images(tmp_path / "flat", 2)
    with pytest.raises(ValueError, match="one folder of images per class"):
        LabeledImages.open(tmp_path / "flat")
    write_images(tmp_path / "one" / "cat", 1)
    with pytest.raises(ValueError, match="one class only"):
        LabeledImages.open(tmp_path / "one")
