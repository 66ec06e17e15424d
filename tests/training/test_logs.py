"""The logs of runs, the curves read from them, and `vfmtok plot`."""

import json

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from vfmtok_hf import cli
from vfmtok_hf.training.logs import drop_lines_after, read_curves, read_log


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


def test_the_curves_of_runs_are_plotted_in_the_first_of_them(tmp_path):
    one, other = (write_log(tmp_path / name, losses(range(1, 9), scale)) for name, scale in (("one", 1), ("two", 9)))
    result = CliRunner().invoke(cli.app, ["plot", str(one), str(other)])
    assert result.exit_code == 0, result.output
    pixels = np.asarray(PIL.Image.open(one / "curves.png").convert("RGB")).reshape(-1, 3)
    # matplotlib's first two colors
    assert {(31, 119, 180), (255, 127, 14)} <= {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "is not a training run: it has no log.jsonl"),
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
