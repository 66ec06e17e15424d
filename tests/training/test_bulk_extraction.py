"""Tokens that datatrove's tasks extract are those of the command that needs no datatrove."""

import os
import re
import stat
import sys
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.testing import tiny_model
from vfmtok_hf.cli import app
from vfmtok_hf.training import token_extraction


pytest.importorskip("datatrove", reason="vfmtok-hf[datatrove] brings it")
from vfmtok_hf.training.bulk_extraction import WriteShards


OPTIONS = ["--num-crops", "2", "--shard-size", "3"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(11):
        file = root / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (36, 40, 3), np.uint8)).save(file)
    (root / "class0" / "damaged.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def expected(tokenizer, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens") / "expected"
    run(tokenizer, images, output)
    return contents(output)


def run(tokenizer, images, output, *options):
    arguments = ["extract-tokens", str(images), "--output", str(output), "--model", str(tokenizer)]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", *OPTIONS, *options])
    assert result.exit_code == 0, result.output
    return result


# Shards that take long enough to be interrupted.
SLOW_OPTIONS = ["--num-crops", "200", "--shard-size", "1"]
TASKS = 4


@pytest.fixture(scope="module")
def expected_slow(tokenizer, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens") / "expected"
    run(tokenizer, images, output, *SLOW_OPTIONS)
    return contents(output)


@pytest.fixture
def launch(tokenizer, images, tmp_path):
    """A function that starts the command with four tasks, two at a time, as a process."""
    arguments = [
        "extract-tokens",
        images,
        "--output",
        tmp_path,
        "--model",
        tokenizer,
        "--device",
        "cpu",
        *SLOW_OPTIONS,
    ]
    command = [sys.executable, "-m", "vfmtok_hf", *map(str, arguments)]
    command += ["--executor", "local", "--tasks", str(TASKS), "--workers", "2"]
    drivers = []

    def start():
        drivers.append(psutil.Popen(command))
        return drivers[-1]

    yield start
    for driver in drivers:
        end(driver)


def end(driver):
    """Kill the command and its workers, which would wait for it forever."""
    with suppress(psutil.NoSuchProcess):
        family = [*driver.children(recursive=True), driver]
        for process in family:
            process.kill()
        psutil.wait_procs(family)


def shards_of(folder):
    """Files by number, with what changes when they are written again."""
    return {int(file.stem[-5:]): (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("tokens-*")}


def running_tasks(driver):
    """Workers by the task that they run, which shows in their open log."""
    logs = [(worker, file.path) for worker in driver.children(recursive=True) for file in worker.open_files()]
    tasks = [(re.search(r"/shards/logs/task_(\d+)\.log$", path), worker) for worker, path in logs]
    return {int(found[1]): worker for found, worker in tasks if found}


def poll(condition, driver):
    """Wait for a condition, as long as the driver lives."""
    while not (found := condition()):
        assert driver.is_running()
        time.sleep(0.005)
    return found


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_tasks_write_the_same_bytes(tokenizer, images, expected, tmp_path):
    assert len(expected) == 5
    options = ["--executor", "local", "--tasks", "3", "--workers", "2", "--num-workers", "1"]
    run(tokenizer, images, tmp_path / "tokens", *options)
    assert contents(tmp_path / "tokens") == expected
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "tokens").iterdir() if file.is_file()}
    (tmp_path / "mine").touch()
    assert modes == {stat.S_IMODE((tmp_path / "mine").stat().st_mode)}


def test_only_what_is_missing_is_made_again(tokenizer, images, expected, tmp_path, monkeypatch):
    options = ["--executor", "local", "--tasks", "2", "--workers", "1"]
    run(tokenizer, images, tmp_path, *options)
    shards = sorted(name for name in expected if name.endswith(".parquet"))
    (tmp_path / shards[2]).unlink()
    written, write_shard = [], token_extraction.TokenExtraction.write_shard
    monkeypatch.setattr(
        token_extraction.TokenExtraction,
        "write_shard",
        lambda self, number, *others: written.append(number) or write_shard(self, number, *others),
    )
    run(tokenizer, images, tmp_path, *options)
    assert written == [2]
    assert contents(tmp_path) == expected
    run(tokenizer, images, tmp_path, *options)
    assert written == [2]


