"""Files of image tokens with the names of their images."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vfmtok_hf.data.fingerprints import file_sha256
from vfmtok_hf.data.output_files import check_token_suffix, whole_file
from vfmtok_hf.data.token_sets import tokenizer_identity, write_token_table
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


if TYPE_CHECKING:
    from vfmtok_hf.pipelines import VFMTokPipeline


def tokenize_files(
    pipe: "VFMTokPipeline",
    images: dict[str, Path],
    batch_size: int = 16,
    on_error: Callable[[str], None] | None = None,
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """
    Yield names and image tokens `(number of images, num_image_tokens)` of one batch of files at a time. Only that
    batch is in memory.

    Args:
        images: files by name, as returned by `find_images`.
        on_error: called with the reason for each image that cannot be used and is skipped. Without it, the first
            such image raises.

    Raises:
        ValueError: an image cannot be used; the error names it.
    """
    names = list(images)
    for start in range(0, len(names), batch_size):
        yield _tokenize_batch(pipe, {name: images[name] for name in names[start : start + batch_size]}, on_error)


def _tokenize_batch(pipe, images, on_error) -> tuple[list[str], torch.Tensor]:
    try:
        return list(images), pipe.tokenize(list(images.values()), batch_size=len(images))
    except (OSError, TypeError, ValueError) as error:
        if len(images) == 1:
            (path,) = images.values()
            reason = str(error) if str(path) in str(error) else f"{path}: {error}"
            if on_error is None:
                raise ValueError(reason) from error
            on_error(reason)
            return [], torch.empty(0, pipe.vq_model.config.num_anchors, dtype=torch.int64)
    # Find the image in the batch that failed, and keep the others.
    parts = [_tokenize_batch(pipe, {name: path}, on_error) for name, path in images.items()]
    return [name for names, _ in parts for name in names], torch.cat([tokens for _, tokens in parts])


def names_file(path: Path) -> Path:
    """The file with the image names of a `.npy` file, which itself contains only numbers."""
    return path.with_suffix(".names.json")


def save_tokens(
    path: Path,
    names: Sequence[str],
    image_tokens: torch.Tensor,
    files: Mapping[str, Path] | None = None,
    tokenizer: VFMTokModel | None = None,
) -> None:
    """
    Write image tokens atomically, as int32 `(number of images, num_image_tokens)`.

    `.safetensors` stores them as `image_tokens`, with the names as a JSON list in its metadata entry `names`; `.npy`
    stores the array, with the names in a `.names.json` next to it; `.parquet` is a data set as in
    `vfmtok_hf.data.token_sets`, without labels, and needs the image `files` by name and the `tokenizer`.

    Raises:
        ValueError: another suffix.
        ImportError: `.parquet` without the `datasets` library.
    """
    check_token_suffix(path)
    if path.suffix == ".parquet":
        if files is None or tokenizer is None:
            raise ValueError(f"{path.name} needs the image files and the tokenizer.")
        digests = [file_sha256(files[name]) for name in names]
        identity, codebook_size = tokenizer_identity(tokenizer), tokenizer.config.codebook_size
        with whole_file(path) as temporary:
            write_token_table(temporary, image_tokens.numpy(), names, digests, identity, codebook_size)
        return
    image_tokens = image_tokens.to(torch.int32).contiguous()
    if path.suffix == ".npy":
        with whole_file(names_file(path)) as temporary:
            temporary.write_text(json.dumps(list(names)), encoding="utf-8")
        with whole_file(path) as temporary:
            np.save(temporary, image_tokens.numpy())
    else:
        with whole_file(path) as temporary:
            save_file({"image_tokens": image_tokens}, temporary, metadata={"names": json.dumps(list(names))})


def load_tokens(path: Path) -> tuple[list[str], torch.Tensor]:
    """
    Read names and image tokens from a file by `save_tokens`. If a file has no names, its images are numbered.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: another suffix, or the file does not contain two-dimensional integers.
    """
    check_token_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no token file {path}.")
    try:
        names, image_tokens = LOADERS[path.suffix](path)
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is not a file of image tokens: {error}.") from error
    if image_tokens.ndim != 2 or image_tokens.is_floating_point():
        raise ValueError(
            f"{path} must contain integers of shape (number of images, num_image_tokens), got {image_tokens.dtype} of "
            f"shape {tuple(image_tokens.shape)}."
        )
    if names is None:
        names = [f"{index:06d}" for index in range(len(image_tokens))]
    if len(names) != len(image_tokens):
        raise ValueError(f"{path} has {len(names)} names for {len(image_tokens)} images.")
    return names, image_tokens.long()


def _load_npy(path: Path) -> tuple[list[str] | None, torch.Tensor]:
    names = names_file(path)
    tokens = torch.from_numpy(np.load(path, allow_pickle=False))
    return json.loads(names.read_text(encoding="utf-8")) if names.is_file() else None, tokens


def _load_safetensors(path: Path) -> tuple[list[str] | None, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        names = (file.metadata() or {}).get("names")
        return None if names is None else json.loads(names), file.get_tensor("image_tokens")


def _load_parquet(path: Path) -> tuple[list[str] | None, torch.Tensor]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    names = table["image"].to_pylist() if "image" in table.column_names else None
    return names, torch.tensor(table["image_tokens"].to_pylist())


LOADERS = {".npy": _load_npy, ".safetensors": _load_safetensors, ".parquet": _load_parquet}
