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
def compared(tmp_path, monkeypatch):
    """Compare what is in `tmp_path`."""

    def compared(output):
        options = {name: tmp_path / name for name in ("tokenizer", "ar", "rar")} | {"output": output}
        argv = [text for name, path in options.items() for text in (f"--{name}", str(path))]
        monkeypatch.setattr(sys, "argv", ["compare_generators.py", *argv])
        compare_generators.main()

    return compared


def test_the_output_is_checked_first(tmp_path, compared, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        compared(tmp_path / "file")
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_missing_output_folder_is_created(tmp_path, compared, capsys):
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    sizes = {"codebook_size": 64, "num_classes": 2, "id2label": {0: "cat", 1: "moon"}}
    for name, generator in (("ar", tiny_ar(**sizes)), ("rar", tiny_rar(**sizes))):
        generator.save_pretrained(tmp_path / name / "model")
        (tmp_path / name / "arguments.yaml").write_text("batch_size: 10")
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"kind": "validation", "loss": 4.0, "step": 30}))
    compared(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "generators.png").stat().st_size > 0
    assert "| 300 | 4.000 |" in capsys.readouterr().out
