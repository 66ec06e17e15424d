"""Read original checkpoint files safely, and explain what a wrong file is."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import CheckpointError, listing


Weights = Literal["ema", "model"]

# Entries of each type of weights in training checkpoints, in the order of the original's scripts.
ENTRIES = {"ema": ("ema",), "model": ("model", "module", "state_dict")}
# A file without moving averages may have its only weights under one of these names.
UNNAMED_ENTRIES = ("module", "state_dict")

# A key that only this type of file has.
ORIGINAL_MARKERS = {
    "slot_quantize.embedding.weight": "tokenizer",
    "slots_quant.conv_out.weight": "vfmae",
    "tok_embeddings.weight": "ar",
    "timesteps_embeddings": "rar",
    "final_layer.norm_final.weight": "dit",
    "patch_embed.proj.weight": "dinov2",
}
HUGGING_FACE_MARKERS = (
    "quantizer.codebook.weight",
    "bottleneck.conv.weight",
    "class_embedding.weight",
    "timestep_embeddings",
    "embeddings.patch_embeddings.projection.weight",
)
DESCRIPTIONS = {
    "tokenizer": "a VFMTok tokenizer checkpoint",
    "vfmae": "a VFMAE (continuous autoencoder) checkpoint",
    "ar": "a next-token (AR) generator checkpoint",
    "rar": "a randomized-order (RAR) generator checkpoint",
    "dit": "a diffusion transformer (DiTDH) checkpoint",
    "dinov2": "an original DINOv2 checkpoint",
}


@dataclass(frozen=True)
class Checkpoint:
    """
    A set of weights from an original file.

    Args:
        entry: the entry that was read; `None` for a bare state dict.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    entry: str | None


def read_checkpoint(path: str | Path, kind: str, weights: Weights = "ema") -> Checkpoint:
    """
    Read a `.pt`, `.pth`, `.bin` or `.safetensors` file.

    Pickles may contain only tensors, plain containers and `argparse.Namespace` (training arguments). Zipped files are
    memory-mapped, so optimizer states are never read.

    Args:
        kind: the expected type of file, a value of `ORIGINAL_MARKERS`.
        weights: the weights of a training checkpoint to use, the moving averages or those of the last step. Files with
            one set of weights are read with either value.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged, of another type, or does not contain these weights.
    """
    path = Path(path)
    if weights not in ENTRIES:
        raise ValueError(f"weights must be 'ema' or 'model', got {weights!r}.")
    _check_is_file(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    entry, state_dict = _select_weights(content, path, weights)
    _check_kind(state_dict, path, kind)
    return Checkpoint(path, state_dict, entry)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of VFMAE's latents, each `(latent_channels, num_anchors)`, float32."""

    mean: torch.Tensor
    std: torch.Tensor


# Of the released VFMAE: the authors' numbers, as in their `stats/stats-500.pt`.
RELEASED_STATISTICS = Path(__file__).with_name("vfmae_latent_statistics.safetensors")
# What two numpy arrays are pickled as, by numpy 1 and by numpy 2.
NUMPY_GLOBALS = [
    (numpy._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    numpy._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype("float32")),
    type(numpy.dtype("float64")),
]


def read_latent_statistics(path: str | Path) -> LatentStatistics:
    """
    Read the statistics of VFMAE's latents: the original's `stats-*.pt`, two numpy arrays of which the standard deviation is
    called `var`, or `mean` and `std` in a `.safetensors` file; `"released"` stands for those of the released VFMAE. No code of
    a pickle is run.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged or holds something else.
    """
    path = RELEASED_STATISTICS if path in ("released", Path("released")) else Path(path)
    _check_is_file(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path, NUMPY_GLOBALS)
    names = ("mean", "std" if path.suffix == ".safetensors" else "var")
    if not isinstance(content, Mapping) or set(content) != set(names):
        raise CheckpointError(f"{path} holds no statistics of latents: it must have {names[0]!r} and {names[1]!r}.")
    mean, std = (torch.as_tensor(content[name]) for name in names)
    if not (mean.is_floating_point() and mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise CheckpointError(f"{path} is damaged: statistics must be finite, and standard deviations positive.")
    return LatentStatistics(mean.float(), std.float())


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        hint = " It has a config.json, so it is already converted: load it with from_pretrained."
        raise CheckpointError(
            f"{path} is a folder; pass the checkpoint file.{hint if (path / 'config.json').exists() else ''}"
        )
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: download them with `git lfs pull`.")


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}): download it again."
        ) from error


def _load_pickle(path: Path, allowed: Sequence = (argparse.Namespace,)):
    is_zip = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} was refused: it is a pickle that calls {found[1]}. Weights need no code: "
                "save only the state dict, preferably as safetensors."
            ) from error
        raise _damaged(path) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or not a PyTorch checkpoint: download it again.")


def _select_weights(content, path: Path, weights: Weights) -> tuple[str | None, dict[str, torch.Tensor]]:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} contains {type(content).__name__} instead of named weights.")
    if _is_state_dict(content):
        return None, dict(content)
    entries = [name for name in ("ema", "model", *UNNAMED_ENTRIES) if _is_state_dict(content.get(name))]
    wanted = ENTRIES[weights]
    if weights == "ema" and not {"ema", "model"} & set(entries):
        wanted = UNNAMED_ENTRIES
    for name in wanted:
        if name in entries:
            return name, dict(content[name])
    if entries:
        other = "model" if weights == "ema" else "ema"
        raise CheckpointError(f"{path} has no {weights!r} weights, only {listing(entries, 4)}: use weights={other!r}.")
    raise CheckpointError(f"{path} contains no weights: its entries are {listing([str(key) for key in content], 4)}.")


def _is_state_dict(value) -> bool:
    return (
        isinstance(value, Mapping) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())
    )


def _check_kind(state_dict: Mapping[str, torch.Tensor], path: Path, kind: str) -> None:
    found = {name for marker, name in ORIGINAL_MARKERS.items() if marker in state_dict}
    if kind in found:
        return
    if any(marker in state_dict for marker in HUGGING_FACE_MARKERS):
        cure = "pass its folder as vision_model" if kind == "dinov2" else "load its folder with from_pretrained"
        raise CheckpointError(f"{path} is already in Hugging Face format: {cure}.")
    if found:
        raise CheckpointError(f"{path} is {DESCRIPTIONS[found.pop()]}, not {DESCRIPTIONS[kind]}.")
    marker = next(marker for marker, name in ORIGINAL_MARKERS.items() if name == kind)
    raise CheckpointError(
        f"{path} is not {DESCRIPTIONS[kind]}: it lacks {marker!r} and contains {listing(list(state_dict))}."
    )
