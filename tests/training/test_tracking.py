"""Trackers beside the log."""

import json
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.training.tiny_runs import run
from vfmtok_hf.training.logs import RunLog, check_trackers, start_trackers


@dataclass
class Arguments:
    learning_rate: float = 0.1
    model: dict = field(default_factory=lambda: {"hidden_size": 8})
    init_from: str | None = None


def log_steps(tracker, output, first, last):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(log_with=check_trackers([tracker]), project_dir=output, cpu=True)
    start_trackers(accelerator, Arguments(), output, first)
    log = RunLog(accelerator, output, first, max_steps=6)
    for step in range(first + 1, last + 1):
        log.write("train", step, {"loss": first + 1 / step})
    accelerator.end_training()


def needs(library):
    return pytest.mark.skipif(find_spec(library) is None, reason=f"pip install {library}")


@needs("tensorboard")
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps("tensorboard", tmp_path, 0, 4)
    log_steps("tensorboard", tmp_path, 2, 6)  # killed after step 4, continued from the checkpoint of step 2
    events = EventAccumulator(str(tmp_path / "vfmtok")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events][2] == pytest.approx(2 + 1 / 3)


@needs("trackio")
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


def wandb_records(file):
    """Of an offline run: chunks of checksum, length, type and message, in blocks of 32 KiB, of which there is one."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    assert len(content) < 2**15
    start = 7  # after the header
    while start < len(content):
        end = start + 7 + int.from_bytes(content[start + 4 : start + 6], "little")
        yield Record.FromString(content[start + 7 : end])
        start = end


def log_steps_to_wandb(output, first, last):
    import wandb

    log_steps("wandb", output, first, last)
    wandb.teardown()  # its own process writes the file, and a forked process ends without waiting for it


@needs("wandb")
def test_wandb_continues_the_run_of_the_same_folder(tmp_path, monkeypatch):
    """Offline, in a process of its own: two parts of one run, which `wandb sync` joins by their id."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "run"
    output.mkdir()
    run(lambda: log_steps_to_wandb(output, 0, 2))
    time.sleep(1)  # the folders of the parts have the second in their names
    run(lambda: log_steps_to_wandb(output, 2, 4))
    parts = [list(wandb_records(file)) for file in sorted(output.glob("wandb/offline-run-*/run-*.wandb"))]
    runs = [next(record.run for record in part if record.HasField("run")) for part in parts]
    assert [run.display_name for run in runs] == ["run", "run"]
    assert runs[0].run_id == runs[1].run_id
    config = {item.key: json.loads(item.value_json) for record in parts[0] for item in record.config.update}
    assert config["learning_rate"] == 0.1
    assert config["model"] == '{"hidden_size": 8}'
    history = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for part in parts
        for record in part
        if record.HasField("history")
    ]
    assert [line["_step"] for line in history] == [1, 2, 3, 4]
    assert [line["train/loss"] for line in history] == pytest.approx([1, 1 / 2, 2 + 1 / 3, 2 + 1 / 4])


def test_an_unknown_or_missing_tracker_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="Unknown tracker 'tensorbord'"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        check_trackers(["wandb"])
