"""Tiny models of the real classes and the reference numbers, shared by the tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from vfmtok_hf import VFMAEConfig, VFMAEModel, VFMTokConfig, VFMTokModel
from vfmtok_hf.data.token_sets import TokenSet


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
# What the shapes of the reference's tiny checkpoints cannot tell.
REFERENCE_TOKENIZER_CONFIG = {
    "encoder_num_heads": 8,
    "decoder_num_heads": 4,
    "decoder_dropout": 0.0,
    "vision_config": {"num_attention_heads": 2},
}
REFERENCE_AR_CONFIG = {"num_attention_heads": 4, "num_image_tokens": 16}

TINY_VISION_CONFIG = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "num_register_tokens": 2,
}


def tiny_config(**overrides) -> VFMTokConfig:
    """A few thousand parameters: 32 x 32 images, 9 anchors, 3 levels of 4 x 4 features."""
    fields = {
        "vision_config": dict(TINY_VISION_CONFIG),
        "vision_feature_layers": [1, 2, 3],
        "vision_image_size": 32,
        "image_size": 32,
        "num_anchors": 9,
        "hidden_size": 32,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "encoder_num_points": 2,
        "encoder_intermediate_size": 48,
        "decoder_num_layers": 2,
        "decoder_num_heads": 2,
        "decoder_intermediate_size": 40,
        "num_register_tokens": 1,
        "codebook_size": 64,
        "codebook_dim": 4,
        "pixel_decoder_base_channels": 8,
        "pixel_decoder_channel_multipliers": [1, 2, 2],
        "pixel_decoder_num_groups": 4,
    }
    return VFMTokConfig(**{**fields, **overrides})


def tiny_model(**overrides) -> VFMTokModel:
    return VFMTokModel(tiny_config(**overrides)).eval()


def tiny_vfmae_config(**overrides) -> VFMAEConfig:
    """A few thousand parameters: 32 x 32 images, 9 anchors, 3 levels of 8 x 8 features, latents of 4 channels."""
    fields = {
        "vision_config": {**TINY_VISION_CONFIG, "patch_size": 4},
        "vision_feature_layers": [1, 2, 3],
        "vision_image_size": 32,
        "image_size": 32,
        "num_anchors": 9,
        "hidden_size": 32,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "encoder_num_points": 2,
        "encoder_intermediate_size": 48,
        "latent_channels": 4,
        "bottleneck_num_groups": 8,
        "decoder_num_layers": 2,
        "decoder_num_heads": 2,
        "decoder_intermediate_size": 40,
        "pixel_decoder_base_channels": 8,
        "pixel_decoder_channel_multipliers": [1, 2, 2],
        "pixel_decoder_num_groups": 4,
    }
    return VFMAEConfig(**{**fields, **overrides})


def tiny_vfmae(**overrides) -> VFMAEModel:
    return VFMAEModel(tiny_vfmae_config(**overrides)).eval()


def tiny_images(batch_size: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(batch_size, 3, size, size) * 2 - 1


def sequences_of(tokens: TokenSet, index: int) -> torch.Tensor:
    """All token sequences of an image, `(sequences, num_image_tokens)`."""
    first = tokens.first_rows[index]
    return torch.tensor(
        np.stack(tokens.tokens[first : first + tokens.num_views[index]]["image_tokens"]).astype(np.int64)
    )


def reference_tensors(name: str) -> dict[str, torch.Tensor]:
    """Tensors that the original code computed; `name` is a set of the reference README, such as `tokenizer`."""
    return load_file(REFERENCE / name / "tensors.safetensors")


def reference_images(*names: str, model: str = "tokenizer") -> torch.Tensor:
    """The reference's input images of a set, `(batch, 3, height, width)` in [-1, 1]."""
    images = [np.asarray(Image.open(REFERENCE / model / "images" / f"{name}.png")) for name in names]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
