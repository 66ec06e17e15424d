"""The images that a run's arguments name, and how they are dealt out: the same for tokenizers and generators."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset

from vfmtok_hf.training.data import ImageStream, TrainingLoader, leave_stopping_to_the_trainer
from vfmtok_hf.training.images import Augmentation
from vfmtok_hf.training.sources import ImageRecords, open_records, read_class_names


@dataclass
class DataArguments:
    """What both trainers ask for; each adds its own."""

    train_data: str  # images of any source in docs/training.md; for generators also token shards
    output: str  # folder of the run
    validation_data: str | None = None  # the same, never trained on; None: held-out training images
    validation_share: float = 0.1  # of each class, held out if there are no validation data
    split: str = "train"  # of what the datasets library reads
    validation_split: str = "validation"
    image_column: str | None = None  # None: found by type and name
    label_column: str | None = None
    class_names: str | None = None  # JSON file with "id2label"; None: the names that the data have
    streaming: bool = False  # read front to back, for data that are too large or far away
    epoch_images: int | None = None  # of a stream that does not state how many it has
    shuffle_buffer: int = 1000  # encoded images of a stream that each worker draws from
    crop_scale: list[float] = field(default_factory=lambda: [0.8, 1.0])  # side of random crops / shorter image side
    horizontal_flip: bool = True
    balance_power: float = 0.0  # classes are drawn with weight n ** (1 - balance_power)
    batch_size: int = 32  # per process and forward pass
    num_workers: int = 0
    seed: int = 0


def training_augmentation(arguments: DataArguments, image_size: int) -> Augmentation:
    low, high = arguments.crop_scale
    return Augmentation(image_size, (low, high), arguments.horizontal_flip)


def open_training_images(
    arguments: DataArguments, image_size: int, accelerator: Accelerator, labelled: bool = True
) -> tuple[ImageRecords | ImageStream, ImageRecords | None]:
    """
    The images to train on; and those that are held out of them, where there are no `validation_data`.

    Args:
        labelled (`bool`): as in [`open_records`].

    Raises:
        ValueError: nothing can be held out of a stream.
    """
    if not arguments.streaming:
        records = open_split(arguments, arguments.train_data, arguments.split, accelerator, labelled)
        if arguments.validation_data is not None:
            return records, None
        return records.hold_out(arguments.validation_share, arguments.seed)
    if arguments.validation_data is None:
        raise ValueError("Of a stream no part can be held out: give --validation_data.")
    stream = ImageStream(
        arguments.train_data,
        training_augmentation(arguments, image_size),
        arguments.split,
        arguments.image_column,
        arguments.label_column,
        read_class_names(arguments.class_names),
        arguments.epoch_images,
        arguments.shuffle_buffer,
        arguments.seed,
        labelled,
    )
    return stream, None


def open_validation_images(
    arguments: DataArguments, held_out: ImageRecords | None, accelerator: Accelerator, labelled: bool = True
) -> ImageRecords:
    """The images held out of the training data, or those of `validation_data`."""
    if held_out is not None:
        return held_out
    return open_split(arguments, arguments.validation_data, arguments.validation_split, accelerator, labelled)


def open_split(
    arguments: DataArguments, source: str, split: str, accelerator: Accelerator, labelled: bool
) -> ImageRecords:
    class_names = read_class_names(arguments.class_names)
    with accelerator.main_process_first():  # the datasets library prepares its cache
        return open_records(source, split, arguments.image_column, arguments.label_column, class_names, labelled)


def training_loader(data: Dataset, arguments: DataArguments, accelerator: Accelerator) -> TrainingLoader:
    """Batches of this process."""
    return TrainingLoader(
        data,
        arguments.batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        arguments.balance_power,
        arguments.num_workers,
        arguments.seed,
        accelerator.device,
    )


def validation_loader(data: Dataset, arguments: DataArguments, accelerator: Accelerator) -> DataLoader:
    """Batches of this process's share of the data, in order."""
    return DataLoader(
        Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes)),
        arguments.batch_size,
        num_workers=arguments.num_workers,
        worker_init_fn=leave_stopping_to_the_trainer,
        # Its own, as a loader would draw from the global one, and training would notice.
        generator=torch.Generator(),
    )
