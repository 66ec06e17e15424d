"""Image tokens of files: finding, streaming, writing and reading."""

import json
import os

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.token_files import load_tokens, save_tokens, tokenize_files


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("b.png", "a.jpg", "sub/c.PNG"):
        array = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        PIL.Image.fromarray(array).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_files_are_tokenized_batch_by_batch(pipe, folder, batch_size):
    images = find_images([folder])
    batches = list(tokenize_files(pipe, images, batch_size))
    assert max(len(names) for names, _ in batches) <= batch_size
    assert [name for names, _ in batches for name in names] == list(images)
    assert torch.equal(torch.cat([tokens for _, tokens in batches]), pipe.tokenize(list(images.values())))


def test_nothing_is_read_ahead_of_its_batch(pipe, folder):
    stream = tokenize_files(pipe, find_images([folder]), batch_size=1)
    next(stream)
    (folder / "b.png").write_text("damaged meanwhile")
    with pytest.raises(ValueError, match=r"b\.png"):
        next(stream)


def test_images_that_cannot_be_used_are_named_or_left_out(pipe, folder):
    (folder / "damaged.png").write_text("no image")
    PIL.Image.new("RGB", (1000, 2)).save(folder / "strip.png")
    images = find_images([folder])
    with pytest.raises(ValueError, match=r"damaged\.png.*cannot be read"):
        list(tokenize_files(pipe, images))
    reasons = []
    ((names, image_tokens),) = tokenize_files(pipe, images, on_error=reasons.append)
    assert names == ["a.jpg", "b.png", "sub/c.PNG"]
    assert len(image_tokens) == 3
    assert all(
        str(folder / name) in reason for name, reason in zip(("damaged.png", "strip.png"), reasons, strict=True)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_save_load_round_trip(tmp_path, suffix):
    path = tmp_path / f"tokens{suffix}"
    image_tokens = torch.randint(0, 16384, (3, 9))
    names = ["a.jpg", "sub/b.png", "Straße.png"]
    save_tokens(path, names, image_tokens)
    loaded_names, loaded_tokens = load_tokens(path)
    assert loaded_names == names
    assert torch.equal(loaded_tokens, image_tokens)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_files_from_elsewhere_need_no_names(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(18).reshape(2, 9))
    save_file({"image_tokens": torch.arange(18).reshape(2, 9)}, tmp_path / "tokens.safetensors")
    for name in ("tokens.npy", "tokens.safetensors"):
        names, image_tokens = load_tokens(tmp_path / name)
        assert names == ["000000", "000001"]
        assert torch.equal(image_tokens, torch.arange(18).reshape(2, 9))


def test_bad_token_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"end in \.safetensors or \.npy"):
        save_tokens(tmp_path / "tokens.pt", ["a"], torch.zeros(1, 9))
    with pytest.raises(FileNotFoundError, match="no token file"):
        load_tokens(tmp_path / "absent.npy")
    for name in ("text.npy", "text.safetensors"):
        (tmp_path / name).write_text("neither")
        with pytest.raises(ValueError, match="not a file of image tokens"):
            load_tokens(tmp_path / name)
    np.save(tmp_path / "flat.npy", np.arange(9))
    np.save(tmp_path / "float.npy", np.zeros((1, 9)))
    for name in ("flat.npy", "float.npy"):
        with pytest.raises(ValueError, match="must contain integers"):
            load_tokens(tmp_path / name)
    np.save(tmp_path / "two.npy", np.zeros((2, 9), dtype=np.int32))
    (tmp_path / "two.names.json").write_text(json.dumps(["one"]))
    with pytest.raises(ValueError, match="1 names for 2 images"):
        load_tokens(tmp_path / "two.npy")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a file of image tokens"):
        load_tokens(tmp_path / "other.safetensors")
