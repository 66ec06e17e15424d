"""Token shards: complete, each image once, whatever interrupts their making or damages them."""

import json
import logging
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image

from tests.testing import sequences_of, tiny_model
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.token_sets import TokenSet, check_tokenizer, encode_sequences, tokenizer_identity
from vfmtok_hf.data.transforms import ImageViews
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.image_reading_vfmtok import read_image
from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.training import train_generator
from vfmtok_hf.training.arguments import ExtractionArguments
from vfmtok_hf.training.token_extraction import TokenExtraction, extract_tokens


NUM_IMAGES = 22
DAMAGED, DUPLICATE = 5, 17  # the latter repeats image 2
VIEWS = ImageViews(32, count=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        file = root / ("first" if number < 11 else "second") / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    damaged = root / "first" / f"{DAMAGED:02d}.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    shutil.copy(root / "first" / "02.png", root / "second" / f"{DUPLICATE:02d}.png")
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    model = tiny_model()
    model.save_pretrained(tmp_path_factory.mktemp("tokenizer") / "model")
    return model


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(images, tokenizer, tmp_path_factory):
    """22 images in five shards."""
    output = tmp_path_factory.mktemp("tokens")
    extract_tokens(tokenizer, open_records(images), output, VIEWS, shard_size=5, batch_size=6)
    return output


@pytest.fixture
def copied_shards(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_every_image_is_there_once_with_all_its_views(images, tokenizer, shards):
    records, data = open_records(images), TokenSet(shards)
    kept = [number for number in range(NUM_IMAGES) if number not in (DAMAGED, DUPLICATE)]
    assert [int(data.name(index)[-6:-4]) for index in range(len(data))] == kept
    assert data.labels == [records.labels[number] for number in kept]
    assert (data.num_unreadable, data.class_names) == (1, ["first", "second"])
    assert data.index["num_images"] == len(kept)
    assert data.index["unreadable"] == [records.name(DAMAGED)]
    for index, number in enumerate(kept):
        views = VIEWS(read_image(records.encoded(number)), number)
        expected = tokenizer.encode(views).image_tokens
        assert torch.equal(sequences_of(data, index), expected)


def test_an_items_sequence_changes_with_the_epoch_and_repeats(shards):
    data = TokenSet(shards)
    epochs = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        epochs.append(torch.stack([data[index]["image_tokens"] for index in range(len(data))]))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_second_nearest_rows_are_a_sequence_of_their_own(tokenizer):
    pixel_values = torch.rand(4, 3, 32, 32) * 2 - 1
    sequences = encode_sequences(tokenizer, pixel_values, codebook_top_k=2)
    assert sequences.shape == (4, 2, 9)
    with torch.no_grad():
        encoded = tokenizer.encode(pixel_values)
    assert torch.equal(sequences[:, 0], encoded.image_tokens)
    similarity = torch.nn.functional.normalize(encoded.latents, dim=-1) @ tokenizer.quantizer.normalized_codebook().T
    similarity.scatter_(-1, sequences[:, :1].movedim(1, -1), -2)
    assert torch.equal(sequences[:, 1], similarity.argmax(-1))


def test_ten_crops_with_second_nearest_rows(images, tokenizer, tmp_path):
    image_views = ImageViews(32, crops="ten", ten_crop_ranges=(1.1, 1.05))
    records = open_records(images)
    extract_tokens(tokenizer, records, tmp_path, image_views, codebook_top_k=2, batch_size=7)
    data = TokenSet(tmp_path)
    views = image_views(read_image(records.encoded(0)), 0)
    expected = encode_sequences(tokenizer, views, 2).flatten(0, 1)
    assert len(expected) == 40
    assert torch.equal(sequences_of(data, 0), expected)


# -- interruptions


def test_missing_and_damaged_shards_are_made_again_and_no_others(images, tokenizer, shards, copied_shards, caplog):
    (copied_shards / "tokens-00001.parquet").unlink()
    damaged = copied_shards / "tokens-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    (copied_shards / ".123.partial.parquet").write_bytes(b"half")
    kept = (copied_shards / "tokens-00000.parquet").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, "vfmtok_hf.training"):
        extract_tokens(tokenizer, open_records(images), copied_shards, VIEWS, shard_size=5, batch_size=6)
    assert files_of(copied_shards) == files_of(shards)
    assert (copied_shards / "tokens-00000.parquet").stat().st_mtime_ns == kept
    assert sum(" of 5:" in record.getMessage() for record in caplog.records) == 2


def extract(tokenizer, images, output):
    extract_tokens(tokenizer, open_records(images), output, VIEWS, shard_size=5, batch_size=6)


def extract_as_one_of_several(tokenizer, images, output):
    Accelerator(cpu=True)
    extract(tokenizer, images, output)


def test_killed_extraction_goes_on(images, tokenizer, shards, tmp_path):
    """kill -9 as soon as two shards are there; what the second run writes is what one run would have written."""
    process = multiprocessing.get_context("fork").Process(target=extract, args=(tokenizer, images, tmp_path))
    process.start()
    while len(list(tmp_path.glob("tokens-*"))) < 2:
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    with pytest.raises(FileNotFoundError, match="extraction has not finished"):
        TokenSet(tmp_path)
    extract(tokenizer, images, tmp_path)
    assert files_of(tmp_path) == files_of(shards)


def test_two_processes_write_what_one_writes(images, tokenizer, shards, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(extract_as_one_of_several, args=(tokenizer, images, tmp_path), num_processes=2)
    assert files_of(tmp_path) == files_of(shards)


@pytest.mark.slow
def test_the_command_on_two_processes(images, tokenizer_folder, shards, tmp_path):
    options = {
        "data": images,
        "tokenizer": tokenizer_folder,
        "output": tmp_path,
        "num_crops": 3,
        "shard_size": 5,
        "batch_size": 6,
    }
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    arguments = [item for name, value in options.items() for item in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, "-m", "vfmtok_hf.training.extract_tokens", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == files_of(shards)
    assert sorted(re.findall(r"shard (\d) of 5", done.stderr)) == list("12345")  # each once


def test_tokens_of_other_settings_are_not_overwritten(images, tokenizer, copied_shards):
    with pytest.raises(ValueError, match="other settings: choose another --output"):
        extract_tokens(tokenizer, open_records(images), copied_shards, ImageViews(32, count=2), shard_size=5)


@pytest.mark.parametrize(("crops", "is_continued"), [("center", False), ("random", True)])
def test_token_sets_of_earlier_versions_are_continued_unless_they_were_resized_otherwise(
    images, tokenizer, tmp_path, monkeypatch, crops, is_continued
):
    records, views = open_records(images), ImageViews(32, crops=crops, count=2)
    settings = {**asdict(views), "codebook_top_k": 1, "shard_size": 5}  # what the fingerprint was computed from
    with monkeypatch.context() as earlier:
        earlier.setattr(TokenExtraction, "settings", settings)
        extraction = TokenExtraction(tokenizer.eval(), records, tmp_path, views, shard_size=5)
        extraction.prepare()
        extraction.write_shard(0)
    continued = nullcontext() if is_continued else pytest.raises(ValueError, match="other settings: choose another")
    with continued:
        extract_tokens(tokenizer, records, tmp_path, views, shard_size=5)
    assert (tmp_path / "index.json").is_file() == is_continued


def test_the_command_and_the_function_have_the_same_defaults():
    arguments, image_views = ExtractionArguments(data="a", tokenizer="b", output="c"), ImageViews(32)
    assert (arguments.num_crops, tuple(arguments.crop_scale)) == (image_views.count, image_views.crop_scale)
    assert (arguments.crops, tuple(arguments.ten_crop_ranges)) == (image_views.crops, image_views.ten_crop_ranges)
    assert (arguments.horizontal_flip, arguments.seed) == (image_views.horizontal_flip, image_views.seed)


# -- reading


def test_damage_is_named(copied_shards):
    file = copied_shards / "tokens-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(ValueError, match=r"tokens-00002\.parquet is damaged"):
        TokenSet(copied_shards)
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"tokens-00002\.parquet has \d+ bytes, not \d+"):
        TokenSet(copied_shards, verify=False)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00002\.parquet is missing"):
        TokenSet(copied_shards)
    (copied_shards / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="format 'other'"):
        TokenSet(copied_shards)


def test_tokens_of_another_tokenizer_are_refused(tokenizer, tokenizer_folder, shards):
    data = TokenSet(shards)
    check_tokenizer(data, type(tokenizer).from_pretrained(tokenizer_folder))
    torch.manual_seed(1)
    other = tiny_model()
    with pytest.raises(ValueError, match="made by another tokenizer"):
        check_tokenizer(data, other)


def test_a_tokenizers_identity_is_that_of_its_encoder(tokenizer, tokenizer_folder):
    """A decoder trained further draws the same tokens better; it does not make others."""
    changed = type(tokenizer).from_pretrained(tokenizer_folder)
    torch.nn.init.normal_(changed.vit_decoder.image_mask_token)
    assert tokenizer_identity(changed) == tokenizer_identity(tokenizer)
    with torch.no_grad():
        changed.quantizer.codebook.weight[0, 0] += 1
    assert tokenizer_identity(changed)["weights_sha256"] != tokenizer_identity(tokenizer)["weights_sha256"]
    assert tokenizer_identity(changed)["config_sha256"] == tokenizer_identity(tokenizer)["config_sha256"]


def test_generators_train_on_shards(tokenizer_folder, shards, tmp_path):
    options = {
        "tokenizer": tokenizer_folder,
        "train_data": shards,
        "validation_data": shards,
        "output": tmp_path / "run",
        "max_steps": 2,
        "batch_size": 4,
        "model": "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}",
    }
    train_generator.main([item for name, value in options.items() for item in (f"--{name}", str(value))])
    assert not (tmp_path / "run" / "tokens").exists()
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("size", [(96, 80), (33, 150), (64, 64), (40, 32)])
def test_central_crops_have_the_tokens_of_the_pipeline(tokenizer, tmp_path, size):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        (tmp_path / "images" / "class").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / "class" / f"{number}.jpg")
    views = ImageViews(32, crops="center", horizontal_flip=False)
    extract_tokens(tokenizer, open_records(tmp_path / "images"), tmp_path / "tokens", views)
    pipe = VFMTokPipeline(tokenizer, None, VFMTokImageProcessor(size=32))
    expected = pipe.tokenize(sorted((tmp_path / "images" / "class").iterdir()))
    tokens = TokenSet(tmp_path / "tokens")
    assert all(torch.equal(sequences_of(tokens, index)[0], row) for index, row in enumerate(expected))


def test_an_image_far_longer_than_wide_is_left_out(tokenizer, tmp_path):
    (tmp_path / "images" / "class").mkdir(parents=True)
    for name, size in (("a", (32, 32)), ("b", (3300, 32))):
        Image.new("RGB", size).save(tmp_path / "images" / "class" / f"{name}.png")
    views = ImageViews(32, crops="center", horizontal_flip=False)
    index = extract_tokens(tokenizer, open_records(tmp_path / "images"), tmp_path / "tokens", views)
    assert (index["num_images"], [name.rpartition("/")[2] for name in index["unreadable"]]) == (1, ["b.png"])
