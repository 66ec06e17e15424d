"""Images of every source and kind, in an order that depends on seed and position alone."""

import io
import logging
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.image_sources import (
    DAMAGED,
    NUM_IMAGES,
    image_table,
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
from vfmtok_hf.data.transforms import Augmentation, ImageViews, as_pixel_values
from vfmtok_hf.modeling.image_reading_vfmtok import UnreadableImage, read_image
from vfmtok_hf.training.checkpoints import Progress


AUGMENTATION = Augmentation(16, crop_scale=(0.8, 1.0), horizontal_flip=True)


def number_of(pixel_values: torch.Tensor) -> int:
    return round((((pixel_values.mean() + 1) * 127.5).item() - 8) / 10)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture
def table():
    return image_table()


# -- kinds of images


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


def test_ten_crops_are_corners_center_and_their_mirror_images():
    gradient = np.zeros((44, 60, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(60) * 4, np.arange(44)[:, None] * 5
    image = Image.fromarray(gradient)
    views = ImageViews(40, crops="ten", ten_crop_ranges=(1.1,))(image, index=0)
    assert views.shape == (10, 3, 40, 40)
    # The central square of 44 pixels starts at column 8; crops of 40 pixels start at 0, 2 or 4 within it.
    for position, (left, top) in enumerate([(2, 2), (0, 0), (4, 0), (0, 4), (4, 4)]):
        crop = image.crop((8 + left, top, 48 + left, top + 40))
        torch.testing.assert_close(views[2 * position], as_pixel_values(crop))
        assert torch.equal(views[2 * position + 1], views[2 * position].flip(-1))
    assert len(ImageViews(40, crops="ten", ten_crop_ranges=(1.1, 1.05))(image, 0)) == 20
    assert len(ImageViews(40, crops="center", horizontal_flip=False)(image, 0)) == 1


# -- damaged images


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


def test_damage_is_counted_across_workers_and_batches_stay_full(folder):
    data = ImageDataset(open_records(folder), AUGMENTATION)
    batches = TrainingLoader(data, batch_size=5, num_workers=2).batches(Progress())
    assert {len(next(batches)["label"]) for _ in range(12)} == {5}
    assert data.num_unreadable == 3


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


# -- sources


@pytest.mark.parametrize("write", [write_parquet, write_webdataset, write_arrow])
def test_sources_of_the_datasets_library(write, table, tmp_path):
    records = open_records(write(table, tmp_path / "data"))
    assert records.labels == [0] * 12 + [1] * 12
    assert records.class_names == (["0", "1"] if write is write_webdataset else ["first", "second"])
    data = ImageDataset(records, AUGMENTATION)
    numbers = [number_of(data[index]["pixel_values"]) for index in range(NUM_IMAGES)]
    assert numbers == [0, 1, 2, 5, 5, 5, 6, *range(8, 9), *range(8, NUM_IMAGES)]
    assert data.num_unreadable == 3
    assert "row 3" in data.name(3)


def test_columns_are_chosen_or_named_in_the_error(table, tmp_path):
    folder = write_parquet(table.add_column("other", table["kind"]), tmp_path / "data")
    records = open_records(folder, image_column="picture", label_column="id")
    assert len(records.class_names) == NUM_IMAGES
    with pytest.raises(ValueError, match=r"no column 'jpg'.*picture \(Image\), kind \(ClassLabel\), id \(int64\)"):
        open_records(folder, image_column="jpg")
    plain = write_parquet(table.remove_columns("kind"), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no column to take for --label_column: name one of picture \(Image\), id"):
        open_records(plain)
    images = list(table.cast_column("picture", datasets.Image(decode=False))["picture"])
    both = write_parquet(table.add_column("second", images, feature=datasets.Image()), tmp_path / "both")
    with pytest.raises(ValueError, match=r"several columns \(picture, second\) to take for --image_column"):
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
def test_a_picture_beside_data_files_is_not_taken_for_the_data(labeled, table, tmp_path):
    """A clone of a data set repository, whose card has a preview."""
    data = write_parquet(table, tmp_path / "data")
    (data / "assets").mkdir()
    (data / "assets" / "preview.png").write_bytes(png(picture(0)))
    with pytest.raises(ValueError, match="holds both images and data files"):
        open_records(data, labeled=labeled)
    assert len(open_records(data / "*.parquet", labeled=labeled)) == NUM_IMAGES


def test_held_out_images_are_disjoint_and_of_every_class(folder):
    records = open_records(folder)
    rest, held_out = records.hold_out(0.25, seed=1)
    names = [[part.name(index) for index in range(len(part))] for part in (rest, held_out)]
    assert len(names[0]) == 18
    assert sorted(names[0] + names[1]) == [records.name(index) for index in range(NUM_IMAGES)]
    assert held_out.labels == [0, 0, 0, 1, 1, 1]
    assert {rest.fingerprint, held_out.fingerprint, records.fingerprint} > {records.fingerprint}
    single, _ = records.hold_out(0.99, seed=1)
    with pytest.raises(ValueError, match="No class of .* has two images, to hold one out: give --validation_data"):
        single.hold_out(0.1, seed=1)


# -- order and position


def take(loader: TrainingLoader, position: Progress, count: int) -> list[dict]:
    batches = loader.batches(position)
    return [next(batches) for _ in range(count)]


def assert_equal_batches(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.fixture(params=["folder", "stream"])
def open_data(request, folder, table, tmp_path):
    if request.param == "folder":
        return lambda: ImageDataset(open_records(folder), AUGMENTATION)
    source = str(write_parquet(table, tmp_path / "data"))
    return lambda: ImageStream(source, AUGMENTATION, epoch_images=NUM_IMAGES, shuffle_buffer=6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_goes_on_where_it_stopped(open_data, num_workers):
    """Over an epoch's end, with damaged images on the way."""
    whole = take(TrainingLoader(open_data(), 4, num_workers=num_workers), Progress(), 10)
    for stop in (3, 6, 8):
        position = Progress()
        before = take(TrainingLoader(open_data(), 4, num_workers=num_workers), position, stop)
        restored = Progress(**position.state_dict())
        after = take(TrainingLoader(open_data(), 4, num_workers=num_workers), restored, 10 - stop)
        assert_equal_batches(before + after, whole)


def test_epochs_differ(open_data):
    batches = take(TrainingLoader(open_data(), 4), Progress(), 12)
    first, second = (
        [number_of(image) for batch in part for image in batch["pixel_values"]] for part in (batches[:6], batches[6:])
    )
    assert first != second
    assert set(range(NUM_IMAGES)) - DAMAGED == set(first) == set(second)


def test_processes_share_an_epoch(open_data):
    parts = [TrainingLoader(open_data(), 4, num_processes=2, process_index=index) for index in (0, 1)]
    numbers = [
        number_of(image)
        for loader in parts
        for batch in take(loader, Progress(), 3)
        for image in batch["pixel_values"]
    ]
    assert len(numbers) == NUM_IMAGES
    assert set(numbers) == set(range(NUM_IMAGES)) - DAMAGED


def test_two_processes_see_what_one_with_the_double_batch_sees(folder):
    def loader(batch_size, **share):
        return TrainingLoader(ImageDataset(open_records(folder), AUGMENTATION), batch_size, **share)

    whole = take(loader(8), Progress(), 5)
    halves = [take(loader(4, num_processes=2, process_index=index), Progress(), 5) for index in (0, 1)]
    joined = [{name: torch.cat([one[name], other[name]]) for name in one} for one, other in zip(*halves, strict=True)]
    assert_equal_batches(joined, whole)


def test_a_stream_that_ends_early_starts_over(table, tmp_path):
    source = str(write_parquet(table.select([0, 1, 2, 5, 6]), tmp_path / "data"))
    stream = ImageStream(source, AUGMENTATION, epoch_images=12)
    numbers = [
        number_of(image) for batch in take(TrainingLoader(stream, 4), Progress(), 3) for image in batch["pixel_values"]
    ]
    assert len(numbers) == 12
    assert set(numbers) == {0, 1, 2, 5, 6}


def test_a_stream_states_what_it_lacks(table, tmp_path):
    source = str(write_webdataset(table, tmp_path / "data"))
    with pytest.raises(ValueError, match="--class_names"):
        ImageStream(source, AUGMENTATION, epoch_images=10)
    with pytest.raises(ValueError, match="--epoch_images"):
        ImageStream(source, AUGMENTATION, class_names=["a", "b"])
    stream = ImageStream(source, AUGMENTATION, class_names=["a", "b"], epoch_images=8)
    assert set(next(TrainingLoader(stream, 8).batches(Progress()))["label"].tolist()) <= {0, 1}
    with pytest.raises(ValueError, match="--balance_power"):
        TrainingLoader(stream, 8, balance_power=0.5)


def test_too_few_images_for_a_batch(folder):
    with pytest.raises(ValueError, match="lower --batch_size"):
        TrainingLoader(ImageDataset(open_records(folder), AUGMENTATION), 13, num_processes=2)
