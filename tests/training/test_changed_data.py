"""Runs that are continued after their data have changed."""

import json
import shutil

import pytest

from tests.testing import tiny_model
from tests.training.tiny_runs import (
    generator_options,
    log_of,
    run,
    tokenizer_options,
    write_images,
    write_vision_model,
)
from vfmtok_hf.training import train_generator, train_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    tiny_model().save_pretrained(root / "tokenizer")
    options = {"validation_data": None, "validation_share": 0.3, "max_steps": 2, "num_crops": 1}
    argv = generator_options(write_images(root / "data"), root / "tokenizer", root / "run", **options)
    run(lambda: train_generator.main(argv))
    return root


@pytest.fixture
def started(sources, tmp_path):
    """A run of two steps, its data, and the command that continues it."""
    for name in ("data", "run"):
        shutil.copytree(sources / name, tmp_path / name)
    options = {"validation_data": None, "validation_share": 0.3, "max_steps": 4, "num_crops": 1, "resume": True}
    argv = generator_options(tmp_path / "data", sources / "tokenizer", tmp_path / "run", **options)
    return tmp_path / "data", tmp_path / "run", argv


def more_images(data):
    shutil.copy(data / "bar" / "bar_0.png", data / "bar" / "more.png")


def fewer_images(data):
    (data / "bar" / "bar_0.png").unlink()


def renamed_image(data):
    (data / "bar" / "bar_0.png").rename(data / "bar" / "bar_00.png")


def another_size(data):
    with (data / "bar" / "bar_0.png").open("ab") as file:
        file.write(b"more")


def another_class(data):
    shutil.copytree(data / "bar", data / "cow")


def renamed_class(data):
    (data / "bar").rename(data / "rod")


CHANGES = [
    (more_images, "4 -> 5 validation images"),
    (fewer_images, "-> .* training images"),
    (renamed_image, "other names, sizes or labels"),
    (another_size, "other names, sizes or labels"),
    (another_class, "new training classes: cow"),
    (renamed_class, "new training classes: rod; missing training classes: bar"),
]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_changed_data_are_named_and_refused_before_anything_is_touched(change, message, started, capfd):
    data, output, argv = started
    change(data)
    before = contents(output)
    with pytest.raises(
        ValueError, match=f"data differ from those at the start of the run in .*: .*{message}"
    ) as error:
        train_generator.main(argv)
    assert "delete" not in str(error.value)
    assert contents(output) == before


def test_an_explicit_argument_takes_the_change_on_and_the_run_keeps_it(started, caplog):
    data, output, argv = started
    more_images(data)
    run(lambda: train_generator.main([*argv, "--accept_changed_data"]))
    assert log_of(output, "train")[-1]["step"] == 4
    run(lambda: train_generator.main([*argv, "--max_steps=5"]))
    assert log_of(output, "train")[-1]["step"] == 5


def test_classes_of_a_generator_cannot_be_taken_on(started):
    data, _, argv = started
    another_class(data)
    with pytest.raises(ValueError, match="new training classes: cow.*--init_from\\.$"):
        train_generator.main([*argv, "--accept_changed_data"])


def test_moved_data_are_the_same(started, tmp_path):
    data, output, argv = started
    data.rename(tmp_path / "moved")
    run(lambda: train_generator.main([*argv, f"--train_data={tmp_path / 'moved'}"]))
    assert log_of(output, "train")[-1]["step"] == 4


def test_a_run_without_a_note_of_its_data_is_continued(started):
    _, output, argv = started
    noted = json.loads((output / "data.json").read_text())
    (output / "data.json").unlink()
    run(lambda: train_generator.main(argv))
    assert json.loads((output / "data.json").read_text()) == noted


def test_a_tokenizer_is_held_to_its_images_too(tmp_path):
    data, vision_model = write_images(tmp_path / "data"), write_vision_model(tmp_path / "vision")
    options = {"validation_data": None, "max_steps": 1, "kmeans_images": 4, "adversarial_weight": 0.0}
    argv = tokenizer_options(data, vision_model, tmp_path / "run", **options)
    run(lambda: train_tokenizer.main(argv))
    more_images(data)
    with pytest.raises(ValueError, match="training images"):
        train_tokenizer.main([*argv, "--max_steps=2", "--resume"])
