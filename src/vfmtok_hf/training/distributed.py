"""
Training on several processes: how they start and stop together, and what differs from whole copies where FSDP2 or
DeepSpeed's ZeRO-2 split a model over them.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast, gather_object, set_seed
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from vfmtok_hf.cpu.packing import keep_freed_memory
from vfmtok_hf.training.arguments import TrainingArguments
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.logs import check_trackers, logger


def start_accelerator(arguments: TrainingArguments, output: Path, can_shard: bool = False) -> Accelerator:
    """
    Accelerate as the launcher set it up, with seeded random numbers. Random numbers differ between processes.

    Args:
        can_shard (`bool`): whether the run can train a model that is split over the processes.

    Raises:
        ValueError: a tracker is unknown, or the launcher shards the model in a way that is not supported.
        ImportError: a tracker is not installed.
    """
    accelerator = Accelerator(
        # Without being told, Accelerate would not connect processes that have no accelerator.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=arguments.mixed_precision,
        log_with=check_trackers(arguments.tracker) or None,
        project_dir=output,
    )
    if (
        os.environ.get("ACCELERATE_USE_CPU") == "True"
        and "MASTER_ADDR" in os.environ
        and accelerator.num_processes == 1
    ):
        logger.warning(
            "one process: `accelerate launch --cpu` starts no more, whatever its --num_processes. Several processes on "
            "CPUs: torchrun --nproc_per_node N -m vfmtok_hf.training.train_..."
        )
    set_up_sharding(accelerator, arguments, can_shard)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(arguments.seed, device_specific=True)
    return accelerator


class StopRequest:
    """
    True in a boolean context once `agree` has learned of a SIGTERM or SIGINT to any process: the loop then saves and
    leaves. The signal itself interrupts nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False
        self.agreed = False
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._receive)

    def _receive(self, signal_number: int, frame: Any) -> None:
        self.received = True

    def agree(self) -> None:
        """Once a step, on all processes, so that all of them leave after the same one."""
        self.agreed = any_process(self.accelerator, self.received)

    def __bool__(self) -> bool:
        return self.agreed


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process. Called by all of them."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0


def check_losses(
    accelerator: Accelerator,
    step: int,
    values: dict[str, torch.Tensor],
    norms: dict[str, torch.Tensor],
    name_of: Callable[[int], str],
    indices: torch.Tensor,
) -> None:
    """
    Stop all processes if a number of any of them is not finite. Called by all, before weights change (under DeepSpeed
    after it, see [`clip_gradients`]).

    Args:
        step (`int`): steps done before this one.
        values (`dict[str, torch.Tensor]`): named scalars of this process: the loss and its terms.
        norms (`dict[str, torch.Tensor]`): of gradients, the same on all processes.
        name_of (callable): name of a training image by its index.
        indices (`torch.LongTensor`): of the images that this process had in the step.

    Raises:
        FloatingPointError: names the terms, and the images of the processes whose terms they are. If all terms are
            finite and a gradient is not, it names that and the images of all processes.
    """
    is_bad = ~torch.stack([value.detach().isfinite() for value in (values | norms).values()])
    if not any_process(accelerator, bool(is_bad.any())):
        return
    bad = [name for name, flag in zip(values | norms, is_bad.tolist(), strict=True) if flag]
    own = [name for name in bad if name in values]
    found = gather_object([(own, bad, [name_of(index) for index in indices.tolist()])])
    culprits = [(own, images) for own, _, images in found if own] or [(bad, images) for _, bad, images in found]
    names = dict.fromkeys(name for bad, _ in culprits for name in bad)
    images = [image for _, images in culprits for image in images]
    raise FloatingPointError(
        f"Not finite at step {step}: {', '.join(names)}. Lower the learning rate or check these images: "
        f"{', '.join(images)}. The last checkpoint is unharmed."
    )


# ---------------------------------------------------------------------------------------------------------------
# Models that are split over the processes


def sharding_of(accelerator: Accelerator) -> str | None:
    """What splits the training over the processes: "FSDP", "DEEPSPEED" or nothing."""
    kind = accelerator.distributed_type
    return kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None


