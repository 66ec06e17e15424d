"""The evaluation commands on what the `datasets` library reads: the same numbers as on the files it was made of."""

import json
import tarfile
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from tests.evaluation.folders import write_color_classes, write_images
from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.cli import app


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def error_of(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 1
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Five images of odd sizes as files, parquet, arrow, a folder of `save_to_disk` and a WebDataset tar."""
    root = tmp_path_factory.mktemp("data")
    files = write_images(root / "files", 5, size=(40, 36))
    rows = datasets.Dataset.from_dict({"number": range(5), "photo": [{"bytes": file.read_bytes()} for file in files]})
    rows = rows.cast_column("photo", datasets.Image())
    rows.to_parquet(root / "rows.parquet")
    rows.save_to_disk(root / "saved")
    (root / "rows.arrow").write_bytes(next((root / "saved").glob("*.arrow")).read_bytes())
    with tarfile.open(root / "rows.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    tiny_pipeline().save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def of_files(data, tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("results") / "files.json"
    run("reconstruction", data / "files", "--features", "own", "-m", data / "model", "-o", output)
    return json.loads(output.read_text())["values"]


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["stored", "streamed"])
@pytest.mark.parametrize("source", ["rows.parquet", "rows.arrow", "saved", "rows.tar"])
def test_reconstruction_of_a_data_set_is_that_of_its_files(data, of_files, tmp_path, source, streaming):
    output = tmp_path / "result.json"
    run("reconstruction", data / source, *streaming, "--features", "own", "-m", data / "model", "-o", output)
    found = json.loads(output.read_text())
    assert found["values"] == of_files
    assert found["num_images"] == 5


def test_tokens_of_a_stream_are_those_of_its_files(data, tmp_path):
    run("tokens", data / "files", "-m", data / "model", "-o", tmp_path / "files")
    run("tokens", data / "rows.parquet", "--streaming", "-m", data / "model", "-o", tmp_path / "stream")
    for name in ("tokens.json", "sampling.png", "anchors.png", "codebook.png"):
        assert (tmp_path / "stream" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()


def test_linear_probe_of_data_sets_is_that_of_their_folders(data, tmp_path):
    """Also where a data set numbers its classes in another order."""
    folders = {name: write_color_classes(tmp_path / name, count, 0) for name, count in (("train", 8), ("test", 3))}
    for name, folder in folders.items():
        files = sorted(folder.glob("*/*.png"))
        class_names = ["red", "green", "blue"] if name == "test" else ["blue", "green", "red"]
        rows = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": file.read_bytes()} for file in files],
                "label": [class_names.index(file.parent.name) for file in files],
            }
        )
        rows = rows.cast_column("image", datasets.Image())
        rows.cast_column("label", datasets.ClassLabel(names=class_names)).to_parquet(tmp_path / f"{name}.parquet")
    settings = ("--epochs", 8, "--views", 2, "-m", data / "model", "-o")
    run("linear-probe", "--train", folders["train"], "--test", folders["test"], *settings, tmp_path / "folder.json")
    run(
        "linear-probe", "--train", tmp_path / "train.parquet", "--test", tmp_path / "test.parquet", *settings,
        tmp_path / "rows.json",
    )  # fmt: skip
    for name in ("image_embeds", "token_embeddings", "vision_model", "pixels"):
        of_folder, of_rows = (
            json.loads((tmp_path / f"{kind}_{name}.json").read_text()) for kind in ("folder", "rows")
        )
        assert of_rows["values"] == of_folder["values"]
        assert of_rows["num_images"] == 9


def test_a_damaged_row_is_named(data, tmp_path):
    images = [{"bytes": (data / "files" / "000.png").read_bytes()}, {"bytes": b"\x89PNG broken"}]
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    text = error_of("reconstruction", tmp_path / "rows.parquet", "--features", "none", "-m", data / "model")
    assert "rows.parquet, row 1 cannot be read as an image" in text


def test_columns_and_sources_that_cannot_be_told_are_refused(data, tmp_path):
    model = ("--features", "none", "-m", data / "model")
    assert "number" in error_of("reconstruction", data / "rows.parquet", "--image-column", "picture", *model)
    assert "one data set" in error_of("reconstruction", data / "rows.parquet", data / "rows.tar", *model)
    assert "pass --split as well" in error_of("reconstruction", data / "files", "--streaming", *model)
    assert "no file or folder" in error_of("reconstruction", tmp_path / "none.parquet", *model)
    assert "both images and data files" in error_of("reconstruction", data, *model)
    picture = (data / "files" / "000.png").read_bytes()
    datasets.Dataset.from_dict({"a": [{"bytes": picture}], "b": [{"bytes": picture}]}).cast_column(
        "a", datasets.Image()
    ).cast_column("b", datasets.Image()).to_parquet(tmp_path / "two.parquet")
    assert "several columns (a, b)" in error_of("reconstruction", tmp_path / "two.parquet", *model)


def test_too_few_reference_images_are_refused_before_sampling(data, tmp_path):
    write_images(tmp_path / "few", 3)
    model = ("-n", 10, "--features", "own", "-m", data / "model", "-o", tmp_path / "samples")
    assert "more than 3 images on each side, got 3" in error_of("generation", "--reference", tmp_path / "few", *model)
    assert "no reference file" in error_of("generation", "--reference", tmp_path / "none.npz", *model)
    assert not (tmp_path / "samples").exists()
