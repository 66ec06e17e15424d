"""Accelerate understands the launch configurations, and the scripts refuse what they cannot do."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.test_repo_rules import ROOT
from vfmtok_hf.training import run as run_module
from vfmtok_hf.training.run import start_accelerator


@pytest.mark.parametrize(("name", "num_machines", "num_processes"), [("one_node_8_gpus", 1, 8), ("many_nodes", 4, 32)])
def test_accelerate_reads_the_configuration(name, num_machines, num_processes):
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (config.num_machines, config.num_processes) == (num_machines, num_processes)
    options = launch_command_parser().parse_args(["--config_file", str(file), "--module", "some.script"])
    options, _, mixed_precision_from_file = _validate_launch_command(options)
    assert options.multi_gpu
    assert options.mixed_precision == "bf16"
    assert mixed_precision_from_file
    assert (options.num_machines, options.num_processes) == (num_machines, num_processes)


def test_the_directory_holds_no_other_configuration():
    files = sorted(file.stem for file in (ROOT / "configs" / "accelerate").iterdir())
    assert files == ["many_nodes", "one_node_8_gpus"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused_before_anything_is_loaded(kind, monkeypatch, tmp_path):
    class Sharded:
        num_processes = 1
        distributed_type = run_module.DistributedType[kind]

    class Arguments:
        mixed_precision = "no"
        tracker = ()
        gradient_accumulation_steps = 1
        seed = 0

    monkeypatch.setattr(run_module, "Accelerator", lambda **options: Sharded())
    with pytest.raises(ValueError, match=f"{kind} is not supported.*one_node_8_gpus.yaml"):
        start_accelerator(Arguments(), tmp_path)
