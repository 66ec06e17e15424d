"""Files that appear whole or not at all."""

import os
from pathlib import Path

import PIL.Image
import pytest

from vfmtok_hf.data.output_files import (
    check_output_file,
    check_picture_output,
    picture_names,
    save_picture,
    whole_file,
    whole_folder,
)


def picture(color, side=8):
    return PIL.Image.new("RGB", (side, side), color)


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("text")
        assert not path.exists()
    assert path.read_text() == "text"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail_halfway():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_unwritable_outputs_are_found_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file, not a folder"):
        check_output_file(tmp_path / "file" / "grid.png")
    with pytest.raises(OSError, match="is a file, not a folder"):
        check_picture_output(tmp_path / "file" / "folder")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_output_file(tmp_path)
    check_picture_output(tmp_path / "new" / "grid.png")
    check_picture_output(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that nobody can write to")
def test_permission_is_asked_of_the_file_system():
    with pytest.raises(OSError, match="is not writable"):
        check_output_file(Path("/proc/grid.png"))


def test_save_picture_knows_its_formats(tmp_path):
    for suffix, name in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
        save_picture(picture("red"), tmp_path / f"picture.{suffix}")
        assert PIL.Image.open(tmp_path / f"picture.{suffix}").format == name


@pytest.mark.parametrize("name", ["x.gif", "x.TIFF", "x.bmp", "x.pdf"])
def test_a_file_of_another_format_is_no_folder(name, tmp_path):
    with pytest.raises(ValueError, match=rf"Image files end in \.png or \.jpg or \.jpeg or \.webp, got '{name}'"):
        check_picture_output(tmp_path / name)
    (tmp_path / name).mkdir()
    for folder in (name, "samples", "v1.0"):
        check_picture_output(tmp_path / folder)


# -- names


def test_pictures_get_names_of_their_own():
    assert picture_names(["sub/a.jpg", "a.PNG", "a.jpg"]) == ["sub/a.jpg.png", "a.PNG", "a.jpg.png"]
    with pytest.raises(ValueError, match=r"'a\.jpg' and 'a\.jpg\.png' would both be written to a\.jpg\.png"):
        picture_names(["a.jpg", "a.jpg.png"])
    with pytest.raises(ValueError, match=r"'a' and 'a' would both be written to a\.png"):
        picture_names(["a", "a"])
    with pytest.raises(ValueError, match=r"'a' would be written to a\.png, which is the folder of 'a\.png/b/c'"):
        picture_names(["a.png/b/c", "a"])


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "sub/../../a.png", "", "."])
def test_names_cannot_leave_the_output_folder(name):
    with pytest.raises(ValueError, match="points out"):
        picture_names([name])


@pytest.mark.parametrize("letter", ["n", "ß", "日"])
def test_long_names_stay_different_and_can_be_written(letter, tmp_path):
    size = len(letter.encode())
    names = [letter * (255 // size - 4) + ending for ending in ("", "a", "b", ".jpg", ".webp")]
    files = picture_names(names)
    assert len(set(files)) == len(names)
    for file in files:
        save_picture(picture("red"), tmp_path / "folder" / file)
    assert sorted(os.listdir(tmp_path / "folder")) == sorted(files)


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    name = os.fsdecode(b"M\xfcnchen")
    (file,) = picture_names([name])
    save_picture(picture("red"), tmp_path / file)
    assert os.listdir(tmp_path) == [f"{name}.png"]


def test_whole_files_and_folders_may_have_the_longest_names(tmp_path):
    for path in (tmp_path / ("n" * 251 + ".txt"), tmp_path / ("." + "s" * 254)):
        with whole_file(path) as temporary:
            temporary.write_text("whole")
        assert path.read_text() == "whole"
    with whole_folder(tmp_path / ("f" * 255)) as temporary:
        (temporary / "config.json").write_text("{}")
    assert len(os.listdir(tmp_path)) == 3
