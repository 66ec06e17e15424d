"""
Write checkpoints, and the tokens that vfmtok-hf generates from them without sampling, for the tests of this package.

vfmtok-hf and vLLM pin different versions of torch and transformers, so this script runs in the environment of the former:

    python references.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from vfmtok_hf import (
    DEFAULT_CHECKPOINT,
    VFMTokARConfig,
    VFMTokARForImageGeneration,
    VFMTokRARConfig,
    VFMTokRARForImageGeneration,
)


SIZES = {"codebook_size": 200, "num_classes": 14, "num_image_tokens": 64, "num_hidden_layers": 3}
# Width of a head after which it is padded: 100 as of AR-3B, 88 as of RAR-XXL.
AR = {**SIZES, "hidden_size": 200, "num_attention_heads": 2, "intermediate_size": 256}
RAR = {**SIZES, "hidden_size": 176, "num_attention_heads": 2, "intermediate_size": 256, "num_timestep_embeddings": 66}
# Engine options of the server's guidance, as `generate` takes them.
GUIDANCE = {
    "ar": {"guidance_scale": 2.0, "guidance_interval": 40},
    "rar": {"guidance_scale": 3.0, "guidance_scale_pow": 2.5},
}


@torch.no_grad()
def randomized(model):
    """No weight is trivial, the modulations included, which start at zero."""
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model.eval()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    models = {
        "emoji": VFMTokRARForImageGeneration.from_pretrained(DEFAULT_CHECKPOINT, subfolder="transformer"),
        "ar": randomized(VFMTokARForImageGeneration(VFMTokARConfig(**AR))),
        "rar": randomized(VFMTokRARForImageGeneration(VFMTokRARConfig(**RAR))),
    }
    references = {}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        labels = list(range(model.config.num_classes))
        references[name] = {"folder": str(folder / name), "tokens": model.generate(labels, do_sample=False).tolist()}
        if guidance := GUIDANCE.get(name):
            tokens = model.generate(labels, do_sample=False, **guidance).tolist()
            scales = model.sampling_settings(**guidance).guidance_scales(model.config.num_image_tokens)
            references[name] |= {"guidance": guidance, "guided_tokens": tokens, "guidance_scales": scales}
    (folder / "references.json").write_text(json.dumps(references), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
