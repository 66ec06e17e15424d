"""
Training on several processes: starting and stopping together, and what differs if FSDP2 or DeepSpeed's ZeRO-2 shard
the model.
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
    Create the `Accelerator` as the launcher configured it, and seed random numbers, differently on each process.

    Args:
        can_shard (`bool`): whether the run can train a sharded model.

    Raises:
        ValueError: a tracker is unknown, or the launcher shards the model in a way that is not supported.
        ImportError: a tracker is not installed.
    """
    accelerator = Accelerator(
        # By default, Accelerate does not connect CPU processes.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=arguments.mixed_precision,
        log_with=check_trackers(arguments.tracker) or None,
        project_dir=output,
    )
    set_up_sharding(accelerator, arguments, can_shard)
    warn_of_single_process(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(arguments.seed, device_specific=True)
    return accelerator


def warn_of_single_process(num_processes: int) -> None:
    """Warn if `accelerate launch --cpu` started one process, as it does for any `--num_processes`."""
    is_launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if is_launched_on_cpu and num_processes == 1:
        logger.warning(
            "one process: `accelerate launch --cpu` starts only one, whatever its --num_processes. For several processes on "
            "CPUs, use torchrun --nproc_per_node N -m vfmtok_hf.training.train_..."
        )


class StopRequest:
    """
    True in a boolean context once `agree` found that any process received SIGTERM or SIGINT. The loop then saves and
    exits. The signal itself does not interrupt anything.
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
        """Call once per step on all processes, so that all of them exit after the same step."""
        self.agreed = any_process(self.accelerator, self.received)

    def __bool__(self) -> bool:
        return self.agreed


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any process. Must be called on all processes."""
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
    Stop all processes if a number on any of them is not finite. Must be called on all, before weights change (with
    DeepSpeed afterwards, see [`clip_gradients`]).

    Args:
        step (`int`): number of finished steps.
        values (`dict[str, torch.Tensor]`): named scalars of this process, the loss and its terms.
        norms (`dict[str, torch.Tensor]`): gradient norms, the same on all processes.
        name_of (callable): name of a training image by its index.
        indices (`torch.LongTensor`): indices of this process's images in the step.

    Raises:
        FloatingPointError: names the terms, and the images of the affected processes. If only a gradient is not finite,
            it names the gradient and the images of all processes.
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
        f"{', '.join(images)}. The last checkpoint is unchanged."
    )


# ---------------------------------------------------------------------------------------------------------------
# Sharded models


def sharding_of(accelerator: Accelerator) -> str | None:
    """The kind of sharding: "FSDP", "DEEPSPEED" or none."""
    kind = accelerator.distributed_type
    return kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None


def set_up_sharding(accelerator: Accelerator, arguments: TrainingArguments, can_shard: bool) -> None:
    """
    Check the launcher's sharding configuration, and add the run's settings to it.

    Raises:
        ValueError: the sharding is not supported, or the model cannot be sharded.
    """
    kind = sharding_of(accelerator)
    if kind is None:
        return
    if not can_shard:
        raise ValueError(
            f"{kind} is not supported for image tokenizers, and not with --lora_rank or --compile. "
            "Launch with configs/accelerate/one_node_8_gpus.yaml; docs/scaling.md describes the alternatives."
        )
    if kind == "FSDP":
        set_up_fsdp(accelerator)
    else:
        set_up_deepspeed(accelerator, arguments)


def set_up_fsdp(accelerator: Accelerator) -> None:
    """
    Check the plugin, and set its precision.

    In mixed precision, weights are gathered in bfloat16, layers compute in bfloat16, and gradients are reduced in
    float32. The layers' inputs are not cast, because that would round the float32 rotary tables.
    """
    plugin = accelerator.state.fsdp_plugin
    supported = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_state_dict_type: SHARDED_STATE_DICT": plugin.state_dict_type.name == "SHARDED_STATE_DICT",
        # Otherwise other loaded models, such as the image tokenizer, would be empty on all processes but one.
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

    Weights stay in float32, because the moving average needs them; DeepSpeed's bfloat16 mode would replace them.
    [`prepare_model`] sets up mixed precision.
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
        ValueError: names the wrong settings, and a configuration that has the right ones.
    """
    missing = [setting for setting, is_given in supported.items() if not is_given]
    if missing:
        raise ValueError(f"Sharded training needs {'; '.join(missing)}. Launch with configs/accelerate/{file}.")


def prepare_model(accelerator: Accelerator, model: nn.Module, mixed_precision: str) -> None:
    """Do what Accelerate does only for unsharded models: autocast, and equal weights on all processes."""
    if accelerator.is_fsdp2:
        # New weights differ between processes, and each process would keep a shard of its own.
        broadcast([tensor.data for tensor in model.state_dict().values()])
    if accelerator.distributed_type == DistributedType.DEEPSPEED and mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """
    Clip gradients to the norm `max_norm`, and return their norm before, which is the same on all processes. DeepSpeed
    clips and steps in the backward pass, and takes no step if the norm is not finite.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return torch.as_tensor(norm.full_tensor() if isinstance(norm, DTensor) else norm, device=accelerator.device)


def gathered(accelerator: Accelerator, model: PreTrainedModel) -> PreTrainedModel | None:
    """
    Gather a sharded model in main memory on the main process; other processes get None. Returns other models unchanged.
    Must be called on all processes.
    """
    if not accelerator.is_fsdp2:
        return model
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    # Sharding replaces a model's class with a subclass.
    model_class = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        whole = model_class(model.config)
    whole.load_state_dict(weights, assign=True)
    whole.generation_config = model.generation_config
    return whole


def save_together(accelerator: Accelerator) -> None:
    """
    DeepSpeed's processes wait for each other after writing their parts. A process that cannot write must wait with them
    before it raises, because otherwise they would wait forever.
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
    """Save and load the moving average with the checkpoint; with FSDP2, each process its shard."""
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
