"""Digests that tell files, settings and weights from others."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Hexadecimal SHA-256 of a value that JSON can write, with the entries of dictionaries sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_sha256(*models: nn.Module, skip: tuple[str, ...] = ()) -> str:
    """
    Hexadecimal SHA-256 of the names and values of all weights and buffers, in the loaded precision.

    Args:
        skip (`tuple[str, ...]`): prefixes of the names to leave out.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            if not name.startswith(skip):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
