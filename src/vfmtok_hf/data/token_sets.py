"""
Image tokens of training images, kept as shards in a folder.

    index.json                  what made the tokens, class names, and file, size and sha256 of each shard
    shard-00000.safetensors     image_tokens (images, sequences, num_image_tokens), labels (images,),
                                digests (images, 32): sha256 of each encoded image

An image has several token sequences, one for each of its views. `extract_tokens.py` writes such folders.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from vfmtok_hf.data.files import file_sha256
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel


INDEX_FILE = "index.json"
FORMAT = "vfmtok-image-tokens-1"
SHARD_FACTS = "vfmtok"  # metadata entry of a shard: names of its images, and of those that cannot be decoded
# What decoding alone depends on: it may differ between tokenizers that give the same tokens.
DECODING_PARTS = ("post_quant_proj", "vit_decoder", "pixel_decoder")
DECODING_FIELDS = ("decoder_", "pixel_decoder_", "num_register_tokens")
BOOKKEEPING_FIELDS = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "architectures")


def tokenizer_identity(tokenizer: VFMTokModel) -> dict[str, str]:
    """Digests of all that image tokens depend on: settings, and weights as they are loaded."""
    weights = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if not name.startswith(DECODING_PARTS):
            weights.update(name.encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {
        name: value
        for name, value in _without_bookkeeping(tokenizer.config.to_dict()).items()
        if not name.startswith(DECODING_FIELDS) and not name.endswith("_loss_weight")
    }
    return {
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def _without_bookkeeping(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_bookkeeping(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in BOOKKEEPING_FIELDS
    }


@torch.no_grad()
def encode_sequences(tokenizer: VFMTokModel, pixel_values: torch.Tensor, neighbours: int = 1) -> torch.Tensor:
    """
    `(images, neighbours, num_image_tokens)`, computed in the tokenizer's own precision without autocast.

    With `neighbours` 2 each image also gives the sequence of its second-nearest codebook rows, as in the training of
    VFMTok-RAR (`encode_topk_indices` and `get_neighboring_codes` of the original's `vq_model.py`).
    """
    latents = tokenizer.encode(pixel_values).latents
    return tokenizer.quantizer.top_k(latents, neighbours).movedim(-1, 1)


def is_token_folder(path: str | Path) -> bool:
    """Whether a folder holds token shards, finished or not."""
    return (Path(path) / INDEX_FILE).is_file() or any(Path(path).glob("shard-*.safetensors"))


class TokenShards(Dataset):
    """
    Token sequences of a folder of shards. Which of an image's sequences an item is is a function of
    (seed, epoch, index).

    Args:
        folder (`str` or `Path`): as written by `extract_tokens.py`.
        seed (`int`): of the choice.
        verify (`bool`): compare the sha256 of each shard with the index. Sizes are compared in any case.

    Raises:
        FileNotFoundError: there is no index, so that the extraction has not finished; or a shard is missing.
        ValueError: a shard is damaged; the message names it.
    """

    def __init__(self, folder: str | Path, seed: int = 0, verify: bool = True):
        self.folder = Path(folder)
        self.seed = seed
        self.epoch = 0
        self.index = read_index(self.folder)
        self.class_names: list[str] = self.index["class_names"]
        self.num_sequences: int = self.index["num_sequences"]
        self.places: list[tuple[int, int]] = []  # shard and row of each image
        self.labels: list[int] = []
        self._opened: dict[int, Any] = {}
        duplicates = {tuple(place) for place in self.index["duplicates"]}
        for number, shard in enumerate(self.index["shards"]):
            check_shard(self.folder, shard, verify)
            for row, label in enumerate(self._file(number).get_tensor("labels").tolist()):
                if (number, row) not in duplicates:
                    self.places.append((number, row))
                    self.labels.append(label)

    def _file(self, shard: int) -> Any:
        """A shard, mapped into memory."""
        if shard not in self._opened:
            self._opened[shard] = safe_open(self.folder / self.index["shards"][shard]["file"], framework="np")
        return self._opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # worker processes open the files themselves

    def check_tokenizer(self, tokenizer: VFMTokModel) -> None:
        """
        Raises:
            ValueError: the tokens were made by another tokenizer.
        """
        if tokenizer_identity(tokenizer) != self.index["tokenizer"]:
            raise ValueError(
                f"The tokens of {self.folder} were made by another tokenizer: extract them again with this one, or pass "
                "the one that made them."
            )

    @property
    def num_unreadable(self) -> int:
        """Images that were left out because they cannot be decoded."""
        return len(self.index["unreadable"])

    def name(self, index: int) -> str:
        shard, row = self.places[index]
        return shard_facts(self._file(shard))["names"][row]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """`image_tokens` (num_image_tokens,), `label`, `index`."""
        sequence = int(np.random.default_rng((self.seed, self.epoch, index)).integers(self.num_sequences))
        return {"image_tokens": self.sequence(index, sequence), "label": self.labels[index], "index": index}

    def sequence(self, index: int, sequence: int) -> torch.Tensor:
        """One sequence of an image, `(num_image_tokens,)` int64."""
        shard, row = self.places[index]
        return torch.from_numpy(self._file(shard).get_slice("image_tokens")[row, sequence].astype(np.int64))


def read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX_FILE}: the extraction has not finished. Run it again.")
    index = json.loads(file.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise ValueError(f"{file} is of the format {index.get('format')!r}, not {FORMAT!r}.")
    return index


def check_shard(folder: Path, shard: dict[str, Any], verify: bool) -> None:
    """Raise unless the file of a shard is what the index says."""
    file = folder / shard["file"]
    cure = "delete it and run the extraction again."
    if not file.is_file():
        raise FileNotFoundError(f"The token shard {file} is missing: run the extraction again.")
    if file.stat().st_size != shard["bytes"]:
        raise ValueError(f"The token shard {file} has {file.stat().st_size} bytes, not {shard['bytes']}: {cure}")
    if verify and file_sha256(file) != shard["sha256"]:
        raise ValueError(f"The token shard {file} is damaged, its sha256 is not that of the index: {cure}")


def shard_facts(shard: Any) -> dict[str, Any]:
    """What an opened shard says of itself; of other files, that they belong to nothing."""
    return json.loads((shard.metadata() or {}).get(SHARD_FACTS, '{"fingerprint": null}'))


def readable_shard(file: Path) -> bool:
    """Whether a file is a whole safetensors file; its header tells its length."""
    try:
        with safe_open(file, framework="np"):
            return True
    except SafetensorError:
        return False
