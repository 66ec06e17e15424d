"""
Generate the samples that generators are measured by, and measure them.

Sample i has label i modulo the number of classes and a random generator of its own, seeded seed + i. Samples are written
in chunks, whole or not at all, so that a run cut off is continued by running it again: what is there is kept, what is
missing is generated, by any number of processes, and the result is the same.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vfmtok_hf.data.fingerprints import weights_sha256
from vfmtok_hf.data.image_sets import ImageSet, NpzImages, write_npz
from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.evaluation.features import FeatureExtractor, ProgressCallback, extract_features
from vfmtok_hf.evaluation.metrics import FeatureStatistics, Reference, compare_features
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.pipelines import VFMTokPipeline


@dataclass
class SampleFolderSettings:
    """
    Args:
        num_samples (`int`): a multiple of the number of classes gives each class equally many.
        seed (`int`): sample i is generated from seed + i.
        guidance_scale (`float`): 1 is none.
        guidance_scale_pow (`float`, *optional*): of a RAR generator.
        temperature, top_k, top_p: left out they come from the generator's `generation_config`.
        size (`int`, *optional*): side of the images in pixels. Default: the tokenizer's.
        resize_mode (`str`): how they get there.
        chunk_size (`int`): samples generated at once and kept in one file.
    """

    num_samples: int = 50_000
    seed: int = 0
    guidance_scale: float = 1.0
    guidance_scale_pow: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    size: int | None = None
    resize_mode: Literal["generation", "reconstruction"] = "generation"
    chunk_size: int = 64

    @property
    def sampling(self) -> dict[str, float]:
        """The settings that the generator's `generate` takes."""
        names = ("guidance_scale", "guidance_scale_pow", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def check_sampling(pipe: VFMTokPipeline, settings: SampleFolderSettings) -> None:
    """
    Check the settings before anything is generated.

    Raises:
        ValueError: the generator does not take them.
    """
    if settings.guidance_scale_pow is not None and not isinstance(pipe.transformer, VFMTokRARForImageGeneration):
        raise ValueError("guidance_scale_pow is a setting of RAR generators alone: leave it out.")
    pipe.transformer.sampling_settings.resolve(settings.sampling, pipe.transformer.generation_config)


def balanced_labels(num_samples: int, num_classes: int) -> torch.Tensor:
    """`(num_samples,)` int64: classes in turn, so that their numbers differ by one at most."""
    return torch.arange(num_samples) % num_classes


def model_fingerprint(pipe: VFMTokPipeline) -> str:
    """Changes with any weight of the generator or the tokenizer's decoder side."""
    return weights_sha256(pipe.transformer, pipe.vq_model, skip=("vision_model.",))


class SampleFolder:
    """
    The samples of one setting, in chunks of `settings.chunk_size`. It is an `ImageSet` once it is complete.

    Args:
        folder (`Path`): made when the first sample is generated.
        settings (`SampleFolderSettings`): of the samples.
        num_classes (`int`): of the generator.
        fingerprint (`str`): of the model, as of `model_fingerprint`.

    Raises:
        ValueError: the folder holds samples of other settings or another model; the differences are named.
    """

    def __init__(self, folder: Path, settings: SampleFolderSettings, num_classes: int, fingerprint: str):
        self.name = str(folder)
        self.folder = folder
        self.settings = settings
        self.labels = balanced_labels(settings.num_samples, num_classes)
        self.chunks = [
            range(start, min(start + settings.chunk_size, settings.num_samples))
            for start in range(0, settings.num_samples, settings.chunk_size)
        ]
        self.record = {**asdict(settings), "num_classes": num_classes, "model": fingerprint}
        self.check_settings()

    def check_settings(self) -> None:
        """Raise `ValueError` if the folder holds samples of other settings or another model."""
        file = self.folder / "settings.json"
        found = json.loads(file.read_text()) if file.is_file() else self.record
        differing = [name for name in self.record if self.record[name] != found.get(name)]
        if differing:
            texts = [f"{name} {found.get(name)} instead of {self.record[name]}" for name in differing]
            raise ValueError(
                f"{self.folder} holds samples of other settings: {', '.join(texts)}. Name another folder."
            )

    def write_settings(self) -> None:
        """Save the settings that later runs are checked against. Any of several processes may do so, as all write the same."""
        self.check_settings()
        with whole_file(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.record, indent=1))

    def file(self, chunk: int) -> Path:
        return self.folder / f"chunk_{chunk:06d}.npy"

    def missing(self, process_index: int = 0, num_processes: int = 1) -> list[int]:
        """
        Numbers of the chunks that are not there yet; of several processes, those of one. A chunk belongs to the same
        process whenever that process asks, so that none is generated twice or left out.
        """
        own = range(process_index, len(self.chunks), num_processes)
        return [chunk for chunk in own if not self.file(chunk).is_file()]

    def __len__(self) -> int:
        return self.settings.num_samples

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Chunk by chunk, in parts of `batch_size` at most."""
        for chunk in range(len(self.chunks)):
            yield from torch.from_numpy(np.load(self.file(chunk))).split(batch_size)


def generate_samples(
    pipe: VFMTokPipeline,
    samples: SampleFolder,
    process_index: int = 0,
    num_processes: int = 1,
    progress_callback: ProgressCallback = lambda count: None,
) -> None:
    """
    Generate what is missing of a folder of samples; each of several processes generates its share.

    Args:
        progress_callback: called after each chunk with the number of its samples.
    """
    samples.write_settings()
    settings = samples.settings
    for chunk in samples.missing(process_index, num_processes):
        numbers = samples.chunks[chunk]
        image_tokens = pipe(
            samples.labels[numbers.start : numbers.stop].tolist(),
            generator=[torch.Generator().manual_seed(settings.seed + number) for number in numbers],
            output_type="tokens",
            **settings.sampling,
        ).images
        images = pipe.detokenize(image_tokens, "uint8", settings.size, settings.resize_mode)
        with whole_file(samples.file(chunk)) as temporary:
            np.save(temporary, images.cpu().numpy())
        progress_callback(len(numbers))


def write_samples_npz(samples: SampleFolder, path: Path) -> None:
    """The samples and their labels as one file for ADM's evaluation suite."""
    write_npz(path, samples.batches(samples.settings.chunk_size), len(samples), samples.labels)


