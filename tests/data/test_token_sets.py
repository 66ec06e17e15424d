"""Token sets are ordinary data sets: they are read, changed and written by the `datasets` library, and train all the same."""

import shutil

import datasets
import numpy as np
import pytest
import torch

from tests.data.image_sources import DAMAGED, NUM_IMAGES, write_folder
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.testing import sequences_of, tiny_model
from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.fingerprints import file_sha256
from vfmtok_hf.data.loaders import TrainingLoader
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.data.token_files import load_tokens, save_tokens
from vfmtok_hf.data.token_sets import (
    TokenSet,
    TokenStream,
    check_tokenizer,
    is_token_set,
    tokenizer_identity,
    write_token_table,
)
from vfmtok_hf.data.transforms import ImageViews
from vfmtok_hf.training.checkpoints import Progress
from vfmtok_hf.training.token_extraction import extract_tokens


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Two views of each of 21 readable images, in three files."""
    root = tmp_path_factory.mktemp("tokens")
    records = open_records(write_folder(root / "images"))
    extract_tokens(tokenizer, records, root / "tokens", ImageViews(32, count=2), shard_size=10)
    return root / "tokens"


def assert_equal_sets(one, other):
    assert (one.class_names, one.labels) == (other.class_names, other.labels)
    assert [one.name(index) for index in range(len(one))] == [other.name(index) for index in range(len(other))]
    for index in range(len(one)):
        assert torch.equal(one[index]["image_tokens"], other[index]["image_tokens"])


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_an_extraction(folder, streaming):
    rows = datasets.load_dataset(str(folder), split="train", streaming=streaming)
    assert list(rows.features) == ["image_tokens", "label", "image", "sha256"]
    assert rows.features["label"].names == ["first", "second"]
    rows, tokens = list(rows), TokenSet(folder)
    assert len(rows) == 2 * (NUM_IMAGES - len(DAMAGED)) == 2 * len(tokens)
    for number in (0, 1, 41):
        expected = sequences_of(tokens, number // 2)[number % 2].tolist()
        assert rows[number]["image_tokens"] == expected
        assert rows[number]["label"] == tokens.labels[number // 2]
        assert rows[number]["image"] == tokens.name(number // 2)
    assert rows[0]["sha256"] == file_sha256(folder.parent / "images" / "first" / "00.png")


def test_folders_of_one_name_are_not_taken_for_each_other(folder, tokenizer, tmp_path):
    """The library caches what it reads; a card that names the files would make it tell folders apart by their names alone."""
    records = open_records(folder.parent / "images").hold_out(0.2, seed=0)[1]
    extract_tokens(tokenizer, records, tmp_path / folder.name, ImageViews(32, count=2), shard_size=10)
    for source in (folder, tmp_path / folder.name):
        rows = datasets.load_dataset(str(source), split="train")
        tokens = TokenSet(source)
        assert len(rows) == 2 * len(tokens)
        assert rows[-1]["image"] == tokens.name(len(tokens) - 1)
    assert len(tokens) < len(TokenSet(folder))


def test_what_the_library_writes_trains_alike(folder, tokenizer, tmp_path):
    """Parquet files as `push_to_hub` uploads them, and a folder of `save_to_disk`."""
    rows, expected = datasets.load_dataset(str(folder), split="train"), TokenSet(folder)
    (tmp_path / "pushed" / "data").mkdir(parents=True)
    for part in range(2):
        shard = rows.shard(2, part, contiguous=True)
        shard.to_parquet(tmp_path / "pushed" / "data" / f"train-{part:05d}-of-00002.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "pushed", tmp_path / "saved", tmp_path / "pushed" / "data" / "*.parquet"):
        assert is_token_set(source)
        tokens = TokenSet(source)
        assert_equal_sets(tokens, expected)
        check_tokenizer(tokens, tokenizer)
        torch.manual_seed(1)
        with pytest.raises(ValueError, match="made by another tokenizer"):
            check_tokenizer(tokens, tiny_model())


def test_rows_may_be_selected(folder, tokenizer, tmp_path):
    """Views that no longer follow each other: each image that is left counts once."""
    rows = datasets.load_dataset(str(folder), split="train").filter(lambda row: row["label"] == 1)
    rows.shuffle(seed=0).to_parquet(tmp_path / "tokens.parquet")
    tokens = TokenSet(tmp_path / "tokens.parquet")
    check_tokenizer(tokens, tokenizer)
    assert set(tokens.labels) == {1}
    assert len(tokens) == 12
    assert len({tokens.name(index) for index in range(12)}) == 12


def test_items_come_together_or_one_by_one(folder):
    tokens = TokenSet(folder, seed=3)
    tokens.set_epoch(2)
    together = tokens.__getitems__([5, 0, 20])
    for index, item in zip([5, 0, 20], together, strict=True):
        assert item["index"] == index
        assert torch.equal(item["image_tokens"], tokens[index]["image_tokens"])


# -- streams

NUM_SEQUENCES = 48


@pytest.fixture
def streamed(tokenizer, tmp_path):
    """Sequences that all differ, in three files as `push_to_hub` uploads them."""
    folder = tmp_path / "pushed"
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(64, size=(NUM_SEQUENCES, 9))
    for number, rows in enumerate(np.split(np.arange(NUM_SEQUENCES), 3)):
        names = [f"{row // 2}.png" for row in rows]
        classes = {"labels": (rows % 2).tolist(), "class_names": ["first", "second"]}
        file = folder / f"train-{number:05d}-of-00003.parquet"
        write_token_table(file, tokens[rows], names, names, tokenizer_identity(tokenizer), 64, **classes)
    return folder


def batches(source, position, count, batch_size=6, **share):
    stream = TokenStream(source, epoch_sequences=NUM_SEQUENCES, shuffle_buffer=10)
    loaded = TrainingLoader(stream, batch_size, **share).batches(position)
    return [next(loaded) for _ in range(count)]


def labeled_sequences(batches):
    return sorted(
        (label, sequence)
        for batch in batches
        for label, sequence in zip(batch["label"].tolist(), batch["image_tokens"].tolist(), strict=True)
    )


def rows_of(source):
    rows = datasets.load_dataset(str(source), split="train")
    return sorted((row["label"], row["image_tokens"]) for row in rows)


def test_a_streams_epoch_has_every_sequence_once(streamed):
    both = batches(streamed, Progress(), 16)
    assert labeled_sequences(both[:8]) == labeled_sequences(both[8:]) == rows_of(streamed)
    first, second = (torch.cat([batch["image_tokens"] for batch in epoch]) for epoch in (both[:8], both[8:]))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_and_workers_share_a_streams_epoch(streamed, num_workers):
    share = {"batch_size": 3, "num_workers": num_workers, "num_processes": 2}
    parts = [batches(streamed, Progress(), 8, process_index=index, **share) for index in (0, 1)]
    assert labeled_sequences([*parts[0], *parts[1]]) == rows_of(streamed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped(streamed, num_workers):
    """Over an epoch's end, to the last bit."""

    def values(batches):
        return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]

    whole = values(batches(streamed, Progress(), 12, num_workers=num_workers))
    for stop in (3, 8, 10):
        position = Progress()
        before = batches(streamed, position, stop, num_workers=num_workers)
        after = batches(streamed, Progress(**position.state_dict()), 12 - stop, num_workers=num_workers)
        assert values(before + after) == whole


