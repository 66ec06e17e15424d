"""Generators under DeepSpeed's ZeRO-2 train as under DDP."""

import copy

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.training.sharded import CONFIGURATIONS, assert_equal_runs, expect, trainer, without_randomness
from tests.training.tiny_runs import copy_until, differences, is_rank, log_of, state_of, terminate_the_second_process
from vfmtok_hf import VFMTokARForImageGeneration, VFMTokPipeline
from vfmtok_hf.training import train_generator
from vfmtok_hf.training.checkpoints import finished_checkpoints
from vfmtok_hf.training.ema import EMA


pytest.importorskip("deepspeed", reason='needs pip install "vfmtok-hf[deepspeed]"')

ZERO2 = CONFIGURATIONS / "deepspeed_zero2.yaml"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("generator", ["ar", "rar"])
def test_equals_training_by_ddp(generator, train, tmp_path):
    """For RAR with accumulated gradients and activations computed twice; gradients are longer than the limit."""
    options = without_randomness(generator) | {"max_gradient_norm": 0.5}
    if generator == "rar":
        options |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    sharded = train(tmp_path / "sharded", options, configuration=ZERO2)
    assert_equal_runs(sharded, train(tmp_path / "whole", options))
    parts = {file.name for file in (finished_checkpoints(sharded)[-1] / "pytorch_model").iterdir()}
    ranks = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
    assert parts == ranks | {"mp_rank_00_model_states.pt"}
    picture = "samples/step_00000004.png"
    assert (sharded / picture).read_bytes() == (tmp_path / "whole" / picture).read_bytes()
    VFMTokPipeline.from_pretrained(sharded / "pipeline")


def test_mixed_precision_is_that_of_ddp(train, tmp_path):
    """Gradients in float32 are several percent shorter. Weights and their average stay float32."""
    options = without_randomness("ar") | {"mixed_precision": "bf16"}
    sharded = train(tmp_path / "sharded", options, configuration=ZERO2)
    whole = train(tmp_path / "whole", options)
    for kind in ("train", "validation"):
        for lines in zip(log_of(sharded, kind), log_of(whole, kind), strict=True):
            assert lines[0] == pytest.approx(lines[1], rel=1e-3)
    assert {weight.dtype for weight in load_file(sharded / "model" / "model.safetensors").values()} == {torch.float32}


@pytest.fixture(scope="module")
def run_with_dropout(train, tmp_path_factory):
    options = {"checkpoint_every": 2}
    return train(tmp_path_factory.mktemp("sharded") / "run", options, configuration=ZERO2), options


def comparable_state(checkpoint):
    """All that a checkpoint holds, but for two objects of fixed values that are not equal to their likes."""
    state = state_of(checkpoint)
    for rank in (0, 1):
        state[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]["optimizer_state_dict"].pop("loss_scaler")
    return state


def test_resumed_it_is_bit_identical(run_with_dropout, train, tmp_path):
    whole, options = run_with_dropout
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    train(resumed, options | {"resume": True}, configuration=ZERO2)
    assert log_of(resumed, "train") == log_of(whole, "train")
    states = [comparable_state(finished_checkpoints(output)[-1]) for output in (resumed, whole)]
    assert differences(*states) == []


def test_it_is_not_resumed_without_deepspeed(run_with_dropout, train, tmp_path, monkeypatch):
    whole, options = run_with_dropout
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    monkeypatch.setattr(
        train_generator, "main", expect(ValueError, "written with DEEPSPEED, but this run was launched with none")
    )
    train(resumed, options | {"resume": True})


def test_a_damaged_checkpoint_is_named(run_with_dropout, train, tmp_path, monkeypatch):
    """By both processes, though only one of them reads the file."""
    whole, options = run_with_dropout
    resumed = copy_until(whole, 2, tmp_path / "resumed")
    part = "pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (finished_checkpoints(resumed)[-1] / part).write_bytes(b"")
    monkeypatch.setattr(train_generator, "main", expect(ValueError, "step_00000002 cannot be read.*delete it"))
    train(resumed, options | {"resume": True}, configuration=ZERO2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_save_stops_both(rank, train, tmp_path, monkeypatch):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    save = TorchCheckpointEngine.save

    def fail_on_one(*arguments, **options):
        if is_rank(rank):
            raise OSError(28, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(TorchCheckpointEngine, "save", fail_on_one)
    reason = "(.Errno 28. No space left|another process)"
    monkeypatch.setattr(train_generator, "main", expect(OSError, f"could not be written .*: {reason}"))
    train(tmp_path / "run", {"checkpoint_every": 1}, configuration=ZERO2)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("term", ["loss", "gradient_norm"])
def test_what_is_not_finite_on_one_process_changes_nothing(term, train, tmp_path, monkeypatch):
    """Both stop in the third step, with the weights and files of the second."""
    steps = []
    update, forward, backward = EMA.update, VFMTokARForImageGeneration.forward, Accelerator.backward

    def remember_weights(ema):
        update(ema)
        steps.append((ema.model, copy.deepcopy(ema.model.state_dict())))

    def bad(loss, where):
        return loss * torch.inf if (where, len(steps), is_rank(1)) == (term, 2, True) else loss

    def bad_forward(model, **inputs):
        output = forward(model, **inputs)
        if model.training:
            output.loss = bad(output.loss, "loss")
        return output

    monkeypatch.setattr(EMA, "update", remember_weights)
    monkeypatch.setattr(VFMTokARForImageGeneration, "forward", bad_forward)
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: backward(self, bad(loss, "gradient_norm")))
    main = train_generator.main

    def failing(argv):
        with pytest.raises(FloatingPointError, match=f"Not finite at step 2: {term}. .*png"):
            main(argv)
        model, weights = steps[-1]
        assert len(steps) == 2
        assert differences(model.state_dict(), weights) == []

    monkeypatch.setattr(train_generator, "main", failing)
    output = train(tmp_path / "run", {"checkpoint_every": 1, "validate_every": 1}, configuration=ZERO2)
    assert [folder.name for folder in finished_checkpoints(output)] == ["step_00000001", "step_00000002"]
    assert [line["step"] for line in log_of(output, "validation")] == [1, 2]
    VFMTokARForImageGeneration.from_pretrained(output / "model")


def test_sigterm_to_one_process_stops_both_after_the_same_step(train, tmp_path, monkeypatch):
    terminate_the_second_process(monkeypatch)
    output = train(tmp_path / "run", {}, configuration=ZERO2)
    assert [line["step"] for line in log_of(output, "stopped")] == [1]
    assert [folder.name for folder in finished_checkpoints(output)] == ["step_00000001"]
