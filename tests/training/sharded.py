"""Runs under FSDP2 and DeepSpeed on CPU processes, of which Accelerate itself makes plain DDP."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.test_repo_rules import ROOT
from tests.testing import tiny_model
from tests.training.tiny_runs import DROPOUTS, generator_options, log_of, run, write_images
from vfmtok_hf.training import train_generator


CONFIGURATIONS = ROOT / "configs" / "accelerate"


def launch_environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes about sharding."""
    options = launch_command_parser().parse_args(["--config_file", str(file), "--module", "some.script"])
    options = _validate_launch_command(options)[0]
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ""  # Which only a DeepSpeed configuration file asks for.
        environment = prepare_deepspeed_cmd_env(options)[1]
    else:
        environment = prepare_multi_gpu_env(options)
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_"))
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
        if plugin := options.get("deepspeed_plugin"):
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__ = {}  # Else it compiles a faster gloo, for minutes.
            plugin.set_mixed_precision(options["mixed_precision"])
            plugin.select(_from_accelerator_state=True)
            state.deepspeed_plugins, state._mixed_precision = plugin, "no"
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.DEEPSPEED

    AcceleratorState.__init__ = initialize_for_cpus


def trainer(root: Path) -> Callable[..., Path]:
    """`train(output, options, processes, configuration, **variables)`: sharded, or DDP without configuration."""
    data, validation_data = write_images(root / "data"), write_images(root / "validation", images_per_class=3)
    # 5 images in batches of 2: of two processes one has a batch more than the other.
    (validation_data / "disc" / "disc_0.png").unlink()
    tiny_model().save_pretrained(root / "tokenizer")

    def train(
        output: Path,
        options: dict[str, Any],
        num_processes: int = 2,
        configuration: Path | None = None,
        **variables: str,
    ) -> Path:
        options = {"max_steps": 4, "checkpoint_every": 4, "validate_every": 2, "sample_every": 4, **options}
        options = {"validation_data": validation_data, "batch_size": 4 // num_processes, **options}
        argv = generator_options(data, root / "tokenizer", output, **options)

        def process() -> None:
            if configuration:
                launch_sharded(configuration, **variables)
            train_generator.main(argv)

        run(process, num_processes)
        return output

    return train


def without_randomness(generator: str) -> dict[str, Any]:
    """What is random by process is off."""
    plain = {"rar_random_until": 0.0, "rar_raster_from": 0.0} | {f"model.{name}": 0.0 for name in DROPOUTS[generator]}
    return {"generator": generator, **plain}


def assert_equal_runs(sharded: Path, whole: Path) -> None:
    """Losses, norms and averaged weights, up to sums that are taken in another order."""
    for kind in ("train", "validation"):
        for lines in zip(log_of(sharded, kind), log_of(whole, kind), strict=True):
            assert lines[0] == pytest.approx(lines[1], rel=1e-5)
    weights, expected = (load_file(output / "model" / "model.safetensors") for output in (sharded, whole))
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    for file in ("config.json", "generation_config.json"):
        assert (sharded / "model" / file).read_text() == (whole / "model" / file).read_text()


def expect(error: type[Exception], message: str) -> Callable[[list[str]], None]:
    """A replacement of `main` for runs that fail so on every process."""
    main = train_generator.main

    def failing(argv: list[str]) -> None:
        with pytest.raises(error, match=message):
            main(argv)
        if torch.distributed.is_initialized():
            # The first process is where the others look each other up, which they may still be about to.
            torch.distributed.barrier()

    return failing
