"""Images of every kind, and damaged ones among them."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.image_sources import (
    NUM_IMAGES,
    number_of,
    picture,
    png,
    write_folder,
)
from vfmtok_hf.data.image_datasets import ImageDataset
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.modeling.image_reading_vfmtok import UnreadableImage, read_image


AUGMENTATION = Augmentation(16, crop_scale=(0.8, 1.0), horizontal_flip=True)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)), (100, 100, 100)),
        (Image.new("P", (4, 4), 0), (0, 0, 0)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 4), (100, 255)), (100, 100, 100)),
    ],
    ids=["gray", "bilevel", "16 bit", "palette", "transparent", "gray with alpha"],
)
def test_any_mode_becomes_rgb(image, expected):
    decoded = read_image(png(image))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((1, 2)) == expected


def test_cmyk_and_rotated_jpegs_become_upright_rgb():
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(stream, "JPEG")
    red, green, blue = read_image(stream.getvalue()).getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 10)).save(stream, "JPEG", exif=exif)
    assert read_image(stream.getvalue()).size == (10, 30)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_unreadable(image_format, share):
    stream = io.BytesIO()
    picture(5).resize((200, 200)).save(stream, image_format)
    encoded = stream.getvalue()
    with pytest.raises(UnreadableImage):
        read_image(encoded[: int(share * len(encoded))])


def test_damaged_images_are_named_counted_and_replaced(folder, caplog):
    data = ImageDataset(open_records(folder), AUGMENTATION)
    with caplog.at_level(logging.WARNING, "vfmtok_hf.data"):
        items = [data[index] for _ in range(2) for index in range(NUM_IMAGES)]
    assert [item["index"] for item in items[:9]] == [0, 1, 2, 5, 5, 5, 6, 8, 8]
    assert [number_of(item["pixel_values"]) for item in items[:9]] == [0, 1, 2, 5, 5, 5, 6, 8, 8]
    assert not torch.equal(items[3]["pixel_values"], items[4]["pixel_values"])  # another crop
    assert [item["label"] for item in items[:NUM_IMAGES]] == [0] * 12 + [1] * 12
    assert data.num_unreadable == 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    for name in ("03.png", "04.png", "07.png"):
        assert sum(name in message for message in messages) == 1


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.png").write_bytes(b"no")
    with pytest.raises(UnreadableImage, match="None of the 1 images"):
        ImageDataset(open_records(tmp_path), AUGMENTATION)[0]


def test_a_missing_file_is_no_damaged_image(folder):
    records = open_records(folder)
    records.images[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"00\.png"):
        ImageDataset(records, AUGMENTATION)[0]
