"""What streams do at the end of their rows, and without what they cannot begin."""

from itertools import islice

import pytest

from tests.data.image_sources import (
    image_table,
    number_of,
    write_parquet,
    write_webdataset,
)
from vfmtok_hf.data.image_datasets import ImageStream
from vfmtok_hf.data.loaders import TrainingLoader
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.training.checkpoints import Progress


AUGMENTATION = Augmentation(16, crop_scale=(0.8, 1.0), horizontal_flip=True)


@pytest.fixture
def table():
    return image_table()


def test_a_stream_that_ends_early_starts_over(table, tmp_path):
    source = str(write_parquet(table.select([0, 1, 2, 5, 6]), tmp_path / "data"))
    stream = ImageStream(source, AUGMENTATION, epoch_images=12)
    numbers = [
        number_of(image)
        for batch in islice(TrainingLoader(stream, 4).batches(Progress()), 3)
        for image in batch["pixel_values"]
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
