"""Two processes on one CPU: they equal one process with the double batch, and they resume, stop and fail together."""

import pytest
import torch
from safetensors.torch import load_file

from tests.testing import tiny_model
from tests.training.tiny_runs import (
    DROPOUTS,
    copy_until,
    differences,
    generator_options,
    is_rank,
    log_of,
    run,
    state_of,
    terminate_the_second_process,
    tokenizer_options,
    write_images,
    write_vision_model,
)
from vfmtok_hf.training import checkpoints, tokenizer_training, train_generator, train_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return write_images(root / "data"), write_vision_model(root / "vision")


@pytest.fixture(scope="module")
def pair(sources, tmp_path_factory):
    """A run of two processes through dropout, k-means, restarts of codebook rows and a discriminator."""
    output = tmp_path_factory.mktemp("pair") / "run"
    run(lambda: train_tokenizer.main(tokenizer_options(*sources, output, batch_size=2)), num_processes=2)
    return output


def last_state(output):
    return state_of(checkpoints.finished_checkpoints(output)[-1])


def test_resumed_on_two_processes_is_bit_identical(pair, sources, tmp_path):
    output = copy_until(pair, 3, tmp_path / "run")
    options = tokenizer_options(*sources, output, batch_size=2, resume=True)
    run(lambda: train_tokenizer.main(options), num_processes=2)
    assert {"random_states_0.pkl", "random_states_1.pkl"} < last_state(output).keys()
    assert differences(last_state(output), last_state(pair)) == []
    assert log_of(output, "train") == log_of(pair, "train")


def assert_close(pair, single, atol):
    """Weights, averages and optimizer moments. Sums over the batch are taken in another order: float32 rounding."""
    ours, theirs = (checkpoints.finished_checkpoints(output)[-1] for output in (pair, single))
    for name, tensor in load_file(ours / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(theirs / "model.safetensors")[name], atol=atol, rtol=0, msg=name)
    for kind in ("train", "validation"):
        for lines in zip(log_of(pair, kind), log_of(single, kind), strict=True):
            assert lines[0] == pytest.approx(lines[1], rel=1e-3)


# Adam divides by the root of the second moment: where a gradient is rounding alone, its sign decides on a step of the
# full learning rate. With eps = 1e-8 that is seen; the tolerance is a fraction of one step of 2e-3.
STEP = 2e-3


def test_two_processes_equal_one_with_the_double_batch(sources, tmp_path):
    """Without what is random by process, such as dropout."""
    model = {"decoder_dropout": 0.0}
    outputs = []
    for num_processes, batch_size in ((2, 2), (1, 4)):
        outputs.append(tmp_path / f"{num_processes}")
        options = tokenizer_options(*sources, outputs[-1], batch_size=batch_size, model=model)
        run(lambda options=options: train_tokenizer.main(options), num_processes)
    assert_close(*outputs, atol=STEP / 10)
    usage = [last_state(output)["custom_checkpoint_2.pkl"] for output in outputs]
    assert sorted(usage[0]["history"].tolist()) == sorted(usage[1]["history"].tolist())
    assert differences(usage[0]["idle_steps"], usage[1]["idle_steps"]) == []


def test_nan_on_one_process_stops_both(sources, tmp_path, monkeypatch):
    """Both say which images: those of the process that failed, and nothing is saved."""
    output = tmp_path / "run"
    forward = tokenizer_training.TokenizerObjective.forward

    def nan_on_the_second(objective, *arguments):
        out = forward(objective, *arguments)
        if is_rank(1):
            out["loss"] = out["loss"] * torch.nan
        return out

    def train():
        try:
            train_tokenizer.main(tokenizer_options(*sources, output, batch_size=2))
        except FloatingPointError as error:
            (tmp_path / f"message{int(is_rank(1))}").write_text(str(error))

    monkeypatch.setattr(tokenizer_training.TokenizerObjective, "forward", nan_on_the_second)
    run(train, num_processes=2)
    messages = [(tmp_path / f"message{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("Not finite at step 0: loss.")
    assert messages[0].count(".png") == 2
    assert not (output / "checkpoints").exists()
    assert not (output / "model").exists()


def test_sigterm_to_one_process_stops_both_after_the_same_step(sources, tmp_path, monkeypatch):
    output = tmp_path / "run"
    terminate_the_second_process(monkeypatch)
    run(lambda: train_tokenizer.main(tokenizer_options(*sources, output, batch_size=2)), num_processes=2)
    assert [line["step"] for line in log_of(output, "stopped")] == [1]
    assert [folder.name for folder in (output / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_process_that_cannot_save_stops_both(sources, tmp_path, monkeypatch):
    output = tmp_path / "run"
    save_state = checkpoints.Accelerator.save_state

    def fail_on_the_second(accelerator, folder):
        save_state(accelerator, folder)
        if is_rank(1):
            raise OSError(28, "No space left on device")

    def train():
        with pytest.raises(OSError, match="checkpoint of step 1 could not be written"):
            train_tokenizer.main(tokenizer_options(*sources, output, batch_size=2))

    monkeypatch.setattr(checkpoints.Accelerator, "save_state", fail_on_the_second)
    run(train, num_processes=2)
    assert list((output / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("generator", ["ar", "rar"])
def test_generators_on_two_processes(generator, sources, tmp_path):
    """Equal to one process with the double batch, without dropout and random orders; with them, resumed exactly."""
    tiny_model().save_pretrained(tmp_path / "tokenizer")

    def train(name, num_processes, **options):
        batch_size = 4 // num_processes
        output = tmp_path / name
        argv = generator_options(
            sources[0], tmp_path / "tokenizer", output, generator=generator, batch_size=batch_size, **options
        )
        run(lambda: train_generator.main(argv), num_processes)
        return output

    plain = {"rar_random_until": 0.0, "rar_raster_from": 0.0}
    plain |= {f"model.{name}": 0.0 for name in DROPOUTS[generator]}
    assert_close(train("pair", 2, **plain), train("single", 1, **plain), atol=3e-3 / 10)

    whole = train("whole", 2)
    resumed = copy_until(whole, 3, tmp_path / "resumed")
    train("resumed", 2, resume=True)
    assert differences(last_state(resumed), last_state(whole)) == []
