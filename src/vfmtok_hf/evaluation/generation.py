"""
Draw the many samples that generators are judged by, and judge them.

Sample i has label i modulo the number of classes and a random generator of its own, seeded seed + i. Samples are written
in chunks, whole or not at all, so that a run cut off is continued by running it again: what is there is kept, what is
missing is drawn, by any number of processes, and the result is the same.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vfmtok_hf.evaluation.features import Advance, FeatureExtractor, extract_features
from vfmtok_hf.evaluation.images import ImageSet, NpzImages, write_npz
from vfmtok_hf.evaluation.metrics import FeatureStatistics, Reference, compare_features
from vfmtok_hf.output_files import whole_file
from vfmtok_hf.pipelines import VFMTokPipeline


@dataclass
class SamplingSettings:
    """
    Args:
        num_samples (`int`): a multiple of the number of classes gives each class equally many.
        seed (`int`): sample i is drawn from seed + i.
        guidance_scale (`float`): 1 is none.
        guidance_scale_pow (`float`, *optional*): of a RAR generator.
        temperature, top_k, top_p: left out they come from the generator's `generation_config`.
        size (`int`, *optional*): side of the images in pixels. Default: the tokenizer's.
        resize_mode (`str`): how they get there.
        chunk_size (`int`): samples drawn at once and kept in one file.
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


def balanced_labels(num_samples: int, num_classes: int) -> torch.Tensor:
    """`(num_samples,)` int64: classes in turn, so that their numbers differ by one at most."""
    return torch.arange(num_samples) % num_classes


def model_fingerprint(pipe: VFMTokPipeline) -> str:
    """Changes with any weight of the generator or the tokenizer's decoder side."""
    digest = hashlib.sha256()
    for model in (pipe.transformer, pipe.vq_model):
        for name, tensor in sorted(model.state_dict().items()):
            if not name.startswith("vision_model."):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class SampleFolder:
    """
    The samples of one setting, in chunks of `settings.chunk_size`. It is an `ImageSet` once it is complete.

    Args:
        folder (`Path`): made if it is not there.
        settings (`SamplingSettings`): of the samples.
        num_classes (`int`): of the generator.
        fingerprint (`str`): of the model, as of `model_fingerprint`.

    Raises:
        ValueError: the folder holds samples of other settings or another model; the differences are named.
    """

    def __init__(self, folder: Path, settings: SamplingSettings, num_classes: int, fingerprint: str):
        self.name = str(folder)
        self.folder = folder
        self.settings = settings
        self.labels = balanced_labels(settings.num_samples, num_classes)
        self.chunks = [
            range(start, min(start + settings.chunk_size, settings.num_samples))
            for start in range(0, settings.num_samples, settings.chunk_size)
        ]
        self._check_or_write_settings({**asdict(settings), "num_classes": num_classes, "model": fingerprint})

    def _check_or_write_settings(self, settings: dict[str, Any]) -> None:
        file = self.folder / "settings.json"
        if not file.is_file():
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps(settings, indent=1))
            return
        found = json.loads(file.read_text())
        differing = [name for name in settings if settings[name] != found.get(name)]
        if differing:
            texts = [f"{name} {found.get(name)} instead of {settings[name]}" for name in differing]
            raise ValueError(
                f"{self.folder} holds samples of other settings: {', '.join(texts)}. Name another folder."
            )

    def file(self, chunk: int) -> Path:
        return self.folder / f"chunk_{chunk:06d}.npy"

    def missing(self, process_index: int = 0, num_processes: int = 1) -> list[int]:
        """
        Numbers of the chunks that are not there yet; of several processes, those of one. A chunk belongs to the same
        process whenever that process looks, so that none is drawn twice or left out.
        """
        own = range(process_index, len(self.chunks), num_processes)
        return [chunk for chunk in own if not self.file(chunk).is_file()]

    def __len__(self) -> int:
        return self.settings.num_samples

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Chunk by chunk, in parts of `batch_size` at most."""
        for chunk in range(len(self.chunks)):
            yield from torch.from_numpy(np.load(self.file(chunk))).split(batch_size)


def draw_samples(
    pipe: VFMTokPipeline,
    samples: SampleFolder,
    process_index: int = 0,
    num_processes: int = 1,
    advance: Advance = lambda count: None,
) -> None:
    """
    Draw what is missing of a folder of samples; of several processes, each draws its share.

    Args:
        advance: called with the number of samples drawn after each chunk.
    """
    settings = samples.settings
    rar = {} if settings.guidance_scale_pow is None else {"guidance_scale_pow": settings.guidance_scale_pow}
    for chunk in samples.missing(process_index, num_processes):
        numbers = samples.chunks[chunk]
        image_tokens = pipe(
            samples.labels[numbers.start : numbers.stop].tolist(),
            guidance_scale=settings.guidance_scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            generator=[torch.Generator().manual_seed(settings.seed + number) for number in numbers],
            output_type="tokens",
            **rar,
        ).images
        images = pipe.detokenize(image_tokens, "uint8", settings.size, settings.resize_mode)
        with whole_file(samples.file(chunk)) as temporary:
            np.save(temporary, images.cpu().numpy())
        advance(len(numbers))


def write_samples_npz(samples: SampleFolder, path: Path) -> None:
    """The samples and their labels as one file for ADM's evaluation suite."""
    write_npz(path, samples.batches(samples.settings.chunk_size), len(samples), samples.labels)


def load_reference(
    images: ImageSet | Path, extractor: FeatureExtractor, batch_size: int = 32, advance: Advance = lambda count: None
) -> Reference:
    """
    What samples are compared with.

    Args:
        images (`ImageSet` or `Path`): images, or ADM's `.npz` of a reference batch. If it holds statistics (`mu`, `sigma`,
            `mu_s`, `sigma_s`), these are used as they are, for they are of more images than the file itself holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the statistics are not of the chosen network.
    """
    if not isinstance(images, Path):
        return Reference.of(extract_features(images, extractor, batch_size, advance))
    if not images.is_file():
        raise FileNotFoundError(f"There is no reference file {images}.")
    with np.load(images, allow_pickle=False) as archive:
        names = set(archive.files)
        statistics = {name: archive[name] for name in names & {"mu", "sigma", "mu_s", "sigma_s"}}
    features = None
    if "arr_0" in names:
        features = extract_features(NpzImages(images), extractor, batch_size, advance)
    if len(statistics) < 4:
        if features is None:
            raise ValueError(f"{images} holds neither images (arr_0) nor statistics (mu, sigma, mu_s, sigma_s).")
        return Reference.of(features)
    if extractor.name != "inception":
        raise ValueError(
            f"{images} holds statistics of Inception, the features are those of {extractor.name}: give reference images, "
            "or choose the features 'inception'."
        )
    pooled = FeatureStatistics(statistics["mu"].astype(np.float64), statistics["sigma"].astype(np.float64))
    spatial = FeatureStatistics(statistics["mu_s"].astype(np.float64), statistics["sigma_s"].astype(np.float64))
    return Reference(pooled, spatial, features.pooled if features is not None else None)


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
    advance: Advance = lambda count: None,
) -> GenerationResult:
    """
    Distances of samples to a reference.

    Args:
        samples (`ImageSet`): a complete `SampleFolder`, or images from anywhere.
        reference (`Reference`): as of `load_reference`, by the same extractor.
        protocol (`dict`, *optional*): what else the result is to say about itself.
    """
    features = extract_features(samples, extractor, batch_size, advance)
    values, remarks = compare_features(features, reference)
    return GenerationResult(values, len(samples), {"features": extractor.name, **(protocol or {})}, remarks)
