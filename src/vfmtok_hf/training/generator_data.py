"""Data of a generator: token sets, or images that are encoded once or in every step."""

from pathlib import Path

import torch
from accelerate import Accelerator

from vfmtok_hf.data.image_datasets import ImageDataset
from vfmtok_hf.data.sources import ImageRecords
from vfmtok_hf.data.streams import Stream
from vfmtok_hf.data.token_sets import TokenSet, TokenStream, check_tokenizer, encode_sequences, is_token_set
from vfmtok_hf.data.transforms import ImageViews
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.training.arguments import GeneratorArguments
from vfmtok_hf.training.image_data import open_training_images, open_validation_images, training_augmentation
from vfmtok_hf.training.run_data import check_data
from vfmtok_hf.training.token_extraction import extract_tokens


def open_token_data(
    arguments: GeneratorArguments, tokenizer: VFMTokModel, accelerator: Accelerator
) -> tuple[TokenSet | ImageDataset | Stream, TokenSet]:
    """
    Open training data, as tokens or images, and validation data, as tokens.

    Raises:
        ValueError: there are no validation data and none can be held out, or their classes differ.
    """
    held_out = None
    train_source: TokenSet | ImageRecords | Stream
    if is_token_set(arguments.train_data, arguments.split):
        if arguments.validation_data is None:
            raise ValueError("Token sets cannot be split: pass --validation_data.")
        train_source = open_token_set(
            arguments.train_data, arguments.split, arguments, tokenizer, accelerator, arguments.streaming
        )
    else:
        if arguments.streaming and arguments.num_crops:
            raise ValueError("The images of a stream are encoded in every step: --streaming true needs --num_crops 0.")
        train_source, held_out = open_training_images(arguments, tokenizer.config.image_size, accelerator)
    validation_source: TokenSet | ImageRecords
    if arguments.validation_data is not None and is_token_set(arguments.validation_data, arguments.validation_split):
        validation_source = open_token_set(
            arguments.validation_data, arguments.validation_split, arguments, tokenizer, accelerator
        )
    else:
        validation_source = open_validation_images(arguments, held_out, accelerator)
    if validation_source.class_names != train_source.class_names:
        raise ValueError(f"{arguments.validation_data} and {arguments.train_data} must have the same classes.")
    check_data(arguments, train_source, validation_source, accelerator.is_main_process, classes_may_change=False)

    train_data: TokenSet | ImageDataset | Stream | ImageRecords = train_source
    if isinstance(train_source, ImageRecords):
        train_data = tokens_of(train_source, arguments, tokenizer)
    validation_data = validation_source
    if isinstance(validation_source, ImageRecords):
        central = ImageViews(tokenizer.config.image_size, crops="center", horizontal_flip=False)
        validation_data = tokenize_once(validation_source, "validation", central, 1, arguments, tokenizer)
    return train_data, validation_data


def open_token_set(
    source: str,
    split: str,
    arguments: GeneratorArguments,
    tokenizer: VFMTokModel,
    accelerator: Accelerator,
    streaming: bool = False,
) -> TokenSet | TokenStream:
    seed, verify = arguments.seed, accelerator.is_local_main_process
    tokens: TokenSet | TokenStream
    with accelerator.main_process_first():  # the datasets library prepares its cache
        if streaming:
            tokens = TokenStream(source, split, arguments.epoch_images, arguments.shuffle_buffer, seed, verify)
        else:
            tokens = TokenSet(source, seed, verify, split)
    check_tokenizer(tokens, tokenizer)
    return tokens


def tokens_of(records: ImageRecords, arguments: GeneratorArguments, tokenizer: VFMTokModel) -> TokenSet | ImageDataset:
    """Images for tokens in every step, or the tokens of their views."""
    augmentation = training_augmentation(arguments, tokenizer.config.image_size)
    if arguments.num_crops == 0:
        return ImageDataset(records, augmentation, seed=arguments.seed)
    views = ImageViews(
        augmentation.image_size,
        count=arguments.num_crops,
        crop_scale=augmentation.crop_scale,
        horizontal_flip=augmentation.horizontal_flip,
        seed=arguments.seed,
    )
    return tokenize_once(records, "train", views, arguments.codebook_top_k, arguments, tokenizer)


def tokenize_once(
    records: ImageRecords,
    name: str,
    views: ImageViews,
    codebook_top_k: int,
    arguments: GeneratorArguments,
    tokenizer: VFMTokModel,
) -> TokenSet:
    """Encode images to tokens in the run's folder. Tokens of another tokenizer or other images are replaced."""
    folder = Path(arguments.output) / "tokens" / name
    workers = arguments.num_workers
    extract_tokens(tokenizer, records, folder, views, codebook_top_k, num_workers=workers, overwrite=True)
    return TokenSet(folder, arguments.seed)


def token_batch(
    batch: dict[str, torch.Tensor], tokenizer: VFMTokModel, codebook_top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class labels and image tokens of a batch. Each image has `codebook_top_k` consecutive sequences."""
    if "image_tokens" in batch:
        return batch["label"], batch["image_tokens"]
    sequences = encode_sequences(tokenizer, batch["pixel_values"], codebook_top_k)
    return batch["label"].repeat_interleave(codebook_top_k), sequences.flatten(0, 1)
