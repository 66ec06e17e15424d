"""Distances between feature sets, against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch

from vfmtok_hf.evaluation.features import Features
from vfmtok_hf.evaluation.metrics import (
    FeatureStatistics,
    Reference,
    check_enough_images,
    compare_features,
    frechet_distance,
    inception_score,
    precision_recall,
)


def random_features(images: int, channels: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(images, channels, generator=torch.Generator().manual_seed(seed)) + shift


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    """With commuting covariances the distance is |m1 - m2|^2 + sum (s1 - s2)^2."""
    means = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 1.0])
    deviations = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.1])
    sides = [FeatureStatistics(mean, np.diag(s**2)) for mean, s in zip(means, deviations, strict=True)]
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_rotated_gaussians_against_scipy():
    from scipy.linalg import sqrtm

    first, second = (
        FeatureStatistics.of(random_features(400, 6, seed) @ random_features(6, 6, seed + 9)) for seed in (1, 2)
    )
    root = sqrtm(first.covariance @ second.covariance).real
    expected = ((first.mean - second.mean) ** 2).sum() + np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_samples_approaches_that_of_their_distributions():
    """N(0, 1) against N(2, 1) in 4 channels: 16. The estimate's error is of the order 1 / sqrt(images)."""
    first, second = (
        FeatureStatistics.of(random_features(20_000, 4, seed, shift)) for seed, shift in ((1, 0.0), (2, 2.0))
    )
    assert frechet_distance(first, second) == pytest.approx(16, abs=0.3)


def test_frechet_distance_refuses_other_networks():
    sides = [FeatureStatistics.of(random_features(10, channels, 0)) for channels in (3, 4)]
    with pytest.raises(ValueError, match="3 and 4 channels"):
        frechet_distance(*sides)


def test_inception_score_of_known_predictions():
    """Certain and evenly spread over 4 classes: 4. Always the same prediction: 1."""
    labels = torch.arange(400) % 4
    certain = torch.nn.functional.one_hot(labels, 4).double() * 100
    assert inception_score(certain) == pytest.approx(4)
    assert inception_score(torch.zeros(40, 4)) == pytest.approx(1)


def test_inception_score_takes_tenths_in_order():
    """Each tenth has one class only, so that every tenth's score is 1, though all classes occur."""
    labels = torch.arange(100) // 10
    certain = torch.nn.functional.one_hot(labels, 10).double() * 100
    assert inception_score(certain) == pytest.approx(1)


def brute_force_coverage(points: torch.Tensor, manifold: torch.Tensor) -> float:
    """Share of points within the distance of some manifold point's third neighbor, by loops."""
    radii = [sorted(math.dist(a, b) for b in manifold.tolist())[3] for a in manifold.tolist()]
    inside = [
        any(math.dist(point, center) <= radius for center, radius in zip(manifold.tolist(), radii, strict=True))
        for point in points.tolist()
    ]
    return sum(inside) / len(inside)


def test_precision_and_recall_against_brute_force():
    generated, real = random_features(40, 3, 1, shift=0.7), 1.5 * random_features(60, 3, 2)
    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(brute_force_coverage(generated, real))
    assert recall == pytest.approx(brute_force_coverage(real, generated))
    assert precision != recall


def test_precision_and_recall_of_a_collapsed_generator():
    """All samples are one real image: each lies in the real manifold, and covers next to nothing of it."""
    real = random_features(50, 4, 1)
    assert precision_recall(real[:1].expand(20, -1), real) == (1.0, pytest.approx(1 / 50))


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_images_are_refused(count):
    features = random_features(count, 2, 0)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(features, random_features(50, 2, 1))
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(features)


def test_how_many_images_metrics_need_is_known_before_they_are_drawn():
    """Of each kind of reference and network the smallest number that is taken, and one less."""
    features = Features(random_features(50, 4, 1), random_features(50, 4, 2))
    with_images, alone = Reference.of(features), Reference.of(features)
    alone.pooled_features = None
    for reference, classifies, enough in ((with_images, False, 4), (with_images, True, 10), (alone, True, 10)):
        check_enough_images(enough, reference, classifies)
        with pytest.raises(ValueError, match="add images"):
            check_enough_images(enough - 1, reference, classifies)
    check_enough_images(2, alone, False)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least two images"):
        FeatureStatistics.of(random_features(1, 2, 0))


def test_singular_covariances_are_remarked_on():
    few = Features(random_features(20, 30, 1), random_features(20, 5, 1))
    _, remarks = compare_features(few, Reference.of(few))
    assert any("singular" in remark for remark in remarks)


def test_of_equal_sets_the_distance_is_zero_and_all_is_covered():
    features = Features(random_features(200, 6, 1), random_features(200, 8, 2), random_features(200, 3, 3))
    values, remarks = compare_features(features, Reference.of(features))
    assert values["fid"] == pytest.approx(0, abs=1e-6)
    assert values["sfid"] == pytest.approx(0, abs=1e-6)
    assert (values["precision"], values["recall"]) == (1, 1)
    assert set(values) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert any("biased" in remark for remark in remarks)


def test_a_reference_of_statistics_alone_gives_no_precision():
    features = Features(random_features(50, 4, 1), random_features(50, 4, 2))
    reference = Reference.of(features)
    reference.pooled_features = None
    values, remarks = compare_features(features, reference)
    assert set(values) == {"fid", "sfid"}
    assert any("precision" in remark for remark in remarks)
