"""The pipeline, loaded once for all visitors, and the GPU that ZeroGPU lends to marked functions."""

import os

import torch

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cpu.threads import use_one_thread_for_small_models


try:
    from spaces import GPU as gpu
except ImportError:  # not on the Hub's ZeroGPU hardware

    def gpu(function=None, **settings):
        """Stands for `spaces.GPU`, with or without arguments, and changes nothing."""
        return gpu if function is None else function


def load_pipeline(name_or_path: str) -> VFMTokPipeline:
    """The pipeline, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = VFMTokPipeline.from_pretrained(name_or_path).to(device)
    if device == "cpu":
        use_one_thread_for_small_models(pipe.vq_model, pipe.transformer)
    return pipe


PIPE = load_pipeline(os.environ.get("VFMTOK_MODEL", DEFAULT_CHECKPOINT))
NUM_TOKENS = PIPE.vq_model.config.num_anchors
GRID_SIZE = PIPE.vq_model.config.anchor_grid_size
CODEBOOK_SIZE = PIPE.vq_model.config.codebook_size
