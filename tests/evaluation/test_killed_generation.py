"""`vfmtok evaluate generation` killed with SIGKILL in the middle, and run again."""

import os
import signal
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
# Not `accelerate launch`, which on CPUs of one machine starts a single process whatever number it is given.
LAUNCHERS = {
    1: (sys.executable, "-m"),
    2: (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
}


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
    command = [*LAUNCHERS[num_processes], "vfmtok_hf", *arguments, str(tmp_path)]
    samples = tmp_path / "guidance_1"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while len(chunks(samples)) < 5 and process.poll() is None:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)  # of the launcher and of every process it started
        process.wait()
    # Not yet judged, and some of the samples drawn: it died in the middle.
    assert 5 <= len(chunks(samples)) < NUM_SAMPLES, (tmp_path / "log").read_text()
    kept = {file: file.stat().st_mtime_ns for file in chunks(samples)}

    if num_processes == 1:
        run_here(*arguments, str(tmp_path))
    else:
        subprocess.run(command, check=True, capture_output=True)
    assert [file.name for file in chunks(samples)] == [file.name for file in chunks(uninterrupted)]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    for name in ("samples.npz", "results.json"):
        assert (samples / name).read_bytes() == (uninterrupted / name).read_bytes()
    with np.load(samples / "samples.npz") as archive:
        drawn, labels = archive["arr_0"], archive["arr_1"]
    assert labels.tolist() == list(range(5)) * (NUM_SAMPLES // 5)
    for file, image in zip(chunks(samples), drawn, strict=True):
        assert np.array_equal(np.load(file)[0].transpose(1, 2, 0), image)