def test_a_stream_is_of_its_tokenizer(streamed, tokenizer):
    with pytest.raises(ValueError, match="--epoch_images"):
        TokenStream(streamed)
    stream = TokenStream(streamed, epoch_sequences=NUM_SEQUENCES)
    check_tokenizer(stream, tokenizer)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        check_tokenizer(stream, tiny_model())


def test_an_extraction_is_streamed_when_it_is_whole(folder, tmp_path):
    stream = TokenStream(folder)
    assert stream.epoch_items == 2 * (NUM_IMAGES - len(DAMAGED))
    assert labeled_sequences([next(TrainingLoader(stream, stream.epoch_items).batches(Progress()))]) == rows_of(folder)
    copied = shutil.copytree(folder, tmp_path / "copied")
    file = copied / "tokens-00001.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tokens-00001\.parquet is damaged"):
        TokenStream(copied, epoch_sequences=42)
    (copied / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        TokenStream(copied, epoch_sequences=42)


def test_images_are_no_tokens(tmp_path, folder):
    assert is_token_set(folder)
    assert not is_token_set(write_folder(tmp_path / "images"))


def test_tokens_without_classes_are_refused_for_training(tmp_path):
    identity = {"config_sha256": "0", "weights_sha256": "1"}
    write_token_table(tmp_path / "a.parquet", np.zeros((2, 9), int), ["a", "b"], ["0", "1"], identity, 64)
    with pytest.raises(ValueError, match="label_column"):
        TokenSet(tmp_path / "a.parquet")
    labels = {"labels": [0, 1], "class_names": ["a", "b"]}
    write_token_table(tmp_path / "b.parquet", np.zeros((2, 9), int), ["a", "b"], ["0", "1"], identity, 64, **labels)
    datasets.load_dataset("parquet", data_files=str(tmp_path / "b.parquet"), split="train").remove_columns(
        "sha256"
    ).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="lacks sha256"):
        TokenSet(tmp_path / "c.parquet")


def test_codes_of_a_large_codebook_fit(tmp_path):
    identity = {"config_sha256": "0", "weights_sha256": "1"}
    tokens = np.array([[70_000, 0, 1]])
    write_token_table(tmp_path / "a.parquet", tokens, ["a"], ["0"], identity, 2**17)
    assert load_tokens(tmp_path / "a.parquet")[1].tolist() == tokens.tolist()


def test_shards_of_the_earlier_format_say_what_to_do(tmp_path, tokenizer):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    assert is_token_set(tmp_path)
    with pytest.raises(ValueError, match="earlier format.*extract the tokens again"):
        TokenSet(tmp_path)
    records = open_records(write_folder(tmp_path.with_name("images")))
    with pytest.raises(ValueError, match="choose another --output"):
        extract_tokens(tokenizer, records, tmp_path, ImageViews(32, count=1))


def test_tokenized_files_are_such_a_data_set_too(tmp_path):
    pipe = tiny_pipeline()
    files = find_images([write_folder(tmp_path / "images") / "second"])
    image_tokens = pipe.tokenize(list(files.values()))
    save_tokens(tmp_path / "tokens.parquet", list(files), image_tokens, files, pipe.vq_model)
    names, loaded = load_tokens(tmp_path / "tokens.parquet")
    assert names == list(files)
    assert torch.equal(loaded, image_tokens)
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "tokens.parquet"), split="train")
    assert rows[2] == {
        "image_tokens": image_tokens[2].tolist(),
        "image": names[2],
        "sha256": file_sha256(files[names[2]]),
    }
    with pytest.raises(ValueError, match="needs the image files"):
        save_tokens(tmp_path / "other.parquet", names, image_tokens)
