"""Compare reconstructions with their originals."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from vfmtok_hf.data import statistics
from vfmtok_hf.data.pictures import Picture, batches_of
from vfmtok_hf.evaluation.features import FeatureExtractor, Features, ProgressCallback, check_finite_features
from vfmtok_hf.evaluation.metrics import Reference, compare_features
from vfmtok_hf.evaluation.tokens import token_count_remarks
from vfmtok_hf.pipelines import VFMTokDiTPipeline, VFMTokPipeline


ResizeMode = Literal["reconstruction", "generation"]
SSIMConvention = Literal["original", "standard"]
SSIM_WINDOWS = {"original": 7, "standard": 11}
PerceptualDistance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def psnr(originals: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio in dB of each image: 10 log10(255^2 / mean squared error); infinity for equal images.

    Args:
        originals, reconstructions (`torch.ByteTensor` of shape `(batch_size, 3, height, width)`): 8-bit images.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float64 on the CPU.
    """
    return statistics.psnr(originals.cpu().double(), reconstructions.cpu().double(), data_range=255)


def ssim(
    originals: torch.Tensor, reconstructions: torch.Tensor, convention: SSIMConvention = "original"
) -> torch.Tensor:
    """
    Structural similarity of each image, at most 1, by scikit-image.

    Args:
        originals, reconstructions (`torch.ByteTensor` of shape `(batch_size, 3, height, width)`): 8-bit images.
        convention (`str`):
            `"original"` as in `vqgan_test.py`: a uniform 7 x 7 window, and a data range of 2 for images in [0, 1], which
            increases the value slightly. `"standard"` as published (Wang et al. 2004): a Gaussian
            window of sigma 1.5, population covariances, the true data range.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float64.

    Raises:
        ValueError: images smaller than the window.
    """
    check_ssim_window(min(originals.shape[-2:]), convention)
    from skimage.metrics import structural_similarity

    settings: dict[str, object] = {"data_range": 2.0}
    if convention == "standard":
        settings = {
            "data_range": 1.0,
            "gaussian_weights": True,
            "sigma": 1.5,
            "use_sample_covariance": False,
        }
    pairs = (
        batch.permute(0, 2, 3, 1).cpu().numpy().astype(np.float64) / 255 for batch in (originals, reconstructions)
    )
    values = [
        structural_similarity(ours, theirs, channel_axis=-1, **settings) for ours, theirs in zip(*pairs, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def check_ssim_window(size: int, convention: SSIMConvention) -> None:
    """
    Raises:
        ValueError: images of this side are smaller than the window.
    """
    if size < SSIM_WINDOWS[convention]:
        raise ValueError(
            f"SSIM {convention!r} uses a window of {SSIM_WINDOWS[convention]} pixels: measure at that size or a "
            f"larger one, got {size}."
        )


def load_lpips(network: Literal["alex", "vgg", "squeeze"] = "alex", device: torch.device | str = "cpu"):
    """
    LPIPS (Zhang et al. 2018) between 8-bit images, by [`~vfmtok_hf.data.image_distances.LPIPS`].

    Returns:
        A function of two batches of 8-bit images `(batch_size, 3, height, width)` that returns the distance of each pair.

    Raises:
        FileNotFoundError: the network's weights could not be downloaded.
        ImportError: the `lpips` package is missing.
    """
    from vfmtok_hf.data.image_distances import LPIPS

    model = LPIPS(network).eval().to(device)

    @torch.no_grad()
    def distance(originals: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        pairs = (batch.to(device).float() / 127.5 - 1 for batch in (originals, reconstructions))
        return model(*pairs).cpu().double()

    return distance


@dataclass
class ReconstructionResult:
    """
    Args:
        values (`dict[str, float]`): `psnr` (dB) and `ssim`, means over images; `lpips`, `rfid`, `rsfid`, `ris` and the
            like if requested; `codebook_usage` in [0, 1] and `codebook_perplexity` of a tokenizer.
        num_images (`int`): how many.
        protocol (`dict[str, str]`): the conventions that were used.
        remarks (`list[str]`): limitations of the values.
        token_counts (`torch.LongTensor` of shape `(codebook_size,)`): how often each code occurred, if there is a codebook.
    """

    values: dict[str, float]
    num_images: int
    protocol: dict[str, str | int]
    remarks: list[str]
    token_counts: torch.Tensor | None = field(repr=False)


@torch.no_grad()
def evaluate_reconstruction(
    pipe: VFMTokPipeline | VFMTokDiTPipeline,
    pictures: Iterable[Picture],
    extractor: FeatureExtractor | None = None,
    lpips: PerceptualDistance | None = None,
    size: int | None = None,
    resize_mode: ResizeMode = "reconstruction",
    ssim_convention: SSIMConvention = "original",
    batch_size: int = 16,
    progress_callback: ProgressCallback = lambda count: None,
) -> ReconstructionResult:
    """
    Reconstruct images and compare them with the originals as in `vqgan_test.py`: images are cropped to the model's size, and
    both sides are converted to 8 bits and resized in the same way. The reference of rFID is the originals of the same images.

    Args:
        pictures (`Iterable[Picture]`): paths of image files, or PIL images, of any sizes; read once, in order.
        extractor (`FeatureExtractor`, *optional*): network for rFID and rIS, which are omitted without it.
        lpips (*optional*): returned by `load_lpips`.
        size (`int`, *optional*): side in pixels for the comparison; the paper uses 256. Defaults to the model's size.
        resize_mode (`str`): how images are resized to `size`, see [`VFMTokImageProcessor.postprocess`].
        progress_callback: called with the number of images done after each batch.

    Raises:
        ValueError: an image is unreadable (the error names it), features are not finite, or the size is below SSIM's window.
    """
    model = pipe.autoencoder
    size = size or model.config.image_size
    check_ssim_window(size, ssim_convention)
    has_codebook = isinstance(pipe, VFMTokPipeline)
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64) if has_codebook else None
    columns: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    original_features: list[Features] = []
    features: list[Features] = []
    num_images = 0
    for batch in batches_of(pictures, batch_size):
        pixel_values = pipe.image_processor(batch, return_tensors="pt")
        pixel_values = pixel_values["pixel_values"].to(model.device)
        encoded = model.encode(pixel_values)
        if counts is None:
            reconstructions = pipe.decode(encoded.latents, "uint8", size, resize_mode, batch_size)
        else:
            counts += encoded.image_tokens.flatten().cpu().bincount(minlength=len(counts))
            reconstructions = pipe.detokenize(encoded.image_tokens, "uint8", size, resize_mode, batch_size)
        originals = pipe.image_processor.postprocess(pixel_values, "uint8", size, resize_mode)
        columns["psnr"].append(psnr(originals, reconstructions))
        columns["ssim"].append(ssim(originals, reconstructions, ssim_convention))
        if lpips is not None:
            columns["lpips"].append(lpips(originals, reconstructions))
        if extractor is not None:
            original_features.append(extractor(originals))
            features.append(extractor(reconstructions))
            numbers = f"images {num_images + 1} to {num_images + len(batch)}"
            check_finite_features(original_features[-1], f"Of the originals, {numbers}")
            check_finite_features(features[-1], f"Of the reconstructions, {numbers}")
        num_images += len(batch)
        progress_callback(len(batch))
    if num_images == 0:
        raise ValueError("There are no images to reconstruct.")
    values = {name: torch.cat(parts).mean().item() for name, parts in columns.items() if parts}
    remarks = [] if counts is None else token_count_remarks(counts)
    if extractor is not None:
        reference = Reference.of(Features.concatenate(original_features))
        distances, more = compare_features(Features.concatenate(features), reference)
        remarks += more
        values |= {RECONSTRUCTION_NAMES.get(name, name): value for name, value in distances.items()}
    if counts is not None:
        codebook = statistics.codebook_statistics(counts)
        values |= {"codebook_usage": codebook.usage, "codebook_perplexity": codebook.perplexity}
    protocol = {
        "size": size,
        "resize": resize_mode if size != model.config.image_size else "none",
        "ssim": ssim_convention,
        "features": extractor.name if extractor is not None else "none",
    }
    return ReconstructionResult(values, num_images, protocol, remarks, counts)


# Distances have other names for reconstructions.
RECONSTRUCTION_NAMES = {"fid": "rfid", "sfid": "rsfid", "inception_score": "ris"}
