"""
Distances between sets of features: FID, sFID, inception score, precision and recall.

torch-fidelity computes them, in agreement with ADM's evaluator (`evaluations/evaluator.py` of guided-diffusion). This module
checks the inputs and adds remarks about the results.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vfmtok_hf.evaluation.features import Features


INCEPTION_SCORE_SPLITS = 10
NEIGHBORS = 3
PAPER_NUM_IMAGES = 50_000


@dataclass
class FeatureStatistics:
    """Mean `(channels,)` and covariance `(channels, channels)` of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStatistics":
        """
        Args:
            features (`torch.Tensor` of shape `(images, channels)`).

        Raises:
            ValueError: there are fewer than two images.
        """
        if len(features) < 2:
            raise ValueError(
                f"A Fréchet distance needs at least two images on each side, got {len(features)}: add images."
            )
        values = features.double().numpy()
        return cls(values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False)))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """
    Squared Fréchet distance between Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017). FID on
    pooled features, sFID (Nash et al. 2021) on spatial ones.

    Raises:
        ValueError: the numbers of channels differ.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"The features have {len(first.mean)} and {len(second.mean)} channels: they come from different networks or "
            "image sizes."
        )
    statistics = [{"mu": side.mean, "sigma": side.covariance} for side in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: torch.Tensor) -> float:
    """
    exp of the mean KL divergence between an image's class probabilities and their average, in [1, classes]; the mean over
    ten consecutive tenths of the images (5000 each in the paper), as in ADM's evaluator.

    Args:
        logits (`torch.Tensor` of shape `(images, classes)`).

    Raises:
        ValueError: fewer than ten images.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    check_enough_splits(len(logits))
    return isc_features_to_metric(logits, INCEPTION_SCORE_SPLITS, shuffle=False)[KEY_METRIC_ISC_MEAN]


def precision_recall(features: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """
    Share of images inside the reference's manifold, and of reference images inside the images' manifold; the manifold of
    a set is the union of balls that reach to each point's third neighbor (Kynkäänniemi et al. 2019).

    Args:
        features, reference (`torch.Tensor` of shape `(images, channels)`).

    Raises:
        ValueError: a side has three images or fewer.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    check_enough_neighbors(min(len(features), len(reference)))
    # Distances are computed by a matmul, where float32 is not precise enough for near neighbors.
    return calculate_precision_recall_part(features.double(), reference.double(), NEIGHBORS)


@dataclass
class Reference:
    """
    The reference of a comparison: features, or only statistics, as in some of ADM's `.npz` files.

    Args:
        pooled, spatial (`FeatureStatistics`): for FID and sFID.
        pooled_features (`torch.Tensor` of shape `(images, channels)`, *optional*): for precision and recall.
        num_images (`int`, *optional*): number of images of the statistics, if known.
    """

    pooled: FeatureStatistics
    spatial: FeatureStatistics
    pooled_features: torch.Tensor | None = None
    num_images: int | None = None

    @classmethod
    def of(cls, features: Features) -> "Reference":
        pooled, spatial = (FeatureStatistics.of(part) for part in (features.pooled, features.spatial))
        return cls(pooled, spatial, features.pooled, len(features))


def compare_features(features: Features, reference: Reference) -> tuple[dict[str, float], list[str]]:
    """
    Compute every distance that the features support.

    Returns:
        Values by name, `fid`, `sfid`, `inception_score` (only with a classifier's logits), `precision` and `recall` (only
        with the reference's features); and remarks about their limitations.
    """
    values = {
        "fid": frechet_distance(FeatureStatistics.of(features.pooled), reference.pooled),
        "sfid": frechet_distance(FeatureStatistics.of(features.spatial), reference.spatial),
    }
    remarks = []
    if features.logits is not None:
        values["inception_score"] = inception_score(features.logits)
    else:
        remarks.append("No inception score: the feature network is not a classifier.")
    if reference.pooled_features is not None:
        values["precision"], values["recall"] = precision_recall(features.pooled, reference.pooled_features)
    else:
        remarks.append("No precision and recall: the reference contains statistics without images.")
    return values, remarks + sample_size_remarks(len(features), reference)


def check_enough_neighbors(num_images: int) -> None:
    """
    Raises:
        ValueError: too few images on a side for precision and recall.
    """
    if num_images <= NEIGHBORS:
        raise ValueError(
            f"Precision and recall need more than {NEIGHBORS} images on each side, got {num_images}: add images."
        )


def check_enough_splits(num_images: int) -> None:
    """
    Raises:
        ValueError: too few images for an inception score.
    """
    if num_images < INCEPTION_SCORE_SPLITS:
        raise ValueError(
            f"An inception score needs at least {INCEPTION_SCORE_SPLITS} images, got {num_images}: add images, or choose "
            "a feature network that is not a classifier."
        )


def check_enough_images(num_images: int, reference: Reference, classifies: bool) -> None:
    """
    Check in advance that there are enough images for `compare_features`.

    Args:
        classifies (`bool`): whether their features will have logits.

    Raises:
        ValueError: there are too few images for one of the metrics.
    """
    if reference.pooled_features is not None:
        check_enough_neighbors(min(num_images, len(reference.pooled_features)))
    if classifies:
        check_enough_splits(num_images)


def sample_size_remarks(num_images: int, reference: Reference) -> list[str]:
    """Remarks about too few images."""
    remarks = []
    channels = max(len(reference.pooled.mean), len(reference.spatial.mean))
    counts = [count for count in (num_images, reference.num_images) if count is not None]
    if min(counts) <= channels:
        remarks.append(
            f"{min(counts)} images in up to {channels} channels: the covariances are singular, and FID and sFID are far "
            "too high. Compare them only with values of the same number of images."
        )
    elif min(counts) < PAPER_NUM_IMAGES:
        remarks.append(
            f"FID and sFID of {min(counts)} images are biased upwards and not comparable with those of "
            f"{PAPER_NUM_IMAGES}, which papers report."
        )
    return remarks
