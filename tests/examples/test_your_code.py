"""The code of docs/your_code.md, run from top to bottom on a folder of images."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline, VFMTokRARForImageGeneration


ROOT = Path(__file__).parents[2]
CLASSES = {"face": ["smiley", "cat", "animal"], "heart": ["heart", "flower", "fruit"]}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The variables that the page's code leaves behind; "folder" is where it ran."""
    folder = tmp_path_factory.mktemp("your_code")
    for class_name, files in CLASSES.items():
        (folder / "photos" / class_name).mkdir(parents=True)
        for file in files:
            shutil.copy(ROOT / "examples" / "images" / f"{file}.png", folder / "photos" / class_name)
    blocks = re.findall(r"<!-- run -->\n```python\n(.*?)```", (ROOT / "docs" / "your_code.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names = {"folder": folder}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks:
            exec(block, names)
    return names


def test_loader_and_map_encode_to_the_pipelines_tokens(names):
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    expected = pipe.tokenize([names["folder"] / path for path, _ in names["photos"].samples])
    assert torch.equal(names["image_tokens"], expected)
    assert names["class_labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert names["tokens"]["labels"] == expected.tolist()
    assert names["tokens"]["class_labels"] == names["class_labels"].tolist()


def test_the_plain_loop_trains_on_the_classes_of_the_folder(names):
    assert list(names["generator"].config.id2label.values()) == list(CLASSES)
    assert names["losses"][-1] < names["losses"][0]
    assert [type(image) for image in names["images"]] == [Image.Image] * 2


def test_adapters_train_alone_merge_and_load(names):
    assert names["adapter_losses"][-1] < names["adapter_losses"][0]
    base = VFMTokRARForImageGeneration.from_pretrained(DEFAULT_CHECKPOINT, subfolder="transformer")
    base.resize_class_embeddings(list(CLASSES))
    before = base.lm_head.weight.clone()
    loaded = PeftModel.from_pretrained(base, names["folder"] / "adapter").merge_and_unload().eval()
    assert torch.equal(loaded.lm_head.weight, before)
    batch = {"class_labels": names["class_labels"], "image_tokens": names["image_tokens"]}
    with torch.no_grad():
        logits = names["merged"].eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, logits, atol=1e-4, rtol=1e-4)


def test_the_trainer_trains_and_saves(names):
    assert names["result"].global_step == 3
    assert names["metrics"]["eval_loss"] < names["losses"][0]
    saved = VFMTokRARForImageGeneration.from_pretrained(names["folder"] / "photos-generator")
    assert saved.config.id2label == names["generator"].config.id2label
