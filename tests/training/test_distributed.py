"""Generators split over processes by FSDP2 train as whole ones do."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.training.sharded import CONFIGURATIONS, assert_equal_runs, expect, trainer, without_randomness
from tests.training.tiny_runs import copy_until, differences, is_rank, log_of, state_of, terminate_the_second_process
from vfmtok_hf import VFMTokPipeline
from vfmtok_hf.training import train_generator
from vfmtok_hf.training.checkpoints import finished_checkpoints
from vfmtok_hf.training.distributed import set_up_sharding, warn_of_single_process


ONE_NODE, MANY_NODES = CONFIGURATIONS / "fsdp2_one_node.yaml", CONFIGURATIONS / "fsdp2_many_nodes.yaml"
SHARDED_PARTS = ("pytorch_model_fsdp_0", "optimizer_0", "ema")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("generator", ["ar", "rar"])
def test_equals_training_of_whole_models(generator, train, tmp_path):
    """For RAR with accumulated gradients, activations computed twice and weights kept for the backward pass."""
    options, variables = without_randomness(generator), {}
    if generator == "rar":
        options |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
        variables["FSDP_RESHARD_AFTER_FORWARD"] = "false"
    sharded = train(tmp_path / "sharded", options, configuration=ONE_NODE, **variables)
    assert_equal_runs(sharded, train(tmp_path / "whole", options))
    checkpoint = finished_checkpoints(sharded)[-1]
    assert not (checkpoint / "model.safetensors").exists()
    for part in SHARDED_PARTS:
        assert {file.name for file in (checkpoint / part).iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    picture = "samples/step_00000004.png"
    assert (sharded / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()
    VFMTokPipeline.from_pretrained(sharded / "pipeline")


def test_copies_of_a_split_model(train, tmp_path):
    """Two copies, each of them split in two."""
    options = without_randomness("ar")
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    sharded = train(tmp_path / "sharded", options, 4, MANY_NODES, **sizes)
    assert_equal_runs(sharded, train(tmp_path / "whole", options, 4))


def test_mixed_precision_keeps_weights_in_float32(train, tmp_path):
    """It follows the run in float32 within half a unit of bfloat16's 8 bits, as a loss is a mean of many roundings."""
    options = without_randomness("rar")
    mixed = train(tmp_path / "mixed", options | {"mixed_precision": "bf16"}, configuration=ONE_NODE)
    whole = train(tmp_path / "whole", options)
    for lines in zip(log_of(mixed, "validation"), log_of(whole, "validation"), strict=True):
        assert lines[0] != lines[1]
        assert lines[0] == pytest.approx(lines[1], rel=2**-9)
    assert {weight.dtype for weight in load_file(mixed / "model" / "model.safetensors").values()} == {torch.float32}


@pytest.fixture(scope="module")
def run_with_dropout(train, tmp_path_factory):
    options = {"checkpoint_every": 2}
    return train(tmp_path_factory.mktemp("sharded") / "run", options, configuration=ONE_NODE), options


def whole_state(checkpoint, folder):
    """All that a sharded checkpoint holds, by file."""
    folder.mkdir()
    for part in SHARDED_PARTS:
        dcp_to_torch_save(checkpoint / part, folder / f"{part}.bin")
    for file in checkpoint.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    return state_of(folder)


def test_resumed_it_is_bit_identical(run_with_dropout, train, tmp_path):
    whole, options = run_with_dropout
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    train(resumed, options | {"resume": True}, configuration=ONE_NODE)
    assert log_of(resumed, "train") == log_of(whole, "train")
    states = [
        whole_state(finished_checkpoints(output)[-1], tmp_path / f"state_{index}")
        for index, output in enumerate((resumed, whole))
    ]
    assert {f"{part}.bin" for part in SHARDED_PARTS} < states[0].keys()
    assert {"random_states_1.pkl", "custom_checkpoint_0.pkl"} < states[0].keys()
    assert differences(*states) == []


def test_it_is_not_resumed_without_sharding(run_with_dropout, train, tmp_path, monkeypatch):
    whole, options = run_with_dropout
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    monkeypatch.setattr(
        train_generator, "main", expect(ValueError, "was written with FSDP, but this run was launched with none")
    )
    train(resumed, options | {"resume": True})


def test_a_damaged_checkpoint_is_named(run_with_dropout, train, tmp_path, monkeypatch):
    """By both processes, though only one of them reads the file."""
    whole, options = run_with_dropout
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    (finished_checkpoints(resumed)[-1] / "ema" / "__1_0.distcp").write_bytes(b"")
    monkeypatch.setattr(train_generator, "main", expect(ValueError, "step_00000002 cannot be read.*move it away"))
    train(resumed, options | {"resume": True}, configuration=ONE_NODE)


def test_a_process_that_cannot_save_stops_both(train, tmp_path, monkeypatch):
    write_data = FileSystemWriter.write_data

    def fail_on_the_second(*arguments):
        if is_rank(1):
            raise OSError(28, "No space left on device")
        return write_data(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", fail_on_the_second)
    monkeypatch.setattr(train_generator, "main", expect(OSError, "could not be written .*: .Errno 28. No space left"))
    train(tmp_path / "run", {"checkpoint_every": 1}, configuration=ONE_NODE)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_sigterm_to_one_process_stops_both_after_the_same_step(train, tmp_path, monkeypatch):
    terminate_the_second_process(monkeypatch)
    output = train(tmp_path / "run", {}, configuration=ONE_NODE)
    assert [line["step"] for line in log_of(output, "stopped")] == [1]
    assert [folder.name for folder in finished_checkpoints(output)] == ["step_00000001"]


def launched(**options):
    """What training sees of a launch with FSDP."""
    options = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False} | options
    plugin = FullyShardedDataParallelPlugin(**options)
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP, mixed_precision="no", state=SimpleNamespace(fsdp_plugin=plugin)
    )


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("fsdp_version: 2", {"fsdp_version": 1}),
        ("fsdp_state_dict_type: SHARDED_STATE_DICT", {"state_dict_type": "FULL_STATE_DICT"}),
        ("fsdp_cpu_ram_efficient_loading: false", {"cpu_ram_efficient_loading": True}),
        ("fsdp_offload_params: false", {"cpu_offload": True}),
        ("fsdp_activation_checkpointing: false", {"activation_checkpointing": True}),
    ],
)
def test_settings_that_training_does_not_support_are_named(setting, options, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which the plugin sets
    set_up_sharding(launched(), None, can_shard=True)
    with pytest.raises(ValueError, match=f"needs {setting}.*fsdp2_one_node.yaml"):
        set_up_sharding(launched(**options), None, can_shard=True)


@pytest.mark.parametrize("option", [{"lora_rank": 2}, {"compile": True}])
def test_what_needs_whole_models_is_refused(option, train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_generator, "main", expect(ValueError, "FSDP is not supported .*one_node_8_gpus.yaml"))
    train(tmp_path / "run", option, configuration=ONE_NODE)


@pytest.mark.parametrize(
    ("variables", "num_processes", "warns"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, 1, True),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, 2, False),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, False),  # torchrun
        ({}, 1, False),
    ],
)
def test_a_launch_that_starts_one_process_of_many_says_so(variables, num_processes, warns, monkeypatch, caplog):
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    warn_of_single_process(num_processes)
    assert ("torchrun" in caplog.text) == warns
