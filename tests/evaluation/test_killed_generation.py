"""`vfmtok evaluate generation` killed with SIGKILL in the middle, and run again."""

import os
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.evaluation.folders import write_images
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.training.tiny_runs import run, start
from vfmtok_hf.cli import app


NUM_SAMPLES = 80


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """A function that runs the command; chunks of one sample, so that there are many places to be killed at."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline().save_pretrained(folder / "model")
    write_images(folder / "real", 12)
    arguments = (
        "evaluate", "generation", "--reference", str(folder / "real"), "--features", "own", "-n", str(NUM_SAMPLES),
        "--batch-size", "1", "--npz", "--device", "cpu", "-m", str(folder / "model"), "-o",
    )  # fmt: skip

    def evaluate(output):
        result = CliRunner().invoke(app, [*arguments, str(output)])
        (output / f"log_{os.environ.get('RANK', '0')}").write_text(result.output)
        assert result.exit_code == 0, result.output

    return evaluate


@pytest.fixture(scope="module")
def uninterrupted(evaluate, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    run(lambda: evaluate(output))
    return output / "guidance_1"


def chunks(folder):
    return sorted(folder.glob("chunk_*.npy"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_killed_run_is_continued_bit_for_bit(evaluate, uninterrupted, tmp_path, num_processes):
    samples = tmp_path / "guidance_1"
    processes = start(lambda: evaluate(tmp_path), num_processes)
    while len(chunks(samples)) < 5 and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    for process in processes:
        process.kill()
        process.join()
    # Not yet judged, and some of the samples drawn: it died in the middle.
    assert 5 <= len(chunks(samples)) < NUM_SAMPLES
    kept = {file: file.stat().st_mtime_ns for file in chunks(samples)}

    run(lambda: evaluate(tmp_path), num_processes)
    # The second process leaves the judging to the first.
    logs = [(tmp_path / f"log_{rank}").read_text() for rank in range(num_processes)]
    assert [f"{NUM_SAMPLES} samples in" in log for log in logs] == [True, False][:num_processes]
    assert [file.name for file in chunks(samples)] == [file.name for file in chunks(uninterrupted)]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    for name in ("samples.npz", "results.json"):
        assert (samples / name).read_bytes() == (uninterrupted / name).read_bytes()
    with np.load(samples / "samples.npz") as archive:
        drawn, labels = archive["arr_0"], archive["arr_1"]
    assert labels.tolist() == list(range(5)) * (NUM_SAMPLES // 5)
    for file, image in zip(chunks(samples), drawn, strict=True):
        assert np.array_equal(np.load(file)[0].transpose(1, 2, 0), image)