def set_up_sharding(accelerator: Accelerator, arguments: TrainingArguments, can_shard: bool) -> None:
    """
    Check what the launcher configured, and hand the run's settings on to what shards.

    Raises:
        ValueError: the launcher shards in a way that training does not support, or shards a model that is not to be
            sharded.
    """
    kind = sharding_of(accelerator)
    if kind is None:
        return
    if not can_shard:
        raise ValueError(
            f"{kind} is supported neither by the training of image tokenizers nor with --lora_rank or --compile. "
            "Launch with configs/accelerate/one_node_8_gpus.yaml; docs/scaling.md tells what fits."
        )
    if kind == "FSDP":
        set_up_fsdp(accelerator)
    else:
        set_up_deepspeed(accelerator, arguments)


def set_up_fsdp(accelerator: Accelerator) -> None:
    """
    Check the plugin, and set its precision.

    In mixed precision the weights are gathered as bfloat16, all layers compute in it, and gradients are summed in
    float32. The rotary tables stay float32, which a cast of the layers' inputs would round.
    """
    plugin = accelerator.state.fsdp_plugin
    supported = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_state_dict_type: SHARDED_STATE_DICT": plugin.state_dict_type.name == "SHARDED_STATE_DICT",
        # Else other models that are loaded, such as the image tokenizer, would be empty on all processes but one.
        "fsdp_cpu_ram_efficient_loading: false": not plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false (the run has gradient_checkpointing)": not plugin.activation_checkpointing,
    }
    require(supported, "fsdp2_one_node.yaml")
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def set_up_deepspeed(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """
    Check the plugin, and give it the run's batch size, accumulation and clipping.

    The weights stay float32, since the moving average is of them: DeepSpeed's bfloat16 would replace them.
    [`prepare_model`] sees to mixed precision.
    """
    plugin = accelerator.state.deepspeed_plugin
    supported = {
        "zero_stage: 2 (fsdp2_one_node.yaml shards as ZeRO-3 does)": plugin.zero_stage == 2,
        "offload_optimizer_device: none": plugin.offload_optimizer_device == "none",
        "offload_param_device: none": plugin.offload_param_device == "none",
        "no deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in os.environ,
    }
    require(supported, "deepspeed_zero2.yaml")
    plugin.deepspeed_config |= {
        "bf16": {"enabled": False},
        "train_micro_batch_size_per_gpu": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "gradient_clipping": arguments.max_gradient_norm,
    }


def require(supported: dict[str, bool], file: str) -> None:
    """
    Raises:
        ValueError: names the settings that are false, and the configuration that has them all.
    """
    missing = [setting for setting, is_given in supported.items() if not is_given]
    if missing:
        raise ValueError(f"Sharded training needs {'; '.join(missing)}. Launch with configs/accelerate/{file}.")


def prepare_model(accelerator: Accelerator, model: nn.Module, mixed_precision: str) -> None:
    """What Accelerate does to whole models, and leaves undone for those that it hands to FSDP2 or DeepSpeed."""
    if accelerator.is_fsdp2:
        # Fresh weights are random by process, and each would keep its own part of its own.
        broadcast([tensor.data for tensor in model.state_dict().values()])
    if accelerator.distributed_type == DistributedType.DEEPSPEED and mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """
    Scale the gradients to the norm `max_norm` if theirs is larger, and return theirs, the same on all processes.
    DeepSpeed has done so, and its step, in the backward pass; where the norm is not finite it takes no step.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm, device=accelerator.device)


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


def save_together(accelerator: Accelerator) -> None:
    """
    DeepSpeed's processes wait for each other once they have written their parts. Let one that cannot write wait with
    them before it raises: else they would wait for ever.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    from deepspeed import comm

    engine = accelerator.deepspeed_engine_wrapped.engine
    save_checkpoint = engine.save_checkpoint

    def save(*arguments: Any) -> None:
        try:
            save_checkpoint(*arguments)
        except Exception:
            comm.barrier()
            raise

    engine.save_checkpoint = save


def checkpoint_averages(accelerator: Accelerator, ema: EMA) -> None:
    """Have the moving average saved and loaded with the rest of a checkpoint; under FSDP2, each process its part."""
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
