"""Curves of runs, and what they are read from."""

import json

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from vfmtok_hf import cli
from vfmtok_hf.training.log_file import drop_lines_after, read_log
from vfmtok_hf.training.plot import plot_runs, read_curves


def write_log(run, entries, tail=""):
    run.mkdir()
    lines = [json.dumps({"kind": kind, "step": step, "time": 0.0, **values}) for kind, step, values in entries]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return run


def losses(steps, scale=1.0):
    return [("train", step, {"loss": scale / step, "lr": 0.1}) for step in steps]


def test_curves_are_the_numbers_of_the_log(tmp_path):
    entries = [*losses([1, 2]), ("validation", 2, {"loss": 7.0}), ("resume", 2, {}), *losses([2, 3], 2.0)]
    curves = read_curves(write_log(tmp_path / "run", entries, tail='{"kind": "tra'))
    assert curves == {
        "loss": {"train": {1: 1.0, 2: 1.0, 3: 2 / 3}, "validation": {2: 7.0}},
        "lr": {"train": {1: 0.1, 2: 0.1, 3: 0.1}},
    }


def test_an_interrupted_log_forgets_what_comes_again(tmp_path):
    run = write_log(tmp_path / "run", losses([1, 2, 3]), tail='{"kind": "tra')
    drop_lines_after(run / "log.jsonl", 2)
    assert [entry["step"] for entry in read_log(run / "log.jsonl")] == [1, 2]
    assert (run / "log.jsonl").read_text().endswith("}\n")


def test_several_runs_share_a_picture(tmp_path):
    one, other = (write_log(tmp_path / name, losses(range(1, 9), scale)) for name, scale in (("one", 1), ("two", 9)))
    assert plot_runs([one], tmp_path / "one.png") == 2
    result = CliRunner().invoke(cli.app, ["plot", str(one), str(other), "--output", str(tmp_path / "both.png")])
    assert result.exit_code == 0, result.output
    pixels = [
        np.asarray(PIL.Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3) for name in ("one", "both")
    ]
    colours = [{tuple(pixel) for pixel in np.unique(image, axis=0)} for image in pixels]
    # matplotlib's first two: #1f77b4, #ff7f0e
    assert [((31, 119, 180) in found, (255, 127, 14) in found) for found in colours] == [(True, False), (True, True)]
    CliRunner().invoke(cli.app, ["plot", str(one)])
    assert (one / "curves.png").is_file()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "is no training run: it has no log.jsonl"),
        ("", "has no losses yet"),
        ('{"kind": "stopped", "step": 1, "time": 0.0}\n', "has no losses yet"),
        ("loss 0.5\nloss 0.4\n", "line 1 is not JSON"),
    ],
)
def test_bad_logs_are_one_line_errors(log, message, tmp_path):
    (tmp_path / "run").mkdir()
    if log is not None:
        (tmp_path / "run" / "log.jsonl").write_text(log)
    result = CliRunner().invoke(cli.app, ["plot", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "run" / "curves.png").exists()
