"""
Generate samples and evaluate generators on them.

Sample i has label i modulo the number of classes and its own random generator with seed `seed + i`. Samples are written in
chunks, atomically. After an interruption, running again keeps existing chunks and generates missing ones, with any number
of processes and the same result.
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
        num_samples (`int`): a multiple of the number of classes balances the classes.
        seed (`int`): sample i uses seed + i.
        guidance_scale (`float`): 1 disables guidance.
        guidance_scale_pow (`float`, *optional*): for RAR generators.
        temperature, top_k, top_p: default to the generator's `generation_config`.
        size (`int`, *optional*): side of the images in pixels. Defaults to the tokenizer's.
        resize_mode (`str`): how images are resized to `size`.
        chunk_size (`int`): samples that are generated at once and stored in one file.
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
        """The arguments for the generator's `generate`."""
        names = ("guidance_scale", "guidance_scale_pow", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def check_sampling(pipe: VFMTokPipeline, settings: SampleFolderSettings) -> None:
    """
    Check the settings before anything is generated.

    Raises:
        ValueError: the generator does not support them.
    """
    if settings.guidance_scale_pow is not None and not isinstance(pipe.transformer, VFMTokRARForImageGeneration):
        raise ValueError("guidance_scale_pow is only for RAR generators: leave it out.")
    pipe.transformer.sampling_settings.resolve(settings.sampling, pipe.transformer.generation_config)


def balanced_labels(num_samples: int, num_classes: int) -> torch.Tensor:
    """Labels `(num_samples,)` int64, cycling through the classes, so class counts differ by at most one."""
    return torch.arange(num_samples) % num_classes


def model_fingerprint(pipe: VFMTokPipeline) -> str:
    """A checksum of the weights of the generator and of the tokenizer's decoder side."""
    return weights_sha256(pipe.transformer, pipe.vq_model, skip=("vision_model.",))


class SampleFolder:
    """
    The samples of one setting, in chunks of `settings.chunk_size`. A complete folder is an `ImageSet`.

    Args:
        folder (`Path`): created with the first sample.
        settings (`SampleFolderSettings`): of the samples.
        num_classes (`int`): number of classes of the generator.
        fingerprint (`str`): the model's `model_fingerprint`.

    Raises:
        ValueError: the folder contains samples of other settings or another model; the error names the differences.
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
        """Raise `ValueError` if the folder contains samples of other settings or another model."""
        file = self.folder / "settings.json"
        found = json.loads(file.read_text()) if file.is_file() else self.record
        differing = [name for name in self.record if self.record[name] != found.get(name)]
        if differing:
            texts = [f"{name} {found.get(name)} instead of {self.record[name]}" for name in differing]
            raise ValueError(
                f"{self.folder} contains samples of other settings: {', '.join(texts)}. Choose another folder."
            )

    def write_settings(self) -> None:
        """Save the settings that later runs are checked against. All processes write the same content."""
        self.check_settings()
        with whole_file(self.folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(self.record, indent=1))

    def file(self, chunk: int) -> Path:
        return self.folder / f"chunk_{chunk:06d}.npy"

    def missing(self, process_index: int = 0, num_processes: int = 1) -> list[int]:
        """
        Numbers of the missing chunks of one process. The assignment of chunks to processes is fixed, so no chunk is
        generated twice or left out.
        """
        own = range(process_index, len(self.chunks), num_processes)
        return [chunk for chunk in own if not self.file(chunk).is_file()]

    def __len__(self) -> int:
        return self.settings.num_samples

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Iterate over the chunks, in batches of at most `batch_size`."""
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
    Generate the missing samples of a folder. Each process generates its share.

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
    """Write the samples and their labels to one file for ADM's evaluation suite."""
    write_npz(path, samples.batches(samples.settings.chunk_size), len(samples), samples.labels)


def load_reference(
    images: ImageSet | Path,
    extractor: FeatureExtractor,
    size: int | None = None,
    batch_size: int = 32,
    progress_callback: ProgressCallback = lambda count: None,
) -> Reference:
    """
    Load the reference that samples are compared with.

    Args:
        images (`ImageSet` or `Path`): images, or a reference batch in ADM's `.npz` format. Statistics in the file (`mu`,
            `sigma`, `mu_s`, `sigma_s`) are used unchanged, because they cover more images than the file contains.
        size (`int`, *optional*): side in pixels of the samples. Images of a `.npz` must have the same size.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a `.npz`, images of another size, or statistics that are not finite or belong to another network.
    """
    if not isinstance(images, Path):
        return Reference.of(extract_features(images, extractor, batch_size, progress_callback))
    if not images.is_file():
        raise FileNotFoundError(f"There is no reference file {images}.")
    if not zipfile.is_zipfile(images):
        raise ValueError(f"{images} is not a .npz file, or is truncated: download it again.")
    with np.load(images, allow_pickle=False) as archive:
        names = set(archive.files)
        stored = {name: archive[name].astype(np.float64) for name in names & {"mu", "sigma", "mu_s", "sigma_s"}}
    has_statistics = len(stored) == 4
    if not has_statistics and "arr_0" not in names:
        raise ValueError(f"{images} contains neither images (arr_0) nor statistics (mu, sigma, mu_s, sigma_s).")
    if has_statistics and extractor.name != "inception":
        raise ValueError(
            f"{images} contains statistics of Inception, but the features are those of {extractor.name}: pass reference "
            "images, or choose the features 'inception'."
        )
    if has_statistics and not all(np.isfinite(values).all() for values in stored.values()):
        raise ValueError(f"{images} contains statistics that are NaN or infinite: download or compute them again.")
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
            f"{path} contains images of {width} x {height} pixels, but the samples have {size} x {size}: choose the same "
            "size for both."
        )
    return images


@dataclass
class GenerationResult:
    """
    Args:
        values (`dict[str, float]`): `fid`, `sfid`, `precision`, `recall`, and `inception_score` if the network is a classifier.
        num_samples (`int`): number of samples.
        protocol (`dict`): features and sampling settings.
        remarks (`list[str]`): limitations of the values.
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
    Compute the distances between samples and a reference.

    Args:
        samples (`ImageSet`): a complete `SampleFolder` or any images.
        reference (`Reference`): returned by `load_reference` with the same extractor.
        protocol (`dict`, *optional*): further entries of the result's protocol.
    """
    features = extract_features(samples, extractor, batch_size, progress_callback)
    values, remarks = compare_features(features, reference)
    return GenerationResult(values, len(samples), {"features": extractor.name, **(protocol or {})}, remarks)
