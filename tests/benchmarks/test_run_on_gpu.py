"""`benchmarks/run_on_gpu`: what it reports of parts that pass, fail, hang or do not fit, and a trial of real ones."""

import fcntl
import json
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = {"machine": "a card", "torch": "2.11", "date": "2026-01-01"}
WRITE = "from result_tables import write_table; write_table('decode', [{'side': 'ours', 'tokens/s': '%s'}])"


@pytest.fixture
def run_on_gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "run_on_gpu"), run_name="run_on_gpu"))


def run_parts(run_on_gpu, tmp_path, commands, seconds=60.0):
    """The report of parts that run Python code, each with a budget and a table; whether all passed."""
    parts = [
        run_on_gpu.Part(name, [sys.executable, "-c", code], budget, "decode")
        for name, (code, budget) in commands.items()
    ]
    environment = run_on_gpu.environment_of_parts(None, tmp_path)
    passed = run_on_gpu.run_all(parts, time.monotonic() + seconds, environment, FACTS, tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["machine"] == "a card"
    return {part["name"]: part for part in report["parts"]}, passed


def test_parts_that_fail_and_hang_say_so_and_the_others_run(run_on_gpu, tmp_path):
    lock = tmp_path / "held by the child of the part that hangs"
    hang = f"import fcntl, subprocess, sys, time; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    hang += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'], pass_fds=[file.fileno()]); "
    hang += WRITE % 2 + "; print('started', flush=True); time.sleep(900)"
    commands = {
        "good": (WRITE % 1, 30),
        "broken": ("print('before'); raise ValueError('no such card')", 30),
        "hanging": (hang, 10),
        "last": (WRITE % 3, 30),
    }
    parts, passed = run_parts(run_on_gpu, tmp_path, commands, seconds=600)
    assert not passed
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # who is killed takes its children along: nobody holds it any more
    assert [part["status"] for part in parts.values()] == [
        "passed",
        "failed with exit status 1",
        "stopped after 10 s",
        "passed",
    ]
    assert parts["broken"]["last_lines"][0] == "before"
    assert parts["broken"]["last_lines"][-1] == "ValueError: no such card"
    # What a part measured until it was stopped is kept, and counts for no other part.
    rows = {name: [row["tokens/s"] for row in part["rows"]] for name, part in parts.items()}
    assert rows == {"good": ["1"], "broken": [], "hanging": ["2"], "last": ["3"]}
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# a card\n2026-01-01; torch 2.11\n")
    assert "| broken | failed with exit status 1 |" in text
    assert "ValueError: no such card" in text


def test_parts_that_start_at_once_run_beside_those_before_them(run_on_gpu, tmp_path):
    written = tmp_path / "written"
    wait = f"import os, time\nwhile not os.path.exists({str(written)!r}): time.sleep(0.1)"
    write = f"open({str(written)!r}, 'w'); print('printed by the second')"
    parts = [
        run_on_gpu.Part("waits", [sys.executable, "-c", wait], 120),
        run_on_gpu.Part("writes", [sys.executable, "-c", write], 120, at_once=True),
    ]
    environment = run_on_gpu.environment_of_parts(None, tmp_path)
    assert run_on_gpu.run_all(parts, time.monotonic() + 300, environment, FACTS, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert 0 < log.index("=== waits") < log.index("=== writes") < log.index("\nprinted by the second")


def test_parts_that_no_longer_fit_are_reported(run_on_gpu, tmp_path):
    parts, passed = run_parts(run_on_gpu, tmp_path, {"late": ("", 30)}, seconds=run_on_gpu.SHORTEST - 1)
    assert not passed
    assert parts["late"]["status"].startswith("not run: ")


def test_wheels_are_imported_from(run_on_gpu, tmp_path):
    (tmp_path / "wheelhouse").mkdir()
    with zipfile.ZipFile(tmp_path / "wheelhouse" / "some_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/__init__.py", "answer = 42")
    environment = run_on_gpu.environment_of_parts(tmp_path / "wheelhouse", tmp_path)
    code = "import some_package; assert some_package.answer == 42"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_machine_without_the_device_is_told_so_before_any_part_runs(run_on_gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="torch cannot use cuda here"):
        run_on_gpu.read_facts("cuda", run_on_gpu.environment_of_parts(None, tmp_path))


def run_script(tmp_path, *options):
    command = [sys.executable, str(BENCHMARKS / "run_on_gpu"), str(tmp_path), "--device", "cpu", "--tiny", *options]
    completed = subprocess.run(command, capture_output=True, text=True)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert completed.returncode == 0, (tmp_path / "gpu.md").read_text()
    return {part["name"]: part["rows"] for part in report["parts"]}


@pytest.mark.timeout(900)
def test_decoding_and_training_on_a_cpu(tmp_path):
    rows = run_script(tmp_path, "--seconds", "900", "--patience", "10", "--parts", "AR-B", "training step, tokenizer")
    assert rows["compilation, AR-B"] == []
    sides = [(row["batch"], row["side"]) for row in rows["decoding, AR-B"]]
    assert sides == [(batch, side) for batch in "12" for side in ("original", "ours", "ours, compiled")]
    assert [row["side"] for row in rows["training step, tokenizer"]] == ["straightforward", "ours"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_part_on_a_cpu(tmp_path):
    rows = run_script(tmp_path, "--seconds", "3600", "--patience", "20")
    without_table = {name for name in rows if not rows[name]}
    assert without_table == {f"compilation, {model}" for model in ("AR-B", "AR-L", "RAR-L")} | {
        "kernel: build",
        "kernel: tests",
    }
