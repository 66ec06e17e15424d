"""Generators split over processes by FSDP2 train as whole ones do."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.testing import tiny_model
from tests.training.sharded import CONFIGURATIONS, launch_sharded
from tests.training.test_two_processes import DROPOUTS
from tests.training.tiny_runs import copy_until, differences, generator_options, log_of, run, state_of, write_images
from vfmtok_hf import VFMTokPipeline
from vfmtok_hf.training import train_generator
from vfmtok_hf.training.run import finished_checkpoints
from vfmtok_hf.training.sharding import set_up_sharding


ONE_NODE, MANY_NODES = CONFIGURATIONS / "fsdp2_one_node.yaml", CONFIGURATIONS / "fsdp2_many_nodes.yaml"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(output, options, processes, configuration, **sizes)`: a run under FSDP2, or DDP without configuration."""
    root = tmp_path_factory.mktemp("sources")
    data, validation_data = write_images(root / "data"), write_images(root / "validation", images_per_class=3)
    # 5 images in batches of 2: of two processes one has a batch more than the other.
    (validation_data / "disc" / "disc_0.png").unlink()
    tiny_model().save_pretrained(root / "tokenizer")

    def train(output, options, num_processes=2, configuration=None, **sizes):
        options = {"batch_size": 4 // num_processes, "checkpoint_every": 6, "validate_every": 2, **options}
        options = {"validation_data": validation_data, "sample_every": 6, **options}
        argv = generator_options(data, root / "tokenizer", output, **options)

        def process():
            if configuration:
                launch_sharded(configuration, **sizes)
            train_generator.main(argv)

        run(process, num_processes)
        return output

    return train


def without_randomness(generator):
    """What is random by process is off."""
    plain = {"rar_random_until": 0.0, "rar_raster_from": 0.0} | {f"model.{name}": 0.0 for name in DROPOUTS[generator]}
    return {"generator": generator, **plain}


def assert_equal_runs(sharded, whole):
    """Losses, norms and averaged weights, up to sums that are taken in another order."""
    for kind in ("train", "validation"):
        for lines in zip(log_of(sharded, kind), log_of(whole, kind), strict=True):
            assert lines[0] == pytest.approx(lines[1], rel=1e-5)
    weights, expected = (load_file(output / "model" / "model.safetensors") for output in (sharded, whole))
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    for file in ("config.json", "generation_config.json"):
        assert (sharded / "model" / file).read_text() == (whole / "model" / file).read_text()


@pytest.mark.parametrize("generator", ["ar", "rar"])
def test_equals_training_of_whole_models(generator, train, tmp_path):
    """With accumulated gradients for RAR, and its activations computed twice."""
    options = without_randomness(generator)
    if generator == "rar":
        options |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    sharded = train(tmp_path / "sharded", options, configuration=ONE_NODE)
    assert_equal_runs(sharded, train(tmp_path / "whole", options))
    checkpoint = finished_checkpoints(sharded)[-1]
    assert not (checkpoint / "model.safetensors").exists()
    for part in ("pytorch_model_fsdp_0", "optimizer_0", "ema"):
        assert {file.name for file in (checkpoint / part).iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    picture = "samples/step_00000006.png"
    assert (sharded / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()
    VFMTokPipeline.from_pretrained(sharded / "pipeline")


def test_copies_of_a_split_model(train, tmp_path):
    """Two copies, each of them split in two."""
    options = without_randomness("ar")
    sharded = train(tmp_path / "sharded", options, 4, MANY_NODES, dp_replicate_size=2, dp_shard_size=2)
    assert_equal_runs(sharded, train(tmp_path / "whole", options, 4))


def whole_state(checkpoint, folder):
    """All that a sharded checkpoint holds, by file."""
    folder.mkdir()
    for part in ("pytorch_model_fsdp_0", "optimizer_0", "ema"):
        dcp_to_torch_save(checkpoint / part, folder / f"{part}.bin")
    files = [file for file in checkpoint.iterdir() if file.is_file()]
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return state_of(folder)


def test_resumed_it_is_bit_identical(train, tmp_path):
    options = {"generator": "ar", "checkpoint_every": 3, "validate_every": 3}
    whole = train(tmp_path / "whole", options, configuration=ONE_NODE)
    resumed = copy_until(whole, 3, tmp_path / "resumed")
    train(resumed, options | {"resume": True}, configuration=ONE_NODE)
    assert log_of(resumed, "train") == log_of(whole, "train")
    states = [
        whole_state(finished_checkpoints(output)[-1], tmp_path / f"state_{output.name}") for output in (resumed, whole)
    ]
    assert {"ema.bin", "random_states_1.pkl", "custom_checkpoint_0.pkl"} < states[0].keys()
    assert differences(*states) == []

    def refused():
        with pytest.raises(ValueError, match="was written with FSDP2"):
            train_generator.main(refused_argv)
