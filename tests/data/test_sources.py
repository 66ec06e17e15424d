"""Every source, also with gaps and damage: what is missing is named, counted and skipped; what cannot be meant is refused."""

import functools
import json
import logging
import os

import datasets
import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.data.image_sources import (
    NUM_IMAGES,
    image_table,
    number_of,
    picture,
    png,
    write_arrow,
    write_folder,
    write_parquet,
    write_webdataset,
)
from vfmtok_hf.data.image_datasets import ImageDataset, ImageStream
from vfmtok_hf.data.loaders import TrainingLoader
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.training.checkpoints import Progress


AUGMENTATION = Augmentation(16)


@pytest.mark.parametrize("write", [write_parquet, write_webdataset, write_arrow])
def test_sources_of_the_datasets_library(write, tmp_path):
    records = open_records(write(image_table(), tmp_path / "data"))
    assert records.labels == [0] * 12 + [1] * 12
    assert records.class_names == (["0", "1"] if write is write_webdataset else ["first", "second"])
    data = ImageDataset(records, AUGMENTATION)
    numbers = [number_of(data[index]["pixel_values"]) for index in range(NUM_IMAGES)]
    assert numbers == [0, 1, 2, 5, 5, 5, 6, *range(8, 9), *range(8, NUM_IMAGES)]
    assert data.num_unreadable == 3
    assert "row 3" in data.name(3)


def test_columns_are_chosen_or_named_in_the_error(tmp_path):
    rows = image_table()
    folder = write_parquet(rows.add_column("other", rows["kind"]), tmp_path / "data")
    records = open_records(folder, image_column="picture", label_column="id")
    assert len(records.class_names) == NUM_IMAGES
    with pytest.raises(ValueError, match=r"no column 'jpg'.*picture \(Image\), kind \(ClassLabel\), id \(int64\)"):
        open_records(folder, image_column="jpg")
    plain = write_parquet(rows.remove_columns("kind"), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no column for --label_column: pass one of picture \(Image\), id"):
        open_records(plain)
    images = list(rows.cast_column("picture", datasets.Image(decode=False))["picture"])
    both = write_parquet(rows.add_column("second", images, feature=datasets.Image()), tmp_path / "both")
    with pytest.raises(ValueError, match=r"several columns \(picture, second\) for --image_column"):
        open_records(both)
    with pytest.raises(ValueError, match=r"label 2 in its column id, which is none of its 2 classes"):
        open_records(folder, label_column="id", class_names=["a", "b"])


@pytest.mark.parametrize(
    ("source", "message"),
    [("./no/such/folder", "no data folder"), ("nothing.parquet", "no data file"), ("empty", "expected files like")],
)
def test_a_source_that_is_not_there(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    with pytest.raises(FileNotFoundError, match=message):
        open_records(source)


@pytest.mark.parametrize("labeled", [True, False])
def test_a_picture_beside_data_files_is_not_taken_for_the_data(labeled, tmp_path):
    """A clone of a data set repository, whose card has a preview."""
    data = write_parquet(image_table(), tmp_path / "data")
    (data / "assets").mkdir()
    (data / "assets" / "preview.png").write_bytes(png(picture(0)))
    with pytest.raises(ValueError, match="contains both images and data files"):
        open_records(data, labeled=labeled)
    assert len(open_records(data / "*.parquet", labeled=labeled)) == NUM_IMAGES


def test_held_out_images_are_disjoint_and_of_every_class(tmp_path):
    records = open_records(write_folder(tmp_path / "images"))
    rest, held_out = records.hold_out(0.25, seed=1)
    names = [[part.name(index) for index in range(len(part))] for part in (rest, held_out)]
    assert len(names[0]) == 18
    assert sorted(names[0] + names[1]) == [records.name(index) for index in range(NUM_IMAGES)]
    assert held_out.labels == [0, 0, 0, 1, 1, 1]
    assert {rest.fingerprint, held_out.fingerprint, records.fingerprint} > {records.fingerprint}
    single, _ = records.hold_out(0.99, seed=1)
    with pytest.raises(
        ValueError, match="No class of .* has two images, so none can be held out: pass --validation_data"
    ):
        single.hold_out(0.1, seed=1)


# -- gaps and damage


def table(labels, feature, images=None):
    images = images or [{"bytes": png(picture(number)), "path": None} for number in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


CLASSES = datasets.ClassLabel(names=["first", "second"])


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0, None, 1, 1], CLASSES),
        ([0, -1, 1, 1], CLASSES),
        (["first", None, "second", "second"], datasets.Value("string")),
        ([0, None, 1, 1], datasets.Value("int64")),
        (["first", "", "second", "second"], datasets.Value("string")),
        ([0.0, float("nan"), 1.0, 1.0], datasets.Value("float64")),
        ([False, None, True, True], datasets.Value("bool")),
    ],
    ids=["class", "class of -1", "name", "number", "empty name", "number of a table with gaps", "yes or no"],
)
def test_rows_without_a_label_are_named_counted_and_skipped(labels, feature, tmp_path, caplog):
    source = write_parquet(table(labels, feature), tmp_path / "data")
    with caplog.at_level(logging.WARNING, "vfmtok_hf.data"):
        records = open_records(source)
    assert records.labels == [0, 1, 1]
    assert [records.name(index)[-1] for index in range(3)] == ["0", "2", "3"]
    assert records.unlabeled == [f"{source}, row 1"]
    assert "row 1" in caplog.text
    data = ImageDataset(records, AUGMENTATION)
    assert data.num_unreadable == 1
    assert [data[index]["label"] for index in range(3)] == [0, 1, 1]
    rest, held_out = records.hold_out(0.3, seed=0)
    assert (len(rest.unlabeled), len(held_out.unlabeled)) == (1, 0)
    assert len(open_records(source, labeled=False)) == 4


