"""
Image tokens on disk, as ordinary data sets of parquet files that `datasets.load_dataset` reads and `push_to_hub` publishes.

    image_tokens   one token sequence (num_image_tokens,); the `id` of its feature identifies the tokenizer
    label          class of the image, if images are labeled
    image          name of the image: the path of a file, or the row of a data set
    sha256         of the encoded image

A row is one view of an image, and the views of an image are consecutive. `extract_tokens.py` writes a folder of such files
with an `index.json` (the tokenizer, what was left out, and the sha256 of each file); `vfmtok tokenize` writes one file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vfmtok_hf.data.files import holds_data_files
from vfmtok_hf.data.fingerprints import file_sha256, json_sha256, weights_sha256
from vfmtok_hf.data.sources import features_of, find_column, known_class_names, load_dataset
from vfmtok_hf.data.streams import Stream
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


INDEX_FILE = "index.json"
FORMAT = "vfmtok-image-tokens-2"
SHARDS = "tokens-*.parquet"
EARLIER_SHARDS = "shard-*.safetensors"
FACTS = b"vfmtok"  # schema metadata of a shard: its extraction, and its unreadable images
# Settings and weights of the decoder: they may differ between tokenizers that produce the same tokens.
DECODING_PARTS = ("post_quant_proj", "vit_decoder", "pixel_decoder")
DECODING_FIELDS = ("decoder_", "pixel_decoder_", "num_register_tokens")
BOOKKEEPING_FIELDS = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "architectures")


def tokenizer_identity(tokenizer: VFMTokModel) -> dict[str, str]:
    """Checksums of everything that image tokens depend on: settings, and weights in the loaded precision."""
    config = {
        name: value
        for name, value in _without_bookkeeping(tokenizer.config.to_dict()).items()
        if not name.startswith(DECODING_FIELDS) and not name.endswith("_loss_weight")
    }
    return {
        "config_sha256": json_sha256(config),
        "weights_sha256": weights_sha256(tokenizer, skip=DECODING_PARTS),
    }


def _without_bookkeeping(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_bookkeeping(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in BOOKKEEPING_FIELDS
    }


def identity_text(identity: dict[str, str]) -> str:
    """A tokenizer's identity as the `id` of a feature."""
    return "vfmtok " + " ".join(f"{name}={digest}" for name, digest in sorted(identity.items()))


@torch.no_grad()
def encode_sequences(tokenizer: VFMTokModel, pixel_values: torch.Tensor, codebook_top_k: int = 1) -> torch.Tensor:
    """
    `(images, codebook_top_k, num_image_tokens)`, computed in the tokenizer's own precision without autocast.

    With `codebook_top_k` 2, each image also has the sequence of its second-nearest codebook rows, as in the training of
    VFMTok-RAR (`encode_topk_indices` and `get_neighboring_codes` of the original's `vq_model.py`).
    """
    latents = tokenizer.encode(pixel_values).latents
    return tokenizer.quantizer.top_k(latents, codebook_top_k).movedim(-1, 1)


# ---------------------------------------------------------------------------------------------------------------
# Writing


