"""Samples for evaluation: balanced, resumable, the same whoever draws them; and references that do not fit."""

import json

import numpy as np
import pytest
import torch

from tests.evaluation.folders import write_images
from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.data.image_sets import FolderImages
from vfmtok_hf.evaluation.features import Features, OwnVisionFeatures
from vfmtok_hf.evaluation.generation import (
    SampleFolder,
    SampleFolderSettings,
    balanced_labels,
    check_sampling,
    evaluate_generation,
    generate_samples,
    load_reference,
    model_fingerprint,
    write_samples_npz,
)


SETTINGS = {"num_samples": 11, "seed": 3, "chunk_size": 4}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipeline()


def sample_folder(folder, pipe, **settings) -> SampleFolder:
    return SampleFolder(
        folder,
        SampleFolderSettings(**{**SETTINGS, **settings}),
        pipe.transformer.config.num_classes,
        model_fingerprint(pipe),
    )


def pixels(samples: SampleFolder) -> torch.Tensor:
    return torch.cat(list(samples.batches(16)))


def test_labels_are_balanced():
    counts = balanced_labels(50_000, 1000).bincount()
    assert counts.tolist() == [50] * 1000
    assert balanced_labels(11, 5).bincount().tolist() == [3, 2, 2, 2, 2]


def test_a_run_cut_off_anywhere_is_continued_to_the_same_samples(pipe, tmp_path):
    whole = sample_folder(tmp_path / "whole", pipe)
    generate_samples(pipe, whole)

    def die(count):
        raise KeyboardInterrupt

    cut = sample_folder(tmp_path / "cut", pipe)
    with pytest.raises(KeyboardInterrupt):
        generate_samples(pipe, cut, progress_callback=die)
    assert cut.missing() == [1, 2]
    drawn = []
    continued = sample_folder(tmp_path / "cut", pipe)
    generate_samples(pipe, continued, progress_callback=drawn.append)
    assert drawn == [4, 3]
    assert torch.equal(pixels(continued), pixels(whole))


def test_processes_share_the_work_without_overlap(pipe, tmp_path):
    alone, shared = (sample_folder(tmp_path / name, pipe) for name in ("alone", "shared"))
    generate_samples(pipe, alone)
    counts = []
    for process_index in range(2):  # the second looks at the folder when the first is done
        generate_samples(pipe, shared, process_index, 2, progress_callback=counts.append)
    assert counts == [4, 3, 4]
    assert torch.equal(pixels(shared), pixels(alone))


def test_sample_i_is_drawn_from_its_own_seed(pipe, tmp_path):
    """Two chunk sizes give the same tokens, so that pixels differ by rounding at most."""
    folders = [sample_folder(tmp_path / str(size), pipe, chunk_size=size) for size in (3, 11)]
    for folder in folders:
        generate_samples(pipe, folder)
    first, second = map(pixels, folders)
    assert (first.int() - second.int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in first}) == 11


def test_samples_of_other_settings_are_not_mixed(pipe, tmp_path):
    folder = tmp_path / "samples"
    first, late = sample_folder(folder, pipe), sample_folder(folder, pipe, guidance_scale=2.0)
    assert not folder.exists()  # before the first sample nothing binds later runs
    first.write_settings()
    with pytest.raises(ValueError, match=r"guidance_scale 1\.0 instead of 2\.0"):
        sample_folder(folder, pipe, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale 1\.0 instead of 2\.0"):
        generate_samples(pipe, late)
    other = tiny_pipeline()
    with torch.no_grad():
        other.transformer.lm_head.weight.add_(1)
    with pytest.raises(ValueError, match="model"):
        sample_folder(folder, other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale_pow": 2.0}, "only for RAR generators"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_settings_that_the_generator_does_not_take_are_refused_without_drawing(pipe, setting, message):
    check_sampling(pipe, SampleFolderSettings(**SETTINGS))
    check_sampling(tiny_pipeline("rar"), SampleFolderSettings(guidance_scale=2.0, guidance_scale_pow=2.0))
    with pytest.raises(ValueError, match=message):
        check_sampling(pipe, SampleFolderSettings(**SETTINGS, **setting))


def test_npz_of_samples(pipe, tmp_path):
    samples = sample_folder(tmp_path / "samples", pipe, num_samples=6, size=16)
    generate_samples(pipe, samples)
    write_samples_npz(samples, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (6, 16, 16, 3)
        assert np.array_equal(archive["arr_0"], pixels(samples).permute(0, 2, 3, 1).numpy())
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 4, 0]


def test_evaluate_generation(pipe, tmp_path):
    samples = sample_folder(tmp_path / "samples", pipe)
    generate_samples(pipe, samples)
    write_images(tmp_path / "real", 12)
    extractor = OwnVisionFeatures(pipe.vq_model)
    reference = load_reference(FolderImages([tmp_path / "real"]), extractor)
    result = evaluate_generation(samples, reference, extractor, vars(samples.settings))
    assert result.num_samples == 11
    assert set(result.values) == {"fid", "sfid", "precision", "recall"}
    assert result.values["fid"] > 0
    assert result.protocol["guidance_scale"] == 1.0
    assert result.protocol["features"] == extractor.name
    json.dumps(result.protocol)


class NamedExtractor:
    """Mean colors, under any name."""

    def __init__(self, name):
        self.name = name

    def __call__(self, images):
        means = images.double().flatten(2).mean(-1)
        return Features(means, means[:, :2])


def statistics_npz(path, **more):
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.ones(2), sigma_s=np.eye(2), **more)
    return path


def test_stored_statistics_are_taken_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    reference = load_reference(statistics_npz(tmp_path / "full.npz", arr_0=images), NamedExtractor("inception"))
    assert reference.spatial.mean.tolist() == [1, 1]
    assert reference.pooled_features.shape == (8, 3)
    alone = load_reference(statistics_npz(tmp_path / "alone.npz"), NamedExtractor("inception"))
    assert alone.pooled_features is None
    np.savez(tmp_path / "images.npz", images)
    of_images = load_reference(tmp_path / "images.npz", NamedExtractor("any"))
    assert of_images.num_images == 8


def test_statistics_of_another_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="statistics of Inception"):
        load_reference(statistics_npz(tmp_path / "statistics.npz"), NamedExtractor("dinov2"))
    np.savez(tmp_path / "nothing.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="neither images"):
        load_reference(tmp_path / "nothing.npz", NamedExtractor("inception"))


def test_a_reference_of_another_size_is_refused(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((5, 4, 6, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"6 x 4 pixels, but the samples have 4 x 4"):
        load_reference(tmp_path / "images.npz", NamedExtractor("any"), size=4)


def test_a_reference_file_that_cannot_be_used_is_refused(tmp_path):
    """Text, and half of a download."""
    whole = statistics_npz(tmp_path / "whole.npz").read_bytes()
    for name, content in (("text", b"hello"), ("half", whole[: len(whole) // 2])):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npz is not a \.npz file, or is truncated"):
            load_reference(path, NamedExtractor("inception"))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3), mu_s=np.ones(2), sigma_s=np.eye(2))
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_reference(tmp_path / "nan.npz", NamedExtractor("inception"))
