"""Choose the fastest precision and attention on this machine, and recompute activations."""

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from vfmtok_hf.cpu.attention import fastest_attention
from vfmtok_hf.cpu.precision import MANY_ROWS, is_bfloat16_faster
from vfmtok_hf.training.logs import logger


def choose_mixed_precision(mixed_precision: str) -> str:
    """
    The meaning of `auto` on this machine, "bf16" or "no". The main process decides for all, and logs it.
    """
    if mixed_precision != "auto":
        return mixed_precision
    # By default, Accelerate does not connect CPU processes.
    state = PartialState(cpu=not torch.accelerator.is_available())
    [chosen] = broadcast_object_list(["bf16" if has_fast_bfloat16(state.device) else "no"])
    if state.is_main_process:
        logger.info("mixed_precision auto: %s, which is faster on this machine (%s)", chosen, state.device.type)
    return chosen


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 units. CPUs are timed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and is_bfloat16_faster(MANY_ROWS)


def choose_attention(
    attention: str, device: torch.device, mixed_precision: str, dropout: float, causal: bool = True
) -> str:
    """What `auto` stands for: torch's fused attention, on CPUs that of [`~vfmtok_hf.cpu.attention.fastest_attention`]."""
    if attention != "auto":
        return attention
    return fastest_attention(mixed_precision == "bf16", dropout, causal) if device.type == "cpu" else "sdpa"


def recompute_activations(model: PreTrainedModel) -> None:
    """Have the layers compute their activations again in the backward pass, which takes less memory and more time."""
    # The second name is that of transformers before 5.23; it can go once 5.23 is the lowest version.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
