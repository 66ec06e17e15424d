"""Which files count, everywhere that a folder is walked."""

import os

import numpy as np
import pytest
from PIL import Image

from tests.data.image_sources import picture, png
from vfmtok_hf.data.files import files_below, find_images, image_suffixes
from vfmtok_hf.data.image_sets import FolderImages
from vfmtok_hf.data.pictures import open_pictures
from vfmtok_hf.data.sources import open_records


def write_image(file, number=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(picture(number)))
    return file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "sub/c.PNG"):
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_images_are_found_in_folders_and_named_by_their_place(folder):
    assert list(find_images([folder])) == ["a.jpg", "b.png", "sub/c.PNG"]
    assert find_images([folder / "b.png", folder / "sub"]) == {
        "b.png": folder / "b.png",
        "c.PNG": folder / "sub" / "c.PNG",
    }


def test_what_cannot_be_found_is_an_error(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        find_images([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        find_images([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"Both .* would be named b\.png"):
        find_images([folder, folder / "b.png"])


def test_suffixes_are_those_of_images_that_can_be_read():
    assert {".jpg", ".jfif", ".jpe", ".apng", ".avif", ".tif", ".webp", ".jp2", ".heic"} <= image_suffixes()
    assert image_suffixes().isdisjoint(
        {".h5", ".hdf", ".mpg", ".mpeg", ".grib", ".bufr", ".wmf", ".eps", ".pdf", ".txt"}
    )


LEFTOVERS = [
    ".ipynb_checkpoints/0-checkpoint.png",
    "cat/.thumbnails/0.png",
    "cat/._0.png",
    "__MACOSX/cat/0.png",
    "@eaDir/0.png/SYNOPHOTO_THUMB_XL.jpg",
    "$RECYCLE.BIN/$R0.png",
    "#recycle/0.png",
    "System Volume Information/0.png",
    "lost+found/0.png",
    "cat/data.h5",
    "dog/clip.mpg",
]


def test_leftovers_are_no_images_and_no_classes(tmp_path):
    for name in ("dog/1.jfif", "cat/0.png"):
        write_image(tmp_path / name)
    for name in LEFTOVERS:
        write_image(tmp_path / name)
    assert list(find_images([tmp_path])) == ["cat/0.png", "dog/1.jfif"]
    assert open_pictures([str(tmp_path)]) == FolderImages([tmp_path]).files == list(find_images([tmp_path]).values())
    for labeled in (True, False):
        assert [open_records(tmp_path, labeled=labeled).name(index) for index in range(2)] == [
            str(tmp_path / "cat" / "0.png"),
            str(tmp_path / "dog" / "1.jfif"),
        ]
    assert open_records(tmp_path).class_names == ["cat", "dog"]


def test_a_hidden_folder_can_be_named(tmp_path):
    write_image(tmp_path / ".cache" / "0.png")
    assert list(find_images([tmp_path / ".cache"])) == ["0.png"]


def test_links_are_followed_and_loops_end(tmp_path):
    whole, subset = tmp_path / "whole", tmp_path / "subset"
    write_image(whole / "ant" / "0.png")
    write_image(subset / "own" / "1.png")
    (subset / "ant").symlink_to(whole / "ant", target_is_directory=True)
    (subset / "own" / "2.png").symlink_to(whole / "ant" / "0.png")
    (subset / "own" / "up").symlink_to(subset, target_is_directory=True)
    (subset / "itself").symlink_to(subset / "itself")
    expected = ["ant/0.png", "own/1.png", "own/2.png"]
    assert list(find_images([subset])) == expected
    for labeled in (True, False):
        records = open_records(subset, labeled=labeled)
        assert [os.path.relpath(records.name(index), subset) for index in range(len(records))] == expected


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        write_image(tmp_path / name / "0.png")
        (tmp_path / name / other).symlink_to(tmp_path / other, target_is_directory=True)
    assert list(find_images([tmp_path])) == ["a/0.png", "a/b/0.png", "b/0.png", "b/a/0.png"]


def test_images_of_a_class_may_lie_deeper(tmp_path):
    write_image(tmp_path / "ant" / "images" / "0.png")
    write_image(tmp_path / "bee" / "images" / "0.png")
    assert open_records(tmp_path).class_names == ["ant", "bee"]


def test_splits_are_no_classes(tmp_path):
    write_image(tmp_path / "train" / "ant" / "0.png")
    write_image(tmp_path / "validation" / "ant" / "0.png")
    with pytest.raises(ValueError, match=r"contains splits \(train, validation\), not classes"):
        open_records(tmp_path)
    assert len(open_records(tmp_path, labeled=False)) == 2


def test_a_stray_image_is_not_left_out_without_a_word(tmp_path):
    write_image(tmp_path / "ant" / "0.png")
    write_image(tmp_path / "preview.png")
    with pytest.raises(ValueError, match=r"one folder of images per class.*preview\.png is outside"):
        open_records(tmp_path)


def test_files_of_other_kinds_follow_the_same_rule(tmp_path):
    for name in ("b/1.TAR", "a/0.tar", ".git/2.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert files_below(tmp_path, {".tar"}) == [tmp_path / "a" / "0.tar", tmp_path / "b" / "1.TAR"]
