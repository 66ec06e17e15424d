"""Encode images to a token set, on one or several processes."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader, Dataset

from vfmtok_hf.data.fingerprints import file_sha256, json_sha256
from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.data.sources import ImageRecords, open_records, read_class_names
from vfmtok_hf.data.token_sets import (
    EARLIER_SHARDS,
    FORMAT,
    INDEX_FILE,
    SHARDS,
    check_shard,
    encode_sequences,
    read_index,
    shard_facts,
    tokenizer_identity,
    write_token_table,
)
from vfmtok_hf.data.transforms import ImageViews
from vfmtok_hf.modeling.image_reading_vfmtok import read_image
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.training.arguments import ExtractionArguments
from vfmtok_hf.training.finetuning import load_tokenizer
from vfmtok_hf.training.logs import configure_logging, logger


@dataclass(frozen=True, eq=False)
class TokenExtraction:
    """
    The parts of an extraction. Shards are numbered; any process can write any of them, with the same result.

    Args:
        tokenizer ([`VFMTokModel`]): on the device to use.
        records ([`ImageRecords`]): the images.
        output (`Path`): folder of the token set.
        views ([`ImageViews`]): the views of an image.
        codebook_top_k, shard_size, batch_size, num_workers: as in [`extract_tokens`].
    """

    tokenizer: VFMTokModel
    records: ImageRecords
    output: Path
    views: ImageViews
    codebook_top_k: int = 1
    shard_size: int = 4096
    batch_size: int = 32
    num_workers: int = 0

    @cached_property
    def identity(self) -> str:
        """Digest of the tokenizer's weights."""
        return tokenizer_identity(self.tokenizer)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the tokens depend on."""
        settings = {**asdict(self.views), "codebook_top_k": self.codebook_top_k, "shard_size": self.shard_size}
        if self.views.crops == "center":
            # Earlier versions resized with another filter. Their unfinished token sets must not be continued.
            settings["resized_by"] = "VFMTokImageProcessor"
        return settings

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that the tokens depend on."""
        return json_sha256([FORMAT, self.identity, self.records.fingerprint, self.settings])

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-len(self.records) // self.shard_size)

    def finished(self) -> dict[str, Any] | None:
        """The index if the token set is complete, else None."""
        return finished_index(self.output, self.fingerprint)

    def prepare(self, overwrite: bool = False) -> None:
        """
        Prepare the folder before any process writes a shard. `overwrite` is as in [`extract_tokens`].

        Raises:
            ValueError: it contains other tokens.
        """
        _prepare(self.output, self.fingerprint, overwrite)

    def is_missing(self, number: int) -> bool:
        """Whether shard `number` does not exist yet."""
        return not (self.output / shard_name(number)).is_file()

    def write_shard(self, number: int, progress_callback: Callable[[int], None] | None = None) -> None:
        """Encode the images of shard `number` and write its file. `progress_callback` is as in [`extract_tokens`]."""
        records = self.records
        indices = range(number * self.shard_size, min((number + 1) * self.shard_size, len(records)))
        images, image_tokens = _encode_shard(
            self.tokenizer,
            _ViewedImages(records, self.views, indices),
            self.codebook_top_k,
            self.batch_size,
            self.num_workers,
            progress_callback,
        )
        unreadable = sorted({*indices} - {image["index"] for image in images})
        facts = {"fingerprint": self.fingerprint, "unreadable": [records.name(index) for index in unreadable]}
        rows = [image for image in images for _ in range(self.views.num_views * self.codebook_top_k)]
        with whole_file(self.output / shard_name(number)) as temporary:
            write_token_table(
                temporary,
                image_tokens,
                [records.name(image["index"]) for image in rows],
                [image["sha256"] for image in rows],
                self.identity,
                self.tokenizer.config.codebook_size,
                [image["label"] for image in rows],
                records.class_names,
                facts,
            )
        logger.info("shard %d of %d: %d images", number + 1, self.num_shards, len(images))

    def write_index(self) -> None:
        """
        Write the index after all shards.

        Raises:
            ValueError: no image can be decoded.
        """
        index = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "tokenizer": self.identity,
            "codebook_size": self.tokenizer.config.codebook_size,
            "num_image_tokens": self.tokenizer.config.num_anchors,
            "settings": self.settings,
            "num_sequences": self.views.num_views * self.codebook_top_k,
            **_summary(self.records, [self.output / shard_name(number) for number in range(self.num_shards)]),
        }
        if index["num_images"] == 0:
            raise ValueError(f"None of the {len(self.records)} images of {self.records.source} can be decoded.")
        with whole_file(self.output / INDEX_FILE) as temporary:
            temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")


