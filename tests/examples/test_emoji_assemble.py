"""Assembly of the shipped checkpoint and its table of results, with tiny models and images of noise in a color per class."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from tests.modeling.generators import tiny_ar, tiny_rar
from tests.testing import tiny_model


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import assemble
import class_fidelity
from prepare_data import attribution
from sources import SOURCES

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline


COLORS = {"cat": "orange", "clock": "black", "heart": "red", "moon": "white", "smiley": "blue"}
NAMES = list(COLORS)
SIZES = {"codebook_size": 64, "id2label": {label: f"{name}, a {name}" for label, name in enumerate(NAMES)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline of tiny models, as `assemble.py` saves it."""
    folder = tmp_path_factory.mktemp("emoji")
    for name, model in (("tokenizer", tiny_model()), ("generator", tiny_rar(**SIZES))):
        model.save_pretrained(folder / name)
    assemble.save_pipeline(folder / "tokenizer", folder / "generator", folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        for name in NAMES:
            (data / split / name).mkdir(parents=True)
            for index in range(7):
                noise = Image.effect_noise((32, 32), 60).convert("RGB")
                color = Image.new("RGB", noise.size, COLORS[name])
                Image.blend(noise, color, 0.9).save(data / split / name / f"{index}.png")
    return data


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A classifier with random weights, whose features tell colors apart."""
    torch.manual_seed(0)
    config = TimmWrapperConfig(
        architecture="resnet18",
        model_args={"channels": [16, 32, 32, 64]},
        id2label=dict(enumerate(NAMES)),
        pretrained_cfg={"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]},
    )
    folder = tmp_path_factory.mktemp("judge")
    TimmWrapperForImageClassification(config).eval().save_pretrained(folder)
    return str(folder)


def read_table(text):
    """Column by header, each a dict by row name."""
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return {name: {row[0]: row[index] for row in rows} for index, name in enumerate(header)}


def test_the_models_are_in_half_precision_and_without_code(folder):
    assert {path.name for path in (folder / "transformer").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [path.name for path in folder.rglob("*.py")] == ["pipeline.py"]
    for part in ("vq_model", "transformer"):
        assert json.loads((folder / part / "config.json").read_text())["dtype"] == "float16"
    generation_config = class_fidelity.load(folder).transformer.generation_config
    assert generation_config.top_k == assemble.SAMPLING["top_k"]


def test_the_shipped_attribution_is_the_one_that_is_written():
    text = (Path(DEFAULT_CHECKPOINT) / "ATTRIBUTION.md").read_text()
    assert text == attribution(assemble.TRAINED_ON)
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == [source.style for source in SOURCES]


def test_the_card_describes_the_generator_and_shows_its_pictures(folder, data):
    assemble.write_card(folder, data, comparison="(the table)")
    card = (folder / "README.md").read_text()
    assert not re.search(r"[{}]", card)
    for name in re.findall(r"\((\w+\.png)\)", card):
        assert (folder / name).stat().st_size > 0
    num_parameters = class_fidelity.load(folder).transformer.num_parameters()
    assert f"randomized-order transformer (RAR), 2 layers of width 32 | {num_parameters:,} |" in card
    # Five classes in three rows of two, each with the image, and twice what is kept and two results.
    picture = Image.open(folder / "inpaint.png")
    assert 14 * 32 < picture.width < 18 * 32
    assert 3 * 32 < picture.height < 4 * 32


def test_the_table_of_results(folder, data, judge):
    """Held-out colors are recognized; the random models' images are not like them."""
    of_rar = class_fidelity.load(folder)
    of_ar = VFMTokPipeline(of_rar.vq_model, tiny_ar(**SIZES), of_rar.image_processor)
    pipes = {"AR": of_ar, "samples": of_rar}
    table = read_table(class_fidelity.compare(pipes, data, judge, judge, samples=4))
    assert list(table) == [
        "classified correctly",
        "held-out images",
        "reconstructions, held-out",
        "reconstructions, training",
        "AR",
        "samples",
    ]
    assert table["held-out images"]["**mean of classes**"] == "**100.0%**"
    random = table["samples"]
    assert random["**mean of classes**"] != "**100.0%**"
    assert random["recall"] == "0%"
    assert float(random["PSNR of reconstructions"].removesuffix(" dB")) < 20

    files = sorted((data / "validation").glob("*/*.png"))
    labels = torch.tensor([NAMES.index(file.parent.name) for file in files])
    tokens = pipes["samples"].tokenize(files)
    for name, pipe in pipes.items():
        loss = pipe.transformer(labels, tokens, return_loss=True).loss
        assert float(table[name]["loss, nats per token"]) == pytest.approx(loss.item(), abs=1e-3)
    orders = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    loss = of_rar.transformer(labels, tokens, orders=orders, return_loss=True).loss
    assert float(random["loss in random orders"]) == pytest.approx(loss.item(), abs=1e-3)
    assert table["AR"]["loss in random orders"] == ""


@pytest.fixture
def assembled(folder, data, judge, tmp_path):
    """Options of `assemble.py`."""
    (tmp_path / "LICENSE").write_text("the license")
    return {
        "tokenizer": folder.parent / "tokenizer",
        "generator": folder.parent / "generator",
        "data": data,
        "vision_model": tmp_path,
        "classifier": judge,
        "second_judge": judge,
        "output": tmp_path / "output",
    }


@pytest.mark.parametrize("file", ["notes.txt", "config.json"])
def test_only_a_pipeline_is_replaced(assembled, refusal, file, monkeypatch):
    monkeypatch.setattr(assemble, "save_pipeline", None)
    output = assembled["output"]
    output.mkdir()
    (output / file).write_text("{}")
    assert "output exists and is not empty: choose another output, or delete it" in refusal(assemble, **assembled)
    assert [path.name for path in output.iterdir()] == [file]


def test_a_pipeline_is_replaced_as_a_whole(assembled, run_script, monkeypatch):
    output = assembled["output"]
    output.mkdir()
    (output / "model_index.json").write_text("{}")
    (output / "old.txt").touch()
    sibling = output.with_name("output.partial")
    sibling.mkdir()
    monkeypatch.setattr(assemble, "compare", lambda *arguments: "(the table)")
    run_script(assemble, **assembled)
    assert {"README.md", "ATTRIBUTION.md", "LICENSE.efficientnet-lite0", "vq_model"} <= {
        p.name for p in output.iterdir()
    }
    assert not (output / "old.txt").exists()
    assert {path.name for path in output.parent.iterdir()} == {"LICENSE", "output", "output.partial"}


def test_classes_of_data_and_models_are_compared_first(folder, assembled, data, judge, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "save_pipeline", None)
    monkeypatch.setattr(class_fidelity, "load", None)
    shutil.copytree(data, tmp_path / "lacking")
    shutil.rmtree(tmp_path / "lacking" / "validation" / "clock")
    shutil.copytree(data, tmp_path / "renamed")
    for part in ("train", "validation"):
        (tmp_path / "renamed" / part / "moon").rename(tmp_path / "renamed" / part / "sun")
    refused = {
        "lacking": "Class 1 is heart in {data}/validation, but clock in ",
        "renamed": "Class 3 is smiley in {data}/train, but moon in ",
        "nowhere": "There is no file or folder {data}/train.",
    }
    measured = {"classifier": judge, "second_judge": judge, "pipelines": folder}
    for name, error in refused.items():
        changed = {"data": tmp_path / name}
        expected = error.format(data=tmp_path / name)
        assert expected in refusal(class_fidelity, **measured, **changed)
        assert expected in refusal(assemble, **assembled | changed)
    assert not assembled["output"].exists()


def test_the_second_judge_has_the_classes_of_the_data(data, judge, tmp_path):
    shutil.copytree(judge, tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    config["label_names"].reverse()
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config))
    class_fidelity.check_classes(data, [Path(judge)])
    with pytest.raises(ValueError, match="Class 0 is cat in .*train, but smiley in .*judge"):
        class_fidelity.check_classes(data, [tmp_path / "judge"])


def test_files_beside_the_class_folders_are_no_classes(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train")
    (tmp_path / "train" / ".DS_Store").touch()
    (tmp_path / "train" / "notes.txt").touch()
    files = class_fidelity.image_files(tmp_path / "train")
    assert list(files) == NAMES
    assert all(len(of_class) == 7 for of_class in files.values())


def test_sharpness_falls_with_blur():
    sharp = Image.effect_noise((32, 32), 60).convert("RGB")
    images = class_fidelity.resized([sharp, sharp.filter(ImageFilter.GaussianBlur(1))], 32)
    half = class_fidelity.resized([sharp.resize((16, 16))], 32)
    assert class_fidelity.sharpness(images[:1]) > 2 * class_fidelity.sharpness(images[1:])
    assert class_fidelity.sharpness(images[:1]) > 1.5 * class_fidelity.sharpness(half)
