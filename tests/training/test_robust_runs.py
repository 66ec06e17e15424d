"""Runs that are stopped, killed, starved of disk space or fed with NaN, on one process."""

import os
import random
import resource
import signal
import time

import pytest
import torch

from tests.training.tiny_runs import (
    copy_until,
    differences,
    log_of,
    run,
    start,
    state_of,
    tokenizer_options,
    write_images,
    write_vision_model,
)
from vfmtok_hf import VFMTokModel
from vfmtok_hf.training import checkpoints, tokenizer_training, train_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return write_images(root / "data"), write_vision_model(root / "vision")


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """An uninterrupted run: epochs of four steps, a checkpoint at each of six."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(lambda: train_tokenizer.main(tokenizer_options(*sources, output)))
    return output


def last_checkpoint(output):
    return checkpoints.finished_checkpoints(output)[-1]


def assert_same_end(output, whole):
    assert differences(state_of(last_checkpoint(output)), state_of(last_checkpoint(whole))) == []
    for kind in ("train", "validation"):
        assert log_of(output, kind) == log_of(whole, kind)
    model, expected = (VFMTokModel.from_pretrained(folder / "model").state_dict() for folder in (output, whole))
    assert differences(model, expected) == []


@pytest.mark.parametrize("step", [1, 5])
def test_resumed_from_any_checkpoint_is_bit_identical(step, whole, sources, tmp_path):
    """Amid the first epoch, before the codebook has its first values, and in the second; the log repeats nothing."""
    output = copy_until(whole, step, tmp_path / "run")
    run(lambda: train_tokenizer.main(tokenizer_options(*sources, output, resume=True)))
    assert [line["step"] for line in log_of(output, "resume")] == [step]
    assert_same_end(output, whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sigterm_saves_and_exits_with_0(num_workers, whole, sources, tmp_path):
    """Sent to the whole process group, as Slurm does: workers that read images live until the trainer is done."""
    output = tmp_path / "run"
    options = tokenizer_options(*sources, output, checkpoint_every=100, num_workers=num_workers)

    def train():
        os.setsid()
        train_tokenizer.main(options)

    processes = start(train)
    while not (output / "log.jsonl").is_file() or not log_of(output, "train"):
        time.sleep(0.01)
    os.killpg(processes[0].pid, signal.SIGTERM)
    processes[0].join()
    assert processes[0].exitcode == 0
    stopped = log_of(output, "stopped")[0]["step"]
    assert [folder.name for folder in (output / "checkpoints").iterdir()] == [f"step_{stopped:08d}"]
    run(lambda: train_tokenizer.main([*options, "--resume", "true"]))
    assert_same_end(output, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_look_is_seen_a_step_later(number, sources, tmp_path, monkeypatch):
    """Between two looks at the flag the answer must not change, or the run would leave without saving."""
    save_model = tokenizer_training.save_model

    def save_model_then_signal(*arguments):
        save_model(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(tokenizer_training, "save_model", save_model_then_signal)
    output = tmp_path / "run"
    run(lambda: train_tokenizer.main(tokenizer_options(*sources, output, checkpoint_every=100)))
    assert [line["step"] for line in log_of(output, "stopped")] == [4]
    assert last_checkpoint(output).name == "step_00000004"


def changed_at(path):
    """Time of the last change; 0 if the path is not there, which may be so from one moment to the next."""
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def test_killed_at_random_moments_loses_only_steps_since_the_last_checkpoint(whole, sources, tmp_path):
    """SIGKILL while a checkpoint is written, or some time later; the end is that of the uninterrupted run."""
    output = tmp_path / "run"
    options = tokenizer_options(*sources, output, checkpoint_every=1, keep_checkpoints=1, resume=True)
    rng = random.Random(0)
    kills = 0
    for attempt in range(40):
        before = checkpoints.finished_checkpoints(output)
        started = time.time()
        process = start(lambda: train_tokenizer.main(options))[0]
        while process.is_alive() and changed_at(output / "checkpoints" / checkpoints.WRITING) < started:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.25 if attempt % 2 else 0.02))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
        after = checkpoints.finished_checkpoints(output)
        # Never without one again, and what it lost are the steps since.
        assert after or not before
        if after:
            state_of(after[-1])
            logged = log_of(output, "train")[-1]["step"] if (output / "log.jsonl").read_text().endswith("\n") else 0
            assert logged <= int(after[-1].name.removeprefix("step_")) + 1
    run(lambda: train_tokenizer.main(options))
    assert kills >= 3
    assert_same_end(output, whole)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_00000006"]


def test_a_full_disk_leaves_the_old_checkpoint(whole, sources, tmp_path):
    """The limit on the size of files stands in for the disk: writing fails in the midst of a file."""
    output = copy_until(whole, 3, tmp_path / "run")
    before = state_of(last_checkpoint(output))
    message = tmp_path / "message"

    def train_with_little_space():
        save_state = checkpoints.Accelerator.save_state

        def save_state_on_a_full_disk(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            return save_state(*arguments)

        checkpoints.Accelerator.save_state = save_state_on_a_full_disk
        try:
            train_tokenizer.main(tokenizer_options(*sources, output, resume=True))
        except OSError as error:
            message.write_text(str(error))

    run(train_with_little_space)
    assert "checkpoint of step 4 could not be written" in message.read_text()
    assert [folder.name for folder in sorted((output / "checkpoints").iterdir())] == [
        "step_00000001",
        "step_00000002",
        "step_00000003",
    ]
    assert differences(state_of(last_checkpoint(output)), before) == []
    run(lambda: train_tokenizer.main(tokenizer_options(*sources, output, resume=True)))
    assert_same_end(output, whole)


def failure(options):
    """What a run in a process of its own raises."""
    from multiprocessing import Pipe

    receiver, sender = Pipe(duplex=False)

    def train():
        try:
            train_tokenizer.main(options)
        except Exception as error:
            sender.send(error)

    process = start(train)[0]
    process.join()
    assert receiver.poll()
    return receiver.recv()


def test_only_a_matching_run_is_continued(whole, sources, tmp_path):
    output = copy_until(whole, 6, tmp_path / "run")
    assert "pass --resume true" in str(failure(tokenizer_options(*sources, output)))
    error = failure(tokenizer_options(*sources, output, resume=True, batch_size=2, learning_rate=1e-3))
    assert "--batch_size 4 -> 2" in str(error)
    assert "learning_rate" not in str(error)
    (output / "arguments.yaml").write_text("generator: ar\n")
    assert "another script or version, with arguments generator" in str(
        failure(tokenizer_options(*sources, output, resume=True))
    )


def test_a_damaged_checkpoint_is_named(whole, sources, tmp_path):
    output = copy_until(whole, 2, tmp_path / "run")
    (last_checkpoint(output) / "optimizer.bin").write_bytes(b"PK")
    assert "step_00000002 cannot be read" in str(failure(tokenizer_options(*sources, output, resume=True)))
    other = copy_until(whole, 2, tmp_path / "other")
    (last_checkpoint(other) / "run.json").write_text('{"num_processes": 2, "sharding": null}')
    assert "written by 2 process(es), but this run has 1" in str(
        failure(tokenizer_options(*sources, other, resume=True))
    )


def test_a_gradient_that_is_not_finite_changes_nothing(sources, tmp_path, monkeypatch):
    """The loss is finite, its gradient is not: weights, averages and checkpoints stay those of the step before."""

    def bad_gradient(accelerator, loss, **options):
        loss.backward()
        if accelerator.optimizer_steps == 2:
            accelerator._models[0].model.pixel_decoder.conv_out.weight.grad[0] = torch.inf
        accelerator.optimizer_steps += 1

    monkeypatch.setattr(checkpoints.Accelerator, "backward", bad_gradient)
    monkeypatch.setattr(checkpoints.Accelerator, "optimizer_steps", 0, raising=False)
    output = tmp_path / "run"
    error = failure(tokenizer_options(*sources, output, adversarial_weight=0.0))
    assert isinstance(error, FloatingPointError)
    assert str(error).startswith("Not finite at step 2: gradient_norm.")
    assert str(error).count(".png") == 4
    assert last_checkpoint(output).name == "step_00000002"
    assert all(tensor.isfinite().all() for tensor in state_of(last_checkpoint(output))["model.safetensors"].values())


def test_a_model_about_to_be_replaced_comes_back(tmp_path):
    """The one moment without `model/`: the run dies between two renames."""
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "config.json").write_text("{}")
    (tmp_path / "model.writing").mkdir()
    (tmp_path / "checkpoints" / checkpoints.WRITING).mkdir(parents=True)
    checkpoints.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model"]
    assert (tmp_path / "model" / "config.json").is_file()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_exported_model_is_the_average_of_its_checkpoint(whole):
    """Validation and export come before the checkpoint of the same step, with the averages in place of the weights."""
    state = state_of(last_checkpoint(whole))
    averages = state["custom_checkpoint_1.pkl"]["averages"]
    exported = VFMTokModel.from_pretrained(whole / "model").state_dict()
    own = {name.removeprefix("model."): tensor for name, tensor in state["model.safetensors"].items()}
    assert differences({name: exported[name] for name in averages}, averages) == []
    assert not torch.equal(exported["pixel_decoder.conv_out.weight"], own["pixel_decoder.conv_out.weight"])