def extract_tokens(
    tokenizer: VFMTokModel,
    records: ImageRecords,
    output: str | Path,
    views: ImageViews,
    codebook_top_k: int = 1,
    shard_size: int = 4096,
    batch_size: int = 32,
    num_workers: int = 0,
    overwrite: bool = False,
    progress_callback: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """
    Write the tokens of all images to parquet files and return their index. Existing files are kept.

    Several processes (from `torchrun` or `accelerate launch`) share the shards, so each image is encoded by exactly one.
    Images that cannot be decoded are left out and named in the log and in the index. Byte-identical images are encoded
    once; the index names the others as duplicates.

    Args:
        tokenizer ([`VFMTokModel`]): on the device to use.
        views ([`ImageViews`]): the views of an image.
        codebook_top_k (`int`): token sequences per view, see [`encode_sequences`].
        shard_size (`int`): images per shard.
        batch_size (`int`): views encoded at once. It does not change the result.
        overwrite (`bool`): replace tokens of another tokenizer, other images or other settings. Otherwise they raise.
        progress_callback: called with the number of images after each batch of this process.

    Raises:
        ValueError: `output` contains other tokens, or no image can be decoded.
    """
    state, tokenizer = PartialState(), tokenizer.eval()
    extraction = TokenExtraction(
        tokenizer, records, Path(output), views, codebook_top_k, shard_size, batch_size, num_workers
    )
    finished = extraction.finished()
    state.wait_for_everyone()
    if finished is not None:
        return finished
    if state.is_main_process:
        extraction.prepare(overwrite)
    state.wait_for_everyone()
    missing = [number for number in range(extraction.num_shards) if extraction.is_missing(number)]
    state.wait_for_everyone()  # before the first new shard appears, so that all processes see the same missing ones
    for number in missing[state.process_index :: state.num_processes]:
        extraction.write_shard(number, progress_callback)
    state.wait_for_everyone()
    if state.is_main_process:
        extraction.write_index()
    state.wait_for_everyone()
    return read_index(extraction.output)


def finished_index(output: Path, fingerprint: str) -> dict[str, Any] | None:
    """The index of a complete folder; shards are checked by their sizes."""
    try:
        index = read_index(output)
        for shard in index["shards"]:
            check_shard(output, shard, verify=False)
    except (FileNotFoundError, ValueError):
        return None
    return index if index["fingerprint"] == fingerprint else None


def shard_name(number: int) -> str:
    return SHARDS.replace("*", f"{number:05d}")


def _prepare(output: Path, fingerprint: str, overwrite: bool) -> None:
    """Remove leftovers of a killed process, damaged shards and other tokens from the folder."""
    output.mkdir(parents=True, exist_ok=True)
    for partial in output.glob(".*.partial*"):
        partial.unlink()
    for file in (*output.glob(SHARDS), *output.glob(EARLIER_SHARDS)):
        facts = shard_facts(file) if file.match(SHARDS) else {}
        if facts is None:
            logger.warning("%s is damaged: writing it again", file)
            file.unlink()
            continue
        belongs = facts.get("fingerprint") == fingerprint
        if not belongs and not overwrite:
            raise ValueError(
                f"{output} contains tokens of another tokenizer, other images or other settings: choose another --output."
            )
        if not belongs:
            logger.info("%s belongs to another tokenizer, other images or other settings: writing it again", file)
            file.unlink()
    (output / INDEX_FILE).unlink(missing_ok=True)


class _ViewedImages(Dataset):
    """All views of single images; `views` is None if the image cannot be decoded."""

    def __init__(self, records: ImageRecords, views: ImageViews, indices: range):
        self.records = records
        self.views = views
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        try:
            encoded = self.records.encoded(index)
            views = self.views(read_image(encoded, self.records.name(index), self.views.min_side), index)
        except ValueError as error:  # damaged, or far longer than wide
            logger.warning("skipping an image: %s", error)
            return {"views": None, "index": index}
        sha256 = hashlib.sha256(encoded).hexdigest()
        return {"views": views, "index": index, "label": self.records.labels[index], "sha256": sha256}


def _encode_shard(
    tokenizer: VFMTokModel,
    shard: _ViewedImages,
    codebook_top_k: int,
    batch_size: int,
    num_workers: int,
    progress_callback: Callable[[int], None] | None,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The readable images of a shard, and the tokens of all their views in order."""
    images_at_once = max(batch_size // shard.views.num_views, 1)
    loader = DataLoader(
        shard, batch_size=images_at_once, num_workers=num_workers, collate_fn=list, generator=torch.Generator()
    )
    # An array even if no image of the shard can be decoded.
    sequences = [np.empty((0, tokenizer.config.num_anchors), np.int64)]
    readable: list[dict[str, Any]] = []
    for images in loader:
        found = [image for image in images if image["views"] is not None]
        if found:
            pixel_values = torch.cat([image.pop("views") for image in found]).to(tokenizer.device)
            parts = [encode_sequences(tokenizer, part, codebook_top_k) for part in pixel_values.split(batch_size)]
            # images * views, codebook_top_k, tokens -> images * views * codebook_top_k, tokens
            sequences.append(torch.cat(parts).flatten(0, 1).cpu().numpy())
            readable += found
        if progress_callback is not None:
            progress_callback(len(images))
    return readable, np.concatenate(sequences)


def _summary(records: ImageRecords, files: list[Path]) -> dict[str, Any]:
    """The index entries of the shards: checksums, images left out, and duplicates."""
    shards, unreadable, duplicates = [], [*records.unlabeled], []
    first_name: dict[str, str] = {}  # by sha256
    for file in files:
        unreadable += shard_facts(file)["unreadable"]
        table = pq.read_table(file, columns=["image", "sha256"])
        images = dict(zip(table["image"].to_pylist(), table["sha256"].to_pylist(), strict=True))
        duplicates += [name for name, digest in images.items() if first_name.setdefault(digest, name) != name]
        size = file.stat().st_size
        shards.append({"file": file.name, "images": len(images), "bytes": size, "sha256": file_sha256(file)})
    return {
        "num_images": len(first_name),
        "unreadable": unreadable,
        "duplicates": duplicates,
        "shards": shards,
    }


def open_extraction(arguments: ExtractionArguments, device: torch.device) -> TokenExtraction:
    """Load the tokenizer to `device` and open the images, as `arguments` say."""
    tokenizer = load_tokenizer(arguments.tokenizer).to(device)
    records = open_records(
        arguments.data,
        arguments.split,
        arguments.image_column,
        arguments.label_column,
        read_class_names(arguments.class_names),
    )
    views = ImageViews(
        tokenizer.config.image_size,
        arguments.crops,
        arguments.num_crops,
        (arguments.crop_scale[0], arguments.crop_scale[1]),
        tuple(arguments.ten_crop_ranges),
        arguments.horizontal_flip,
        arguments.seed,
    )
    return TokenExtraction(
        tokenizer,
        records,
        Path(arguments.output),
        views,
        arguments.codebook_top_k,
        arguments.shard_size,
        arguments.batch_size,
        arguments.num_workers,
    )


def extract(arguments: ExtractionArguments) -> None:
    """Write the token set that `arguments` describe."""
    configure_logging()
    # By default, Accelerate does not connect CPU processes.
    state = Accelerator(cpu=not torch.accelerator.is_available())
    with state.main_process_first():  # the datasets library prepares its cache
        extraction = open_extraction(arguments, state.device)
    index = extract_tokens(**{field.name: getattr(extraction, field.name) for field in fields(extraction)})
    if state.is_main_process:
        logger.info(
            "%d images with %d sequences each in %s; %d unreadable, %d duplicates left out",
            index["num_images"],
            index["num_sequences"],
            arguments.output,
            len(index["unreadable"]),
            len(index["duplicates"]),
        )
