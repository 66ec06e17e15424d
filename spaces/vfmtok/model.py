"""The pipeline, loaded once for all visitors, and the decorator for ZeroGPU."""

import os
from pathlib import Path

import torch

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cpu.threads import use_one_thread_for_small_models


try:
    from spaces import GPU as gpu
except ImportError:  # not on the Hub's ZeroGPU hardware

    def gpu(function=None, **settings):
        """Replaces `spaces.GPU`, with or without arguments, and changes nothing."""
        return gpu if function is None else function


def load_pipeline(name_or_path: str | Path) -> VFMTokPipeline:
    """Load the pipeline, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = VFMTokPipeline.from_pretrained(name_or_path).to(device)
    if device == "cpu":
        use_one_thread_for_small_models(pipe.vq_model, pipe.transformer)
    return pipe


MODEL = os.environ.get("VFMTOK_MODEL", DEFAULT_CHECKPOINT)
IS_DEFAULT_CHECKPOINT = MODEL == DEFAULT_CHECKPOINT
PIPE = load_pipeline(MODEL)
# The checkpoint's own sampling options.
SAMPLING = PIPE.transformer.sampling_settings.resolve({}, PIPE.transformer.generation_config)
# Inpainting needs a generator that samples tokens in any order.
CAN_INPAINT = PIPE.transformer.config.model_type == "vfmtok_rar"
NUM_TOKENS = PIPE.vq_model.config.num_anchors
GRID_SIZE = PIPE.vq_model.config.anchor_grid_size
CODEBOOK_SIZE = PIPE.vq_model.config.codebook_size
