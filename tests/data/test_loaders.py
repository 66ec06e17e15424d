"""Batches in an order that depends on seed and position alone, of images held or streamed."""

import pytest
import torch

from tests.data.image_sources import (
    DAMAGED,
    NUM_IMAGES,
    image_table,
    number_of,
    write_folder,
    write_parquet,
)
from vfmtok_hf.data.image_datasets import ImageDataset, ImageStream
from vfmtok_hf.data.loaders import TrainingLoader
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.training.checkpoints import Progress


AUGMENTATION = Augmentation(16, crop_scale=(0.8, 1.0), horizontal_flip=True)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture
def table():
    return image_table()


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


def test_damage_is_counted_across_workers_and_batches_stay_full(folder):
    data = ImageDataset(open_records(folder), AUGMENTATION)
    batches = TrainingLoader(data, batch_size=5, num_workers=2).batches(Progress())
    assert {len(next(batches)["label"]) for _ in range(12)} == {5}
    assert data.num_unreadable == 3


def test_too_few_images_for_a_batch(folder):
    with pytest.raises(ValueError, match="lower --batch_size"):
        TrainingLoader(ImageDataset(open_records(folder), AUGMENTATION), 13, num_processes=2)
