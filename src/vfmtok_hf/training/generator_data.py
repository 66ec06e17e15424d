"""What a generator is trained and validated on: token shards, images that become tokens once, or in every step."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.training.data import ImageDataset, ImageStream
from vfmtok_hf.training.extract_tokens import extract_tokens
from vfmtok_hf.training.images import Augmentation, Variants
from vfmtok_hf.training.sources import ImageRecords, open_records, read_class_names
from vfmtok_hf.training.tokens import TokenShards, encode_sequences, is_token_folder


if TYPE_CHECKING:
    from vfmtok_hf.training.train_generator import GeneratorArguments


def open_data(
    arguments: "GeneratorArguments", tokenizer: VFMTokModel, accelerator: Accelerator
) -> tuple[TokenShards | ImageDataset | ImageStream, TokenShards]:
    """
    Training data, as tokens or as images; and validation data, as tokens.

    Raises:
        ValueError: there are no validation data and none can be held out, or they have other classes.
    """
    from_shards = is_token_folder(arguments.train_data)
    if arguments.validation_data is None and (from_shards or arguments.streaming):
        raise ValueError("Neither token shards nor a stream can be held out in part: give --validation_data.")
    train_data: TokenShards | ImageDataset | ImageStream
    held_out = None
    if from_shards:
        train_data = open_shards(arguments.train_data, arguments, tokenizer, accelerator)
    elif arguments.streaming:
        train_data = open_stream(arguments, tokenizer)
    else:
        records = open_images(arguments.train_data, arguments.split, arguments, accelerator)
        if arguments.validation_data is None:
            records, held_out = records.hold_out(arguments.validation_share, arguments.seed)
        train_data = open_training_images(records, arguments, tokenizer)

    if arguments.validation_data is not None and is_token_folder(arguments.validation_data):
        validation_data = open_shards(arguments.validation_data, arguments, tokenizer, accelerator)
    else:
        records = held_out or open_images(
            arguments.validation_data, arguments.validation_split, arguments, accelerator
        )
        central = Variants(tokenizer.config.image_size, crops="center", horizontal_flip=False)
        validation_data = tokenize_once(records, "validation", central, 1, arguments, tokenizer)
    if validation_data.class_names != train_data.class_names:
        raise ValueError(f"{arguments.validation_data} and {arguments.train_data} must have the same classes.")
    return train_data, validation_data


def open_shards(
    folder: str, arguments: "GeneratorArguments", tokenizer: VFMTokModel, accelerator: Accelerator
) -> TokenShards:
    shards = TokenShards(folder, arguments.seed, verify=accelerator.is_local_main_process)
    shards.check_tokenizer(tokenizer)
    return shards


def open_images(source: str, split: str, arguments: "GeneratorArguments", accelerator: Accelerator) -> ImageRecords:
    class_names = read_class_names(arguments.class_names)
    with accelerator.main_process_first():  # the datasets library prepares its cache
        return open_records(source, split, arguments.image_column, arguments.label_column, class_names)


def open_stream(arguments: "GeneratorArguments", tokenizer: VFMTokModel) -> ImageStream:
    if arguments.variants:
        raise ValueError("The images of a stream become tokens in every step: --streaming true needs --variants 0.")
    return ImageStream(
        arguments.train_data,
        Augmentation(tokenizer.config.image_size, crop_scale(arguments), arguments.horizontal_flip),
        arguments.split,
        arguments.image_column,
        arguments.label_column,
        read_class_names(arguments.class_names),
        arguments.epoch_images,
        arguments.shuffle_buffer,
        arguments.seed,
    )


def open_training_images(
    records: ImageRecords, arguments: "GeneratorArguments", tokenizer: VFMTokModel
) -> TokenShards | ImageDataset:
    """Images for tokens in every step, or the tokens of their variants."""
    image_size = tokenizer.config.image_size
    if arguments.variants == 0:
        augmentation = Augmentation(image_size, crop_scale(arguments), arguments.horizontal_flip)
        return ImageDataset(records, augmentation, seed=arguments.seed)
    variants = Variants(
        image_size,
        count=arguments.variants,
        crop_scale=crop_scale(arguments),
        horizontal_flip=arguments.horizontal_flip,
        seed=arguments.seed,
    )
    return tokenize_once(records, "train", variants, arguments.neighbours, arguments, tokenizer)


def crop_scale(arguments: "GeneratorArguments") -> tuple[float, float]:
    return arguments.crop_scale[0], arguments.crop_scale[1]


def tokenize_once(
    records: ImageRecords,
    name: str,
    variants: Variants,
    neighbours: int,
    arguments: "GeneratorArguments",
    tokenizer: VFMTokModel,
) -> TokenShards:
    """The tokens of images, kept in the run's folder; those of another tokenizer or other images are replaced."""
    folder = Path(arguments.output) / "tokens" / name
    workers = arguments.num_workers
    extract_tokens(tokenizer, records, folder, variants, neighbours, num_workers=workers, overwrite=True)
    return TokenShards(folder, arguments.seed)


def token_batch(
    batch: dict[str, torch.Tensor], tokenizer: VFMTokModel, neighbours: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class labels and image tokens. Of images, each gives `neighbours` sequences that follow each other."""
    if "image_tokens" in batch:
        return batch["label"], batch["image_tokens"]
    sequences = encode_sequences(tokenizer, batch["pixel_values"], neighbours)
    return batch["label"].repeat_interleave(neighbours), sequences.flatten(0, 1)