def load_reference(
    images: ImageSet | Path,
    extractor: FeatureExtractor,
    size: int | None = None,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> Reference:
    """
    What samples are compared with.

    Args:
        images (`ImageSet` or `Path`): images, or ADM's `.npz` of a reference batch. If it holds statistics (`mu`, `sigma`,
            `mu_s`, `sigma_s`), these are used as they are, for they are of more images than the file itself holds.
        size (`int`, *optional*): side in pixels of the samples, which the images of a `.npz` must have too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no `.npz`, images of another size, or statistics that are not finite or not of the chosen network.
    """
    if not isinstance(images, Path):
        return Reference.of(extract_features(images, extractor, batch_size, progress_callback))
    if not images.is_file():
        raise FileNotFoundError(f"There is no reference file {images}.")
    if not zipfile.is_zipfile(images):
        raise ValueError(f"{images} is not a .npz file, or is truncated: fetch it again.")
    with np.load(images, allow_pickle=False) as archive:
        names = set(archive.files)
        stored = {name: archive[name].astype(np.float64) for name in names & {"mu", "sigma", "mu_s", "sigma_s"}}
    has_statistics = len(stored) == 4
    if not has_statistics and "arr_0" not in names:
        raise ValueError(f"{images} holds neither images (arr_0) nor statistics (mu, sigma, mu_s, sigma_s).")
    if has_statistics and extractor.name != "inception":
        raise ValueError(
            f"{images} holds statistics of Inception, the features are those of {extractor.name}: give reference images, "
            "or choose the features 'inception'."
        )
    if has_statistics and not all(np.isfinite(values).all() for values in stored.values()):
        raise ValueError(f"{images} holds statistics that are NaN or infinite: fetch or compute them again.")
    features = None
    if "arr_0" in names:
        features = extract_features(_npz_of_size(images, size), extractor, batch_size, progress_callback)
    if not has_statistics:
        return Reference.of(features)
    pooled, spatial = (
        FeatureStatistics(stored[mean], stored[covariance])
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    return Reference(pooled, spatial, features.pooled if features is not None else None)


def _npz_of_size(path: Path, size: int | None) -> NpzImages:
    images = NpzImages(path)
    height, width = images.shape[1:3]
    if size is not None and (height, width) != (size, size):
        raise ValueError(
            f"{path} holds images of {width} x {height} pixels, and the samples have {size} x {size}: choose one size for "
            "both."
        )
    return images


@dataclass
class GenerationResult:
    """
    Args:
        values (`dict[str, float]`): `fid`, `sfid`, `precision`, `recall`, and `inception_score` of a classifier's features.
        num_samples (`int`): how many.
        protocol (`dict`): features and sampling settings.
        remarks (`list[str]`): how far to trust the values.
    """

    values: dict[str, float]
    num_samples: int
    protocol: dict[str, Any]
    remarks: list[str]


def evaluate_generation(
    samples: ImageSet,
    reference: Reference,
    extractor: FeatureExtractor,
    protocol: dict[str, Any] | None = None,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> GenerationResult:
    """
    Distances of samples to a reference.

    Args:
        samples (`ImageSet`): a complete `SampleFolder`, or images from anywhere.
        reference (`Reference`): as of `load_reference`, by the same extractor.
        protocol (`dict`, *optional*): what else the result is to say about itself.
    """
    features = extract_features(samples, extractor, batch_size, progress_callback)
    values, remarks = compare_features(features, reference)
    return GenerationResult(values, len(samples), {"features": extractor.name, **(protocol or {})}, remarks)
