"""Assembly of the shipped checkpoint, with tiny models and images of noise. The comparison table needs trained weights."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.modeling.generators import tiny_rar
from tests.testing import tiny_model


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import assemble
import class_fidelity
from prepare_data import attribution
from sources import SOURCES

from vfmtok_hf import DEFAULT_CHECKPOINT


NAMES = ["cat", "clock", "heart", "moon", "smiley"]
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
                Image.effect_noise((32, 32), 60).convert("RGB").save(data / split / name / f"{index}.png")
    return data


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
    # Five classes in three rows of two, each with the image, what is kept, and three results.
    picture = Image.open(folder / "inpaint.png")
    assert picture.width > 10 * 32
    assert 3 * 32 < picture.height < 4 * 32
