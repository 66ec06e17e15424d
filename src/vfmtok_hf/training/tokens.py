"""Image tokens of a folder, extracted once with a trained tokenizer and kept in a file."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.training.data import ImageFolder
from vfmtok_hf.training.run import logger


class TokenDataset(Dataset):
    """
    One of several augmented variants of each image, as tokens. Which one is a function of (seed, epoch, index).

    Args:
        image_tokens (`torch.LongTensor` of shape `(variants, images, num_image_tokens)`): in [0, codebook_size).
        labels (`list[int]`): class of each image.
        seed (`int`): of the choice.
    """

    def __init__(self, image_tokens: torch.Tensor, labels: list[int], seed: int = 0):
        self.image_tokens = image_tokens
        self.labels = labels
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """`image_tokens` (num_image_tokens,), `label`, `index`."""
        variant = np.random.default_rng((self.seed, self.epoch, index)).integers(len(self.image_tokens))
        return {"image_tokens": self.image_tokens[variant, index].long(), "label": self.labels[index], "index": index}


def load_or_extract_tokens(
    file: Path, tokenizer: VFMTokModel, data: ImageFolder, variants: int, neighbours: int = 1, batch_size: int = 32
) -> torch.Tensor:
    """
    Tokens of `variants` epochs of `data`, `(variants * neighbours, images, num_image_tokens)`. They are read from `file` if it was
    made by the same tokenizer from the same images with the same augmentation, else extracted and written to it.
    """
    fingerprint = _fingerprint(tokenizer, data, variants, neighbours)
    if file.is_file():
        with safe_open(file, framework="pt") as saved:
            if (saved.metadata() or {}).get("fingerprint") == fingerprint:
                return saved.get_tensor("image_tokens")
        logger.info("%s belongs to another tokenizer or other images: extracting anew", file)
    logger.info("extracting tokens of %d images, %d variants", len(data), variants)
    image_tokens = extract_tokens(tokenizer, data, variants, neighbours, batch_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".writing")
    tensors = {"image_tokens": image_tokens, "labels": torch.tensor(data.labels)}
    save_file(tensors, temporary, metadata={"fingerprint": fingerprint, "class_names": json.dumps(data.class_names)})
    os.replace(temporary, file)
    return image_tokens


@torch.no_grad()
def extract_tokens(
    tokenizer: VFMTokModel, data: ImageFolder, variants: int, neighbours: int, batch_size: int
) -> torch.Tensor:
    """
    `(variants * neighbours, images, num_image_tokens)` int32, computed in the tokenizer's own precision without autocast.

    With `neighbours` 2 each image also gives the sequence of its second-nearest codebook rows, as in the training of
    VFMTok-RAR (`encode_topk_indices` and `get_neighboring_codes` of the original's `vq_model.py`).
    """
    loader = DataLoader(data, batch_size=batch_size)
    codebook = tokenizer.quantizer.normalized_codebook()
    extracted = []
    for variant in range(variants):
        data.set_epoch(variant)
        batches = []
        for batch in loader:
            latents = tokenizer.encode(batch["pixel_values"].to(tokenizer.device)).latents
            nearest = (F.normalize(latents.float(), dim=-1) @ codebook.T).topk(neighbours).indices
            # images, num_image_tokens, neighbours -> neighbours, images, num_image_tokens
            batches.append(nearest.movedim(-1, 0).int().cpu())
        extracted.append(torch.cat(batches, dim=1))
    return torch.cat(extracted)


def _fingerprint(tokenizer: VFMTokModel, data: ImageFolder, variants: int, neighbours: int) -> str:
    """Changes with whatever changes the tokens: weights, files, augmentation."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    files = [(str(file.relative_to(file.parents[1])), file.stat().st_size) for file in data.files]
    settings = [data.image_size, data.crop_scale, data.horizontal_flip, data.seed, variants, neighbours, files]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()
