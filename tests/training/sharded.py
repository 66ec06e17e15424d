"""Runs under FSDP2 on CPU processes, of which Accelerate itself makes plain DDP."""

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.test_repo_rules import ROOT


CONFIGURATIONS = ROOT / "configs" / "accelerate"


def launch_environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes about sharding."""
    options = launch_command_parser().parse_args(["--config_file", str(file), "--module", "some.script"])
    environment = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_USE_"))
    }


def launch_sharded(file: Path, **variables: str) -> None:
    """
    In a forked process: let training start as the configuration says, but for some environment variables, and let
    Accelerate do on CPUs what it does on GPUs.
    """
    os.environ |= launch_environment(file) | variables
    initialize = AcceleratorState.__init__

    def initialize_for_cpus(state: AcceleratorState, *arguments: Any, **options: Any) -> None:
        initialize(state, *arguments, **options)
        if plugin := options.get("fsdp_plugin"):
            state.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = initialize_for_cpus
