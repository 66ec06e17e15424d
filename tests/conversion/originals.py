"""Original checkpoints for the tests: tiny real files, and full-size ones without storage."""

import json

import torch

from tests.testing import REFERENCE
from vfmtok_hf.conversion.read_checkpoint import read_checkpoint


TOKENIZER = REFERENCE / "tokenizer" / "tokenizer.pt"
DINOV2 = REFERENCE / "tokenizer" / "backbone.pt"
AR = REFERENCE / "gpt" / "gpt.pt"
RAR = REFERENCE / "rar" / "model.safetensors"
VFMAE = REFERENCE / "vfmae" / "vfmae.pt"
VFMAE_DINOV2 = REFERENCE / "vfmae" / "backbone.pt"
LATENT_STATISTICS = REFERENCE / "vfmae" / "stats.pt"
DIT = REFERENCE / "ditdh" / "ditdh.pt"

# What the tiny files' shapes cannot tell.
TOKENIZER_CONFIG = {"decoder_num_heads": 4, "vision_config": {"num_attention_heads": 2}}
LIGHT_CONFIG = {
    "decoder_num_heads": 4,
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 24,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 518,
    },
}
AR_CONFIG = {"num_attention_heads": 4, "num_image_tokens": 16}

KINDS = {
    TOKENIZER: "tokenizer",
    DINOV2: "dinov2",
    AR: "ar",
    RAR: "rar",
    VFMAE: "vfmae",
    VFMAE_DINOV2: "dinov2",
    DIT: "dit",
}
GENERATORS = ["gpt_b", "gpt_l", "gpt_xl", "gpt_xxl", "gpt_2b", "gpt_3b", "rar_l", "rar_xl", "rar_xxl"]


def full_size(manifest: str) -> dict[str, torch.Tensor]:
    """The names, shapes and data types of a full-size original network, without storage."""
    entries = json.loads((REFERENCE / "manifests" / f"{manifest}.json").read_text())
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in entries.items()
    }


def tiny(path, weights: str = "ema") -> dict[str, torch.Tensor]:
    """The state dict of one of the files above."""
    kind = KINDS[path]
    return read_checkpoint(path, kind, weights).state_dict


def signature(state_dict) -> list[tuple]:
    """Names, order, shapes and data types."""
    return [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in state_dict.items()]


def assert_equal(actual, expected):
    """The same tensors under the same names, bit for bit."""
    assert sorted(signature(actual)) == sorted(signature(expected))
    assert not [key for key in expected if not torch.equal(actual[key], expected[key])]
