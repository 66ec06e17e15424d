"""Files that appear whole or not at all, and grids."""

import os
from pathlib import Path

import PIL.Image
import pytest

from vfmtok_hf.data.output_files import (
    check_output_file,
    check_picture_output,
    picture_output,
    save_picture,
    whole_file,
)
from vfmtok_hf.plotting import GAP, image_grid


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
    with pytest.raises(OSError, match="does not admit new files"):
        check_output_file(Path("/proc/grid.png"))


def test_pictures_go_to_a_grid_or_to_single_files(tmp_path):
    for output in (tmp_path / "grid.png", tmp_path / "folder"):
        with picture_output(output, columns=2) as add:
            for index, color in enumerate(("red", "blue", "green")):
                add(picture(color), f"{index}.png", "")
    assert PIL.Image.open(tmp_path / "grid.png").size == (2 * 8 + 3 * GAP, 2 * 8 + 3 * GAP)
    assert sorted(os.listdir(tmp_path / "folder")) == ["0.png", "1.png", "2.png"]
    assert PIL.Image.open(tmp_path / "folder" / "1.png").getpixel((0, 0)) == (0, 0, 255)


def test_save_picture_knows_its_formats(tmp_path):
    for suffix, name in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
        save_picture(picture("red"), tmp_path / f"picture.{suffix}")
        assert PIL.Image.open(tmp_path / f"picture.{suffix}").format == name


def test_grid_lays_out_row_by_row():
    colors = ["red", "blue", "green", "black", "yellow"]
    grid = image_grid([picture(color) for color in colors])
    assert grid.size == (3 * 8 + 4 * GAP, 2 * 8 + 3 * GAP)
    for index, color in enumerate(colors):
        row, column = divmod(index, 3)
        center = (GAP + 4 + column * (8 + GAP), GAP + 4 + row * (8 + GAP))
        assert grid.getpixel(center) == picture(color).getpixel((0, 0))


def test_captions_stay_in_their_cells():
    images = [picture("white", 40)] * 2
    plain = image_grid(images, columns=2)
    captioned = image_grid(images, columns=2, captions=["a caption that is far too long", ""])
    assert captioned.height > plain.height
    ink = PIL.Image.eval(captioned.convert("L"), lambda level: 255 - level).getbbox()
    assert GAP <= ink[0] <= ink[2] <= GAP + 40
    assert ink[1] > GAP + 40


def test_grids_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no images"):
        image_grid([])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        image_grid([picture("red")] * 2, captions=["one"])
