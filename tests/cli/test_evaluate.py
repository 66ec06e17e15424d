"""`vfmtok evaluate`, with tiny checkpoints and the features `own`."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.evaluation.folders import write_color_classes, write_images
from tests.pipelines.tiny_pipeline import tiny_dit_pipeline, tiny_pipeline
from vfmtok_hf import cli
from vfmtok_hf.evaluation.results import measured_results


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline().save_pretrained(folder)
    return folder


def evaluate(*arguments, code=0):
    """Run the command; returns (stdout, stderr)."""
    result = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_reconstruction(model, tmp_path):
    write_images(tmp_path / "images", 12)
    output = tmp_path / "result.json"
    stdout, stderr = evaluate(
        "reconstruction", tmp_path / "images", "--features", "own", "--size", 16, "-m", model, "-o", output
    )
    assert "PSNR" in stdout
    assert "singular" in stderr
    results = measured_results(output)
    assert {"psnr", "ssim", "rfid"} <= {result.metric for result in results}
    assert results[0].setting == "32 -> 16"
    assert "resize reconstruction" in results[0].source


def test_reconstruction_by_a_continuous_autoencoder(tmp_path):
    write_images(tmp_path / "images", 3)
    pipe = tiny_dit_pipeline()
    for part in (pipe.vae, pipe.image_processor):
        part.save_pretrained(tmp_path / "vfmae")
    arguments = ("reconstruction", tmp_path / "images", "-m", tmp_path / "vfmae")
    stdout, stderr = evaluate(*arguments, "--features", "none")
    assert "PSNR" in stdout
    assert "codebook" not in stdout + stderr


def test_generation_sweep_and_its_continuation(model, tmp_path):
    write_images(tmp_path / "real", 12)
    output = tmp_path / "samples"
    arguments = (
        "generation", "--reference", tmp_path / "real", "--features", "own", "-n", 10, "-g", 1, "-g", 2, "--npz",
        "--batch-size", 4, "-m", model, "-o", output,
    )  # fmt: skip
    evaluate(*arguments)
    with (output / "guidance.csv").open() as file:
        assert [row["guidance_scale"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    assert (output / "guidance.png").stat().st_size > 0
    first = (output / "guidance_1" / "samples.npz").read_bytes()
    (output / "guidance_1" / "chunk_000001.npy").unlink()
    evaluate(*arguments)
    assert (output / "guidance_1" / "samples.npz").read_bytes() == first
    with np.load(output / "guidance_2" / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 4] * 2
    assert measured_results(output / "guidance_2" / "results.json")[0].setting == "with guidance"
    chunk = output / "guidance_1" / "chunk_000001.npy"
    chunk.unlink()
    _, stderr = evaluate(*arguments, "-g", 3, "--seed", 7, code=1)
    assert not chunk.exists()  # no scale is drawn where another one cannot be
    assert "contains samples of other settings: seed 0 instead of 7" in stderr


def test_linear_probe(model, tmp_path):
    train, test = (write_color_classes(tmp_path / name, 12, seed) for seed, name in enumerate(("train", "test")))
    options = ("--epochs", 4, "--views", 1, "-m", model, "-o", tmp_path / "probe.json")
    stdout, _ = evaluate("linear-probe", "--train", train, "--test", test, *options)
    assert "image_embeds" in stdout
    assert measured_results(tmp_path / "probe_pixels.json")[0].metric == "top1"


def test_tokens(model, tmp_path):
    write_images(tmp_path / "images", 5)
    evaluate("tokens", tmp_path / "images", "-m", model, "-o", tmp_path / "tokens")
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text())["num_images"] == 5
    for name in ("codebook", "anchors", "sampling"):
        assert (tmp_path / "tokens" / f"{name}.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reconstruction", "missing"), "no file or folder"),
        (("reconstruction", "images", "--features", "./missing"), "no model folder ./missing"),
        (("generation", "--reference", "images", "-o", "out", "-n", 3, "--features", "own"), "more than 3 images"),
        (("linear-probe", "--train", "images", "--test", "images"), "one folder of images per class"),
        (("generation", "--reference", "images", "-o", "out", "-n", 8, "--features", "none"), "choose a network"),
        (
            ("generation", "--reference", "images", "-o", "out", "-n", 8, "--features", "own", "-g", 1, "-g", "inf"),
            "guidance_scale must be",
        ),
        (
            ("generation", "--reference", "images", "-o", "file", "-n", 8, "--features", "own"),
            "is a file, not a folder",
        ),
        (("tokens", "empty"), "no images"),
        (("tokens", "images", "-o", "file"), "is a file, not a folder"),
    ],
)
def test_errors_are_one_line(model, tmp_path, monkeypatch, arguments, message):
    write_images(tmp_path / "images", 12)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    _, stderr = evaluate(*arguments, "-m", model, code=1)
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not (tmp_path / "out").exists()
