"""Images of a run and their distribution over processes, for tokenizers and generators."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Subset

from vfmtok_hf.data.image_datasets import ImageStream
from vfmtok_hf.data.loaders import TrainingLoader, leave_stopping_to_the_trainer
from vfmtok_hf.data.sources import ImageRecords, open_records, read_class_names
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.training.arguments import TrainingArguments


def training_augmentation(arguments: TrainingArguments, image_size: int) -> Augmentation:
    low, high = arguments.crop_scale
    return Augmentation(image_size, (low, high), arguments.horizontal_flip)


def open_training_images(
    arguments: TrainingArguments, image_size: int, accelerator: Accelerator, labeled: bool = True
) -> tuple[ImageRecords | ImageStream, ImageRecords | None]:
    """
    Open the training images, and the images held out from them if there are no `validation_data`.

    Args:
        labeled (`bool`): as in [`open_records`].

    Raises:
        ValueError: a stream cannot be split.
    """
    if not arguments.streaming:
        records = open_split(arguments, arguments.train_data, arguments.split, accelerator, labeled)
        if arguments.validation_data is not None:
            return records, None
        return records.hold_out(arguments.validation_share, arguments.seed)
    if arguments.validation_data is None:
        raise ValueError("A stream cannot be split: pass --validation_data.")
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
        labeled,
    )
    return stream, None


def open_validation_images(
    arguments: TrainingArguments, held_out: ImageRecords | None, accelerator: Accelerator, labeled: bool = True
) -> ImageRecords:
    """The images held out from the training data, or those of `validation_data`."""
    if held_out is not None:
        return held_out
    return open_split(arguments, arguments.validation_data, arguments.validation_split, accelerator, labeled)


def open_split(
    arguments: TrainingArguments, source: str, split: str, accelerator: Accelerator, labeled: bool
) -> ImageRecords:
    class_names = read_class_names(arguments.class_names)
    with accelerator.main_process_first():  # the datasets library prepares its cache
        return open_records(source, split, arguments.image_column, arguments.label_column, class_names, labeled)


def training_loader(data: Dataset, arguments: TrainingArguments, accelerator: Accelerator) -> TrainingLoader:
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


def validation_loader(data: Dataset, arguments: TrainingArguments, accelerator: Accelerator) -> DataLoader:
    """Batches of this process's share of the data, in order."""
    return DataLoader(
        Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes)),
        arguments.batch_size,
        num_workers=arguments.num_workers,
        worker_init_fn=leave_stopping_to_the_trainer,
        # Its own generator: a loader would sample from the global one and so change the training.
        generator=torch.Generator(),
    )