@pytest.mark.parametrize(("gpus", "num_jobs_on_gpus"), [([], 0), (["--gpus-per-task", "2"], 2)])
def test_slurm_gets_an_array_and_the_index_after_it(tokenizer, images, tmp_path, monkeypatch, gpus, num_jobs_on_gpus):
    """`sbatch` here keeps the scripts that it is given, and runs none."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f'#!/bin/sh\ncat "$(printf "%s\\n" "$@" | tail -n 1)" >> {tmp_path}/scripts\necho "Submitted batch job 7"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    options = ["--executor", "slurm", "--tasks", "4", "--workers", "2", "--partition", "gpu", "--time", "1:00:00"]
    options += ["--num-workers", "3", *gpus]
    run(tokenizer, images, tmp_path / "tokens", *options)
    scripts = (tmp_path / "scripts").read_text()
    assert re.search(r"#SBATCH --array=0-3%2", scripts)
    assert re.search(r"#SBATCH --dependency=after\w+:7", scripts)
    # The array, the index, and after each datatrove's own job that adds up statistics.
    assert scripts.count("#SBATCH --partition=gpu") == 4
    assert scripts.count("#SBATCH --cpus-per-task=4") == 2
    assert scripts.count("#SBATCH --mem-per-cpu=4G") == 2
    # Neither the index nor the job after it. The one after the array has the array's, which datatrove decides.
    assert scripts.count("--gpus") == scripts.count("#SBATCH --gpus=2") == num_jobs_on_gpus
    assert "--qos" not in scripts


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--executor", "slurm"], "--partition"),
        (["--tasks", "4"], "--tasks"),
        (["--executor", "local", "--gpus-per-task", "1"], "--gpus-per-task"),
        (["--executor", "ray", "--qos", "high"], "--qos"),
    ],
)
def test_options_that_do_not_fit_the_executor_are_refused(tokenizer, images, tmp_path, options, named):
    arguments = ["extract-tokens", str(images), "--output", str(tmp_path), "--model", str(tokenizer)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 1
    assert named in result.output


def test_images_are_looked_for_before_datatrove_is_imported(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.delitem(sys.modules, "vfmtok_hf.training.bulk_extraction", raising=False)
    arguments = ["extract-tokens", str(tmp_path / "absent"), "--output", str(tmp_path), "--model", str(tokenizer)]
    result = CliRunner().invoke(app, [*arguments, "--executor", "local"])
    assert result.exit_code == 1
    assert "absent" in result.output


def test_tasks_share_the_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)

    def devices(device):
        return [str(WriteShards(None, device).device_of(rank)) for rank in range(3)]

    assert devices(None) == devices("cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices("cuda:1") == ["cuda:1"] * 3
    assert devices("cpu") == ["cpu"] * 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_loses_nothing(images, expected_slow, tmp_path, launch):
    """The other tasks are finished. The driver waits forever for the killed one: it is ended and started again."""
    driver = launch()
    poll(lambda: shards_of(tmp_path), driver)
    task, worker = poll(lambda: running_tasks(driver), driver).popitem()
    worker.kill()
    others = {number for number in range(num_images(images)) if number % TASKS != task}
    poll(lambda: others <= shards_of(tmp_path).keys(), driver)
    end(driver)
    before = shards_of(tmp_path)
    assert len(before) < num_images(images)  # a shard of the killed task is missing
    assert launch().wait() == 0
    after = shards_of(tmp_path)
    assert {number: after[number] for number in before} == before
    assert contents(tmp_path) == expected_slow


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_loses_nothing(images, expected_slow, tmp_path, launch):
    """It is started again at once, beside workers that have not noticed yet."""
    driver = launch()
    poll(lambda: shards_of(tmp_path), driver)
    workers = driver.children(recursive=True)
    driver.kill()
    assert len(shards_of(tmp_path)) < num_images(images)
    assert launch().wait() == 0
    for worker in workers:
        end(worker)
    assert contents(tmp_path) == expected_slow


def num_images(folder):
    return len(list(folder.glob("*/*")))
