"""Digests that tell whether two models have the same weights."""

import hashlib

import torch
from torch import nn


def weights_sha256(*models: nn.Module, skip: tuple[str, ...] = ()) -> str:
    """
    Hexadecimal SHA-256 of names and values of all weights and buffers, as they are loaded.

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
