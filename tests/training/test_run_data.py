"""The trainers on every kind of source that they read."""

import shutil

import pytest
import torch

from tests.data.image_sources import image_table, write_arrow, write_folder, write_parquet, write_webdataset
from tests.testing import tiny_model
from tests.training.tiny_runs import (
    copy_until,
    differences,
    generator_options,
    log_of,
    run,
    state_of,
    tokenizer_options,
    write_vision_model,
)
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.transforms import ImageViews
from vfmtok_hf.training import checkpoints, tokenizer_training, train_generator, train_tokenizer
from vfmtok_hf.training.token_extraction import extract_tokens


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return write_vision_model(tmp_path_factory.mktemp("vision") / "model")


def train(data, vision_model, output, num_processes=1, **options):
    """A run through k-means and restarts of codebook rows."""
    defaults = {"adversarial_weight": 0.0, "max_steps": 4, "validate_every": 2}
    argv = tokenizer_options(data, vision_model, output, **{**defaults, **options})
    run(lambda: train_tokenizer.main(argv), num_processes)
    return output


def last_state(output):
    return state_of(checkpoints.finished_checkpoints(output)[-1])


@pytest.fixture
def folder_run(vision_model, tmp_path):
    return train(write_folder(tmp_path / "images"), vision_model, tmp_path / "folder_run", validation_data=None)


def flat_folder(table, folder):
    """Images without classes, some in folders within folders; by name in the order of the rows."""
    images = write_folder(folder)
    shutil.move(images / "second", images / "first" / "99")
    for file in (images / "first").glob("*.png"):
        shutil.move(file, images / file.name)
    return images


@pytest.mark.parametrize("write", [write_parquet, write_webdataset, write_arrow, flat_folder])
def test_the_source_of_the_images_changes_nothing(write, folder_run, vision_model, tmp_path):
    """Weights, averages and optimizer bit for bit: the same crops of the same images, held-out ones and damage too."""
    data = write(image_table(), tmp_path / "data")
    output = train(data, vision_model, tmp_path / "run", validation_data=None)
    assert differences(last_state(output), last_state(folder_run)) == []
    assert log_of(output, "validation") == log_of(folder_run, "validation")
    assert log_of(output, "validation")[-1]["unreadable"] > 0


STREAM = {"streaming": True, "epoch_images": 12, "shuffle_buffer": 4, "batch_size": 2}


@pytest.mark.parametrize(("write", "num_processes", "num_workers"), [(write_webdataset, 1, 2), (write_parquet, 2, 0)])
def test_a_resumed_stream_is_bit_identical(write, num_processes, num_workers, vision_model, tmp_path):
    """Continued amid an epoch, at the step where the codebook gets its first values from the stream's beginning."""
    data = write(image_table(), tmp_path / "data")
    validation = write_folder(tmp_path / "validation")
    options = {**STREAM, "validation_data": validation, "num_workers": num_workers, "max_steps": 6}
    whole = train(data, vision_model, tmp_path / "whole", num_processes, **options)
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    train(data, vision_model, resumed, num_processes, resume=True, **options)
    assert differences(last_state(resumed), last_state(whole)) == []
    for kind in ("train", "validation"):
        # A resumed process has met the damaged images since its start alone.
        lines, expected = ([{**line, "unreadable": 0} for line in log_of(output, kind)] for output in (resumed, whole))
        assert lines == expected


def test_a_generators_stream_resumes_too(tmp_path):
    """Two sequences of each image, tokens anew in every step."""
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    data, validation = write_parquet(image_table(), tmp_path / "data"), write_folder(tmp_path / "validation")
    options = {**STREAM, "validation_data": validation, "num_crops": 0, "codebook_top_k": 2, "generator": "rar"}
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    argvs = [generator_options(data, tmp_path / "tokenizer", output, **options) for output in outputs]
    run(lambda: train_generator.main(argvs[0]))
    copy_until(outputs[0], 4, outputs[1])
    run(lambda: train_generator.main([*argvs[1], "--resume", "true"]))
    assert differences(last_state(outputs[1]), last_state(outputs[0])) == []


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0)])
def test_a_generator_trains_on_streamed_tokens_and_resumes(num_processes, num_workers, tmp_path):
    """Of several files, in another order in each epoch; bit for bit as if it had not stopped."""
    tokenizer = tiny_model()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = open_records(write_folder(tmp_path / "images"))
    extract_tokens(tokenizer, records, tmp_path / "tokens", ImageViews(32, count=2), shard_size=8)
    options = {**STREAM, "validation_data": tmp_path / "tokens", "num_workers": num_workers}
    outputs = [tmp_path / "whole", tmp_path / "resumed"]
    argvs = [generator_options(tmp_path / "tokens", tmp_path / "tokenizer", output, **options) for output in outputs]
    run(lambda: train_generator.main(argvs[0]), num_processes)
    copy_until(outputs[0], 4, outputs[1])
    run(lambda: train_generator.main([*argvs[1], "--resume", "true"]), num_processes)
    assert differences(last_state(outputs[1]), last_state(outputs[0])) == []
    assert not (outputs[0] / "tokens").exists()


def test_a_loss_that_is_not_finite_names_the_images_of_a_stream(vision_model, tmp_path, monkeypatch):
    def nan_loss(objective, *arguments):
        out = forward(objective, *arguments)
        return {**out, "loss": out["loss"] * torch.nan}

    forward = tokenizer_training.TokenizerObjective.forward
    monkeypatch.setattr(tokenizer_training.TokenizerObjective, "forward", nan_loss)
    data, validation = write_parquet(image_table(), tmp_path / "data"), write_folder(tmp_path / "validation")
    argv = tokenizer_options(data, vision_model, tmp_path / "run", **{**STREAM, "validation_data": validation})
    with pytest.raises(
        FloatingPointError, match=r"step 0: loss\..*data, image 0 of part 1/1 in epoch 0, .*image 1 of"
    ):
        train_tokenizer.main(argv)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_data": None}, "cannot be split: pass --validation_data"),
        ({"cache_images": True}, "--cache_images true needs --streaming false"),
        ({"balance_power": 0.5}, "--balance_power needs --streaming false"),
        ({"epoch_images": None}, "--epoch_images"),
    ],
)
def test_what_a_stream_cannot_do_is_said_before_training(options, message, vision_model, tmp_path):
    data = write_parquet(image_table(), tmp_path / "data")
    validation = write_folder(tmp_path / "validation")
    options = {**STREAM, "validation_data": validation, **options}
    argv = tokenizer_options(data, vision_model, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=message):
        train_tokenizer.main(argv)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_balancing_needs_labels(vision_model, tmp_path):
    images = flat_folder(None, tmp_path / "images")
    shutil.rmtree(images / "first")
    argv = tokenizer_options(images, vision_model, tmp_path / "run", balance_power=0.5)
    with pytest.raises(ValueError, match="must contain one folder of images per class"):
        train_tokenizer.main(argv)
