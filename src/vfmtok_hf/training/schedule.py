"""Learning rate and token order (RAR) over the steps of a run."""

import math

import torch

from vfmtok_hf.training.arguments import GeneratorArguments, TrainingArguments


def learning_rate_at(step: int, arguments: TrainingArguments) -> float:
    """
    Linear warm-up to the peak `learning_rate`, then constant, or a half cosine or linear decay to
    `final_learning_rate` times the peak at `max_steps`.

    Args:
        step (`int`): number of finished steps.
    """
    peak, final, warmup_steps = arguments.learning_rate, arguments.final_learning_rate, arguments.warmup_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if arguments.schedule == "constant":
        return peak
    share = min((step - warmup_steps) / max(arguments.max_steps - warmup_steps, 1), 1.0)
    remaining = 1 - share if arguments.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return peak * (final + (1 - final) * remaining)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def random_ratio_at(step: int, arguments: GeneratorArguments) -> float:
    """Probability of a random order in RAR's annealing: 1, then linearly to 0, then 0."""
    start, end = (share * arguments.max_steps for share in (arguments.rar_random_until, arguments.rar_raster_from))
    return min(max((end - step) / max(end - start, 1), 0.0), 1.0)
