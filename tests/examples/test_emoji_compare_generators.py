"""The figure and table of two generators."""

import json
import sys
from pathlib import Path

import pytest

from tests.modeling.generators import tiny_ar, tiny_rar
from tests.testing import tiny_model


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import compare_generators


@pytest.fixture
def compared(tmp_path):
    """Options of what is in `tmp_path`."""
    return {name: tmp_path / name for name in ("tokenizer", "ar", "rar")}


def test_the_output_is_checked_first(tmp_path, compared, refusal):
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in refusal(compare_generators, **compared, output=tmp_path / "file")


def test_a_missing_output_folder_is_created(tmp_path, compared, run_script, capsys):
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    sizes = {"codebook_size": 64, "num_classes": 2, "id2label": {0: "cat", 1: "moon"}}
    for name, generator in (("ar", tiny_ar(**sizes)), ("rar", tiny_rar(**sizes))):
        generator.save_pretrained(tmp_path / name / "model")
        (tmp_path / name / "arguments.yaml").write_text("batch_size: 10")
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"kind": "validation", "loss": 4.0, "step": 30}))
    run_script(compare_generators, **compared, output=tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "generators.png").stat().st_size > 0
    assert "| 300 | 4.000 |" in capsys.readouterr().out