def test_a_stream_skips_rows_without_a_label_or_an_image(tmp_path, caplog):
    images = [{"bytes": png(picture(number)), "path": None} for number in range(6)]
    images[3] = None
    rows = table([0, None, 1, 1, -1, 0], CLASSES, images)
    stream = ImageStream(str(write_parquet(rows, tmp_path / "data")), AUGMENTATION, epoch_images=6)
    with caplog.at_level(logging.WARNING, "vfmtok_hf.data"):
        batch = next(TrainingLoader(stream, 6).batches(Progress()))
    assert set(batch["label"].tolist()) == {0, 1}
    assert stream.num_unreadable >= 3
    assert caplog.text.count("has no label") >= 2
    assert "is empty: there is no image" in caplog.text


def test_an_empty_image_is_skipped_like_a_damaged_one(tmp_path, caplog):
    images = [{"bytes": png(picture(number)), "path": None} for number in range(4)]
    images[1], images[2] = None, {"bytes": b"", "path": None}
    records = open_records(write_parquet(table([0, 0, 1, 1], CLASSES, images), tmp_path / "data"))
    data = ImageDataset(records, AUGMENTATION)
    with caplog.at_level(logging.WARNING, "vfmtok_hf.data"):
        assert [data[index]["index"] for index in range(4)] == [0, 3, 3, 3]
    assert data.num_unreadable == 2
    assert "row 1" in caplog.text
    assert "row 2" in caplog.text


@pytest.mark.parametrize("labels", [[0, 1, 900_000], [1, 2, 3], [0, 2, 2]], ids=["an id", "from one", "a gap"])
def test_numbers_with_gaps_are_no_classes(labels, tmp_path):
    source = tmp_path / "data.parquet"
    table(labels, datasets.Value("int64")).to_parquet(source)
    with pytest.raises(ValueError, match=r"column label .* with gaps.*--label_column.*--class_names"):
        open_records(source)


def test_no_label_at_all(tmp_path):
    source = tmp_path / "data.parquet"
    table([None, None], datasets.Value("int64")).to_parquet(source)
    with pytest.raises(ValueError, match="No row of .* has a label"):
        open_records(source)


@pytest.mark.parametrize(
    ("write", "share"),
    [
        (write_webdataset, 0.5),
        (write_webdataset, 0.26),
        (write_webdataset, 0.1),
        (write_parquet, 0.5),
        (write_parquet, 0),
    ],
)
def test_a_truncated_data_file_is_named(write, share, tmp_path):
    """Tar files are cut between two members, within a header, and within an image."""
    data = write(image_table(), tmp_path / "data")
    file = sorted(data.iterdir())[2]
    name, whole = file.name, file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{name} is truncated or damaged"):
        open_records(data)

    def read_to_its_end():
        stream = ImageStream(str(data), AUGMENTATION, class_names=["first", "second"], epoch_images=NUM_IMAGES)
        return list(stream)

    with pytest.raises(ValueError, match=f"{name} is truncated or damaged"):
        read_to_its_end()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_metadata_has_the_labels_of_its_file(kind, tmp_path):
    """As the `datasets` library's `imagefolder` has it; the folders of the images then mean nothing."""
    (tmp_path / "data" / "some").mkdir(parents=True)
    rows = [{"file_name": f"some/{number}.png", "label": "ab"[number % 2]} for number in range(4)]
    for number in range(4):
        (tmp_path / "data" / "some" / f"{number}.png").write_bytes(png(picture(number)))
    lines = [json.dumps(row) for row in rows]
    if kind == "csv":
        lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
    (tmp_path / "data" / f"metadata.{kind}").write_text("\n".join(lines))
    records = open_records(tmp_path / "data")
    assert (records.labels, records.class_names) == ([0, 1, 0, 1], ["a", "b"])
    assert records.name(1).endswith("1.png)")
    assert records[1].getpixel((0, 0)) == picture(1).convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([0.5, 1.0, 1.0, 2.0], datasets.Value("float64")),
        ([[0], [1], [0], [1]], datasets.List(datasets.Value("int64"))),
        ([b"a", b"b", b"a", b"b"], datasets.Value("binary")),
    ],
    ids=["fractions", "lists", "bytes"],
)
def test_columns_of_other_kinds_hold_no_labels(labels, feature, tmp_path):
    source = write_parquet(table(labels, feature), tmp_path / "data")
    with pytest.raises(ValueError, match="The column label of .* has no labels"):
        open_records(source)


@pytest.mark.parametrize("content", ["{not json", "", '["0.png"]', '{"name": "0.png", "label": "a"}'])
def test_metadata_that_name_no_images_are_named_themselves(content, tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        open_records(tmp_path)


@pytest.mark.parametrize("text", ["plain", "a line\u2028and another"])
def test_metadata_may_hold_any_text(text, tmp_path):
    (tmp_path / "a").mkdir()
    picture(0).save(tmp_path / "a" / "0.png")
    row = {"file_name": "a/0.png", "text": text, "label": "first"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert len(open_records(tmp_path)) == 1


def test_a_misspelled_folder_is_not_asked_for_again_and_again(monkeypatch):
    asked = []
    unreachable = functools.partial(HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: asked.append(1) or unreachable())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match="no folder phtos, and the Hub cannot be reached"):
        open_records("phtos")
    assert asked == [1]


def test_a_misspelled_folder_may_look_like_a_repository():
    with pytest.raises(FileNotFoundError, match="There is no folder absent/train. .*'absent/train'"):
        open_records("absent/train")
