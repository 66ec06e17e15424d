"""How many threads a small model wants."""

import os

import torch
from torch import nn


SMALL = 30_000_000  # parameters


def use_one_thread_for_small_models(*models: nn.Module | None) -> None:
    """
    One thread for models that are small together, unless OMP_NUM_THREADS says how many.

    Their steps are shorter than the wait for other threads: with a core taken away the embedded checkpoint's generator was
    27 times slower on two threads than on one.
    """
    num_parameters = sum(p.numel() for model in models if model is not None for p in model.parameters())
    if "OMP_NUM_THREADS" not in os.environ and num_parameters < SMALL:
        torch.set_num_threads(1)


__all__ = ["use_one_thread_for_small_models"]
