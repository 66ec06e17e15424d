"""Models split over the processes by FSDP2: what differs from whole ones when they start, are clipped and are saved."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from vfmtok_hf.training.ema import EMA


def set_up_sharding(accelerator: Accelerator, can_shard: bool) -> None:
    """
    Check what the launcher configured, and set the precision of FSDP2.

    In mixed precision the weights are gathered as bfloat16, all layers compute in it, and gradients are summed in
    float32. The rotary tables stay float32, which a cast of the layers' inputs would round.

    Raises:
        ValueError: the launcher shards by other means or in a way that training does not support, or shards a model
            that is not to be sharded.
    """
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if not can_shard:
        raise ValueError(
            f"{kind.value} is supported neither by the training of image tokenizers nor with --lora_rank or --compile. "
            "Launch with configs/accelerate/one_node_8_gpus.yaml; docs/scaling.md tells what fits."
        )
    if kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "DEEPSPEED is not supported. Launch with configs/accelerate/fsdp2_one_node.yaml, which shards as ZeRO-3 "
            "does, and with fsdp_reshard_after_forward: false as ZeRO-2 does. docs/scaling.md tells why."
        )
    plugin = accelerator.state.fsdp_plugin
    supported = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_state_dict_type: SHARDED_STATE_DICT": plugin.state_dict_type.name == "SHARDED_STATE_DICT",
        # Else other models that are loaded, such as the image tokenizer, would be empty on all processes but one.
        "fsdp_cpu_ram_efficient_loading: false": not plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false (the run has gradient_checkpointing)": not plugin.activation_checkpointing,
    }
    missing = [setting for setting, is_given in supported.items() if not is_given]
    if missing:
        raise ValueError(
            f"Training under FSDP needs {'; '.join(missing)}. Launch with configs/accelerate/fsdp2_one_node.yaml."
        )
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def broadcast_weights(model: nn.Module) -> None:
    """Before sharding: fresh weights are random by process, and each would keep its own part of its own."""
    broadcast([tensor.data for tensor in model.state_dict().values()])


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients to the norm `max_norm` if theirs is larger, and return theirs, the same on all processes."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gathered(accelerator: Accelerator, model: PreTrainedModel) -> PreTrainedModel | None:
    """
    A sharded model whole, in main memory, on the main process and None on the others; another model as it is. Called by
    all processes.
    """
    if not accelerator.is_fsdp2:
        return model
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    # Sharding puts a subclass in the place of a model's class.
    model_class = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        whole = model_class(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.generation_config = model.generation_config
    return whole


def checkpoint_averages(accelerator: Accelerator, ema: EMA) -> None:
    """Have the moving average saved and loaded with the rest of a checkpoint; of a sharded one, each process its part."""
    if not accelerator.is_fsdp2:
        accelerator.register_for_checkpointing(ema)
        return

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        dcp.save(ema.state_dict(), checkpoint_id=Path(folder) / "ema")

    def load(models: list[nn.Module], folder: str) -> None:
        state = ema.state_dict()
        dcp.load(state, checkpoint_id=Path(folder) / "ema")
        ema.load_state_dict(state)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
