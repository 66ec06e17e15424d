"""Accelerate understands the launch configurations, and the scripts refuse what they cannot do."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from tests.training.sharded import CONFIGURATIONS, launch_environment
from vfmtok_hf.training import distributed
from vfmtok_hf.training.distributed import set_up_sharding, start_accelerator


def launch_options(file):
    options = launch_command_parser().parse_args(["--config_file", str(file), "--module", "some.script"])
    return _validate_launch_command(options)[0]


@pytest.mark.parametrize(
    ("name", "num_machines", "num_processes"),
    [
        ("one_node_8_gpus", 1, 8),
        ("many_nodes", 4, 32),
        ("fsdp2_one_node", 1, 8),
        ("fsdp2_many_nodes", 4, 32),
        ("deepspeed_zero2", 1, 8),
    ],
)
def test_accelerate_reads_the_configuration(name, num_machines, num_processes):
    file = CONFIGURATIONS / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (config.num_machines, config.num_processes) == (num_machines, num_processes)
    options = launch_options(file)
    assert (options.num_machines, options.num_processes) == (num_machines, num_processes)
    kinds = {"deepspeed": options.use_deepspeed, "fsdp2": options.use_fsdp}
    assert kinds == {kind: name.startswith(kind) for kind in kinds}
    assert options.multi_gpu == (not any(kinds.values()))


def test_the_directory_holds_no_other_configuration():
    files = sorted(file.stem for file in CONFIGURATIONS.iterdir())
    assert files == ["deepspeed_zero2", "fsdp2_many_nodes", "fsdp2_one_node", "many_nodes", "one_node_8_gpus"]


@pytest.mark.parametrize("name", ["fsdp2_one_node", "fsdp2_many_nodes"])
def test_the_settings_of_fsdp2_reach_the_processes(name, monkeypatch):
    for variable, value in launch_environment(CONFIGURATIONS / f"{name}.yaml").items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    # None: the layers that the model itself names.
    assert plugin.transformer_cls_names_to_wrap is None
    sharded = SimpleNamespace(
        distributed_type=DistributedType.FSDP, mixed_precision="bf16", state=SimpleNamespace(fsdp_plugin=plugin)
    )
    set_up_sharding(sharded, None, can_shard=True)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    if name == "fsdp2_many_nodes":
        sizes = ParallelismConfig()
        assert (sizes.dp_replicate_size, sizes.dp_shard_size) == (4, 8)
    else:
        assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in launch_environment(CONFIGURATIONS / f"{name}.yaml")


def set_up_deepspeed(monkeypatch, **variables):
    """What DeepSpeed is told after a launch by the configuration, but for some environment variables."""
    for variable, value in (launch_environment(CONFIGURATIONS / "deepspeed_zero2.yaml") | variables).items():
        monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    launched = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    arguments = SimpleNamespace(batch_size=3, gradient_accumulation_steps=2, max_gradient_norm=0.5)
    set_up_sharding(launched, arguments, can_shard=True)
    return plugin


def test_deepspeed_has_the_settings_of_the_run(monkeypatch):
    """It would make bfloat16 of the weights."""
    config = set_up_deepspeed(monkeypatch, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1").deepspeed_config
    assert (config["zero_optimization"]["stage"], config["bf16"], config["fp16"]) == (2, *[{"enabled": False}] * 2)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 2)
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("setting", "variable", "value"),
    [
        ("zero_stage: 2 .fsdp2_one_node.yaml", "ZERO_STAGE", "3"),
        ("zero_stage: 2", "ZERO_STAGE", "1"),
        ("offload_optimizer_device: none", "OFFLOAD_OPTIMIZER_DEVICE", "cpu"),
        ("offload_param_device: none", "OFFLOAD_PARAM_DEVICE", "cpu"),
        ("no deepspeed_config_file", "CONFIG_FILE", '{"zero_optimization": {"stage": 2}}'),
    ],
)
def test_settings_of_deepspeed_that_training_does_not_support_are_named(setting, variable, value, monkeypatch):
    with pytest.raises(ValueError, match=f"needs {setting}.*deepspeed_zero2.yaml"):
        set_up_deepspeed(monkeypatch, **{f"ACCELERATE_DEEPSPEED_{variable}": value})


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_that_is_not_supported_is_refused_before_anything_is_loaded(kind, monkeypatch, tmp_path):
    arguments = SimpleNamespace(mixed_precision="no", tracker=(), gradient_accumulation_steps=1, seed=0)
    launched = SimpleNamespace(distributed_type=DistributedType[kind])
    monkeypatch.setattr(distributed, "Accelerator", lambda **options: launched)
    with pytest.raises(ValueError, match=f"{kind} is not supported .*one_node_8_gpus.yaml"):
        start_accelerator(arguments, tmp_path)