def write_token_table(
    file: Path,
    image_tokens: np.ndarray,
    images: Sequence[str],
    sha256: Sequence[str],
    identity: dict[str, str],
    codebook_size: int,
    labels: Sequence[int] | None = None,
    class_names: list[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """
    Write one parquet file.

    Args:
        image_tokens (`np.ndarray` of shape `(rows, num_image_tokens)`): below `codebook_size`.
        images, sha256, labels: one per row; labels require `class_names`.
        identity: [`tokenizer_identity`] of the tokenizer.
        facts (`dict`, *optional*): stored in the file's metadata, for resuming the extraction.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    dtype = "uint16" if codebook_size <= 2**16 else "int32"
    code = datasets.Value(dtype, id=identity_text(identity))
    features = datasets.Features({"image_tokens": datasets.List(code, length=image_tokens.shape[1])})
    flat = pa.array(image_tokens.astype(dtype).reshape(-1))
    columns: dict[str, Any] = {"image_tokens": pa.FixedSizeListArray.from_arrays(flat, image_tokens.shape[1])}
    if labels is not None:
        features["label"] = datasets.ClassLabel(names=class_names)
        columns["label"] = pa.array(labels, pa.int64())
    for name, values in (("image", images), ("sha256", sha256)):
        features[name] = datasets.Value("string")
        columns[name] = pa.array(values, pa.string())
    schema = features.arrow_schema
    if facts is not None:
        schema = schema.with_metadata({**schema.metadata, FACTS: json.dumps(facts).encode()})
    pq.write_table(pa.table(columns, schema=schema), file)


def shard_facts(file: Path) -> dict[str, Any] | None:
    """The facts in a parquet file about its extraction: empty if it belongs to none, None if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(file).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return json.loads(metadata.get(FACTS, b"{}"))


def read_index(folder: Path) -> dict[str, Any]:
    """
    Read the index of an extraction.

    Raises:
        FileNotFoundError: the extraction has not finished.
        ValueError: the folder has another format.
    """
    if any(folder.glob(EARLIER_SHARDS)):
        raise ValueError(
            f"{folder} contains token shards in an earlier format (.safetensors), which is not supported anymore: extract the tokens "
            "again into another folder."
        )
    file = folder / INDEX_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX_FILE}: the extraction has not finished. Run it again.")
    index = json.loads(file.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} has the format {index.get('format')!r}, not {FORMAT!r}.")
    return index


def check_shard(folder: Path, shard: dict[str, Any], verify: bool) -> None:
    """Raise unless the file of a shard matches the index."""
    file = folder / shard["file"]
    cure = "delete it and run the extraction again."
    if not file.is_file():
        raise FileNotFoundError(f"The token shard {file} is missing: run the extraction again.")
    if file.stat().st_size != shard["bytes"]:
        raise ValueError(f"The token shard {file} has {file.stat().st_size} bytes, not {shard['bytes']}: {cure}")
    if verify and file_sha256(file) != shard["sha256"]:
        raise ValueError(f"The token shard {file} is damaged: its sha256 is not that of the index: {cure}")


# ---------------------------------------------------------------------------------------------------------------
# Reading


def is_token_set(source: str | Path, split: str = "train") -> bool:
    """Whether a source contains image tokens instead of images: an extraction, finished or not, or a token column."""
    folder = Path(source)
    if folder.is_dir():
        if is_extraction(folder):
            return True
        if not holds_data_files(folder):
            return False
    return "image_tokens" in features_of(load_dataset(source, split, streaming=True))


def is_extraction(folder: Path) -> bool:
    """Whether a folder was written by `extract_tokens.py`, possibly unfinished or in an earlier format."""
    return (
        (folder / INDEX_FILE).is_file()
        or any(folder.glob(EARLIER_SHARDS))
        or any(shard_facts(file) for file in folder.glob(SHARDS))
    )


def open_extraction(source: str | Path, verify: bool) -> tuple[str | Path, dict[str, Any]]:
    """
    The path that `load_dataset` reads, and the index of a folder by `extract_tokens.py`.

    Args:
        verify (`bool`): compare the sha256 of each file with the index. Sizes are compared in any case.

    Raises:
        FileNotFoundError: the extraction has not finished, or one of its files is missing.
        ValueError: a file is damaged, and named.
    """
    folder = Path(source)
    if not (folder.is_dir() and is_extraction(folder)):
        return source, {"unreadable": []}
    index = read_index(folder)
    for shard in index["shards"]:
        check_shard(folder, shard, verify)
    return folder / SHARDS, index  # whatever the split is called


class TokenSet(Dataset):
    """
    Token sequences of labeled images. (seed, epoch, index) determine which of an image's sequences an item is.
    Byte-identical images count once.

    Args:
        source (`str` or `Path`): a folder written by `extract_tokens.py`, or anything that
            [`~vfmtok_hf.data.sources.load_dataset`] reads, with the columns of this module.
        seed (`int`): seed of that choice.
        verify (`bool`): as in [`open_extraction`], whose errors it raises.
        split (`str`): split of a data set that has several.

    Raises:
        ValueError: a column is missing.
    """

    def __init__(self, source: str | Path, seed: int = 0, verify: bool = True, split: str = "train"):
        self.source = str(source)
        self.seed = seed
        self.epoch = 0
        source, self.index = open_extraction(source, verify)
        self.dataset = load_dataset(source, split, streaming=False)
        self.features = self.dataset.features
        label_column = find_column("label_column", self.source, self.features, None)
        self.class_names = known_class_names(self.features, label_column)
        missing = {"image_tokens", "image", "sha256"} - set(self.features)
        if missing or self.class_names is None:
            raise ValueError(
                f"{source} is not a set of labeled image tokens: it lacks {', '.join(sorted(missing)) or 'names of the classes'}."
            )
        self.first_rows, self.num_views = self._images()
        rows = self.dataset.select_columns([label_column]).with_format("numpy")
        self.labels: list[int] = rows[self.first_rows][label_column].tolist()
        self.tokens = self.dataset.select_columns(["image_tokens"]).with_format("numpy")

    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """First row and number of rows of each distinct image."""
        import pyarrow.compute as pc

        table = self.dataset.select_columns(["image", "sha256"]).with_format("arrow")[:]
        columns = [
            pc.dictionary_encode(table[name]).combine_chunks().indices.to_numpy() for name in table.column_names
        ]
        rows = np.stack(columns)
        is_first = (
            np.concatenate([[True], (rows[:, 1:] != rows[:, :-1]).any(axis=0)]) if len(table) else np.zeros(0, bool)
        )
        first_rows = np.flatnonzero(is_first)
        num_views = np.diff(first_rows, append=len(table))
        _, new = np.unique(rows[1, first_rows], return_index=True)
        new.sort()
        return first_rows[new], num_views[new]

    @property
    def num_unreadable(self) -> int:
        """Number of images that the extraction left out because they cannot be decoded or have no label."""
        return len(self.index["unreadable"])

    def name(self, index: int) -> str:
        return self.dataset[int(self.first_rows[index])]["image"]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """`image_tokens` (num_image_tokens,), `label`, `index`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor | int]]:
        """Several items at once, for loaders."""
        rows = [
            self.first_rows[index]
            + np.random.default_rng((self.seed, self.epoch, index)).integers(self.num_views[index])
            for index in indices
        ]
        sequences = torch.from_numpy(np.stack(list(self.tokens[rows]["image_tokens"])).astype(np.int64))
        return [
            {"image_tokens": sequence, "label": self.labels[index], "index": index}
            for index, sequence in zip(indices, sequences, strict=True)
        ]


class TokenStream(Stream):
    """
    A [`Stream`] of labeled image tokens. Each token sequence is an item; a [`TokenSet`] has an item per image.

    Args:
        source, verify, split: as in [`TokenSet`].
        epoch_sequences (`int`, *optional*): number of sequences in an epoch, the `epoch_items` of [`Stream`].
        shuffle_buffer, seed: as in [`Stream`].
    """

    def __init__(
        self,
        source: str | Path,
        split: str = "train",
        epoch_sequences: int | None = None,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        verify: bool = True,
    ):
        source, index = open_extraction(source, verify)
        if epoch_sequences is None and "shards" in index:
            epoch_sequences = index["num_sequences"] * sum(shard["images"] for shard in index["shards"])
        super().__init__(source, split, None, None, epoch_sequences, shuffle_buffer, seed)

    def read(self, row: dict[str, Any], name: str) -> torch.Tensor:
        """The token sequence of a row."""
        return torch.tensor(row["image_tokens"])

    def make_item(self, content: torch.Tensor, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """`image_tokens` (num_image_tokens,) int64."""
        return {"image_tokens": content}


def check_tokenizer(tokens: TokenSet | TokenStream, tokenizer: VFMTokModel) -> None:
    """
    Raises:
        ValueError: the tokens were made by another tokenizer.
    """
    if tokens.features["image_tokens"].feature.id != identity_text(tokenizer_identity(tokenizer)):
        raise ValueError(
            f"The tokens of {tokens.source} were made by another tokenizer: extract them again with this one, or pass "
            "the one that made them."
        )
