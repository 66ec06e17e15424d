"""The images that a generator is fine-tuned on, and those that it recognizes."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.modeling.generators import tiny_rar


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "finetune"))

import recognize


NAMES = ["blue heart", "clock", "dark hand", "full moon", "light hand"]


class HeldOut(list):
    """In place of a `TokenSet`: greedy images of every class of a generator, which are most likely under that class."""

    class_names = NAMES

    def __init__(self, generator):
        tokens = generator.generate(list(range(len(NAMES))), do_sample=False)
        super().__init__({"label": label, "image_tokens": row} for label, row in enumerate(tokens))


def test_greedy_images_are_most_likely_under_their_own_class():
    generator = tiny_rar(codebook_size=64)
    image_tokens = torch.stack([row["image_tokens"] for row in HeldOut(generator)])
    assert recognize.most_likely_classes(generator, image_tokens).tolist() == list(range(len(NAMES)))


def test_counts_before_and_after(tmp_path, monkeypatch, capsys):
    generator = tiny_rar(codebook_size=64, id2label=dict(enumerate(NAMES)))
    generator.save_pretrained(tmp_path / "model")
    before = tiny_rar(codebook_size=64, id2label={label: f"other {label}" for label in range(len(NAMES))})
    before.save_pretrained(tmp_path / "before")
    (tmp_path / "arguments.yaml").write_text(f"init_from: {tmp_path / 'before'}\n")
    monkeypatch.setattr(recognize, "TokenSet", lambda folder: HeldOut(generator))
    monkeypatch.setattr(sys, "argv", ["recognize.py", str(tmp_path)])
    recognize.main()
    before, losses_before, after, losses_after = capsys.readouterr().out.splitlines()
    # All classes equal the null class, so the first one is found.
    assert before.startswith("before: 1 of 5 recognized: blue heart 1/1, clock 0/1, ")
    assert after.startswith("after: 5 of 5 recognized: ")
    for line, name in ((losses_before, "before"), (losses_after, "after")):
        assert re.fullmatch(
            rf"{name}: [\d.]+ nats per token in raster order, [\d.]+ nats per token in random orders", line
        )


def test_an_unfinished_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recognize.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        recognize.main()
    assert "contains no finished run" in capsys.readouterr().err


@pytest.fixture
def prepare(monkeypatch):
    """Run `prepare_data.py`, whose module name is also that of another example."""

    def prepare(emoji, output):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--emoji", str(emoji), "--output", str(output)])
        return runpy.run_path(str(Path(recognize.__file__).with_name("prepare_data.py")), run_name="__main__")

    return prepare


def test_every_class_has_images_or_nothing_is_written(tmp_path, prepare, capsys):
    emoji, output = tmp_path / "emoji", tmp_path / "output"
    emoji.mkdir()
    with pytest.raises(SystemExit):
        prepare(emoji, output)
    assert "emoji has no images of blue heart" in capsys.readouterr().err
    assert not output.exists()

    codepoints = {
        "heart": ["1f499", "1f49a", "1f49b", "1f49c", "1f5a4"],
        "hand": ["1f44b-1f3fb", "1f44b-1f3ff"],
        "moon": ["1f312", "1f315"],
        "clock": ["1f550", "1f551"],
    }
    for name, stems in codepoints.items():
        (emoji / "train" / name).mkdir(parents=True)
        for stem in stems:
            (emoji / "train" / name / f"noto_{stem}.png").touch()
    classes = prepare(emoji, output)["CLASSES"]
    assert {folder.name for folder in output.iterdir()} == classes.keys()
    assert len(list(output.glob("*/*.png"))) == 11
    assert [file.name for file in (output / "dark hand").iterdir()] == ["noto_1f44b-1f3ff.png"]


def test_a_file_is_no_output(tmp_path, prepare, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        prepare(tmp_path, tmp_path / "file")
    assert "is a file, not a folder" in capsys.readouterr().err
