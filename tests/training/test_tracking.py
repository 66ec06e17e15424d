"""Trackers beside the log."""

import sys
from dataclasses import dataclass, field

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.training.tiny_runs import run
from vfmtok_hf.training.run import RunLog
from vfmtok_hf.training.tracking import check_trackers, start_trackers


@dataclass
class Arguments:
    learning_rate: float = 0.1
    model: dict = field(default_factory=lambda: {"hidden_size": 8})
    init_from: str | None = None


def log_steps(tracker, output, first, last):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(log_with=check_trackers([tracker]), project_dir=output, cpu=True)
    start_trackers(accelerator, Arguments(), output, first)
    log = RunLog(accelerator, output)
    for step in range(first + 1, last + 1):
        log.write("train", step, {"loss": first + 1 / step})
    accelerator.end_training()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps("tensorboard", tmp_path, 0, 4)
    log_steps("tensorboard", tmp_path, 2, 6)  # killed after step 4, continued from the checkpoint of step 2
    events = EventAccumulator(str(tmp_path / "vfmtok")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events][2] == pytest.approx(2 + 1 / 3)


def test_trackio_continues_the_run_of_the_same_name(tmp_path, monkeypatch):
    """In a process of its own: trackio decides on its folder when it is imported, and leaves threads behind."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    output = tmp_path / "run"
    output.mkdir()

    def log_twice():
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[name]
        from trackio.sqlite_storage import SQLiteStorage

        log_steps("trackio", output, 0, 2)
        log_steps("trackio", output, 2, 4)
        assert SQLiteStorage.get_runs("vfmtok") == ["run"]
        assert [line["step"] for line in SQLiteStorage.get_logs("vfmtok", "run")] == [1, 2, 3, 4]

    run(log_twice)


def test_an_unknown_or_missing_tracker_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="Unknown tracker 'tensorbord'"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        check_trackers(["wandb"])
