"""The number of threads for small models."""

import os

import torch
from torch import nn


SMALL = 30_000_000  # parameters


def use_one_thread_for_small_models(*models: nn.Module | None) -> None:
    """
    Use one thread if the models together are small, unless OMP_NUM_THREADS is set.

    Their steps are shorter than the wait for other threads: on a machine with one busy core, the emoji generator was 27
    times slower on two threads than on one.
    """
    num_parameters = sum(p.numel() for model in models if model is not None for p in model.parameters())
    if "OMP_NUM_THREADS" not in os.environ and num_parameters < SMALL:
        torch.set_num_threads(1)


__all__ = ["use_one_thread_for_small_models"]
