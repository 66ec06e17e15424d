"""`vfmtok evaluate generation` killed with SIGKILL in the middle, and run again."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.evaluation.folders import write_images
from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.cli import app


NUM_SAMPLES = 80


def start(command: list[str], num_processes: int, log) -> list[subprocess.Popen]:
    """
    What a launcher does, without one between us and the processes to kill. (`accelerate launch` starts a single process on
    CPUs of one machine, whatever number it is given, and torchrun's are of sessions of their own.)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    count = str(num_processes)
    ranks = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, **address}
        for rank in map(str, range(num_processes))
    ]
    environments = ranks if num_processes > 1 else [{}]
    return [subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | more) for more in environments]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Everything but the output: chunks of one sample, so that there are many places to be killed at."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline().save_pretrained(folder / "model")
    write_images(folder / "real", 12)
    return (
        "evaluate", "generation", "--reference", str(folder / "real"), "--features", "own", "-n", str(NUM_SAMPLES),
        "--batch-size", "1", "--npz", "--device", "cpu", "-m", str(folder / "model"), "-o",
    )  # fmt: skip


def run_here(*arguments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    run_here(*arguments, str(output))
    return output / "guidance_1"


def chunks(folder):
    return sorted(folder.glob("chunk_*.npy"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_run_is_continued_bit_for_bit(arguments, uninterrupted, tmp_path, num_processes):
    command = [sys.executable, "-m", "vfmtok_hf", *arguments, str(tmp_path)]
    samples = tmp_path / "guidance_1"
    with (tmp_path / "log").open("w") as log:
        processes = start(command, num_processes, log)
        while len(chunks(samples)) < 5 and all(process.poll() is None for process in processes):
            time.sleep(0.001)
        for process in processes:
            process.kill()
            process.wait()
    # Not yet judged, and some of the samples drawn: it died in the middle.
    assert 5 <= len(chunks(samples)) < NUM_SAMPLES, (tmp_path / "log").read_text()
    kept = {file: file.stat().st_mtime_ns for file in chunks(samples)}

    if num_processes == 1:
        run_here(*arguments, str(tmp_path))
    else:
        with (tmp_path / "log").open("w") as log:
            codes = [process.wait() for process in start(command, num_processes, log)]
        assert codes == [0, 0], (tmp_path / "log").read_text()
        # The second process leaves the judging to the first.
        assert (tmp_path / "log").read_text().count(f"{NUM_SAMPLES} samples in") == 1
    assert [file.name for file in chunks(samples)] == [file.name for file in chunks(uninterrupted)]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    for name in ("samples.npz", "results.json"):
        assert (samples / name).read_bytes() == (uninterrupted / name).read_bytes()
    with np.load(samples / "samples.npz") as archive:
        drawn, labels = archive["arr_0"], archive["arr_1"]
    assert labels.tolist() == list(range(5)) * (NUM_SAMPLES // 5)
    for file, image in zip(chunks(samples), drawn, strict=True):
        assert np.array_equal(np.load(file)[0].transpose(1, 2, 0), image)
