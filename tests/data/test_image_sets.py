"""Sets of images: folders and ADM's `.npz`."""

import numpy as np
import pytest
import torch

from tests.evaluation.folders import write_images
from vfmtok_hf.data.image_sets import FolderImages, NpzImages, open_images, write_npz


def test_a_folder_comes_in_batches_in_order(tmp_path):
    write_images(tmp_path, 5, size=8)
    images = FolderImages([tmp_path])
    batches = list(images.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert len(images) == 5
    assert batches[0].dtype == torch.uint8
    assert torch.equal(torch.cat(batches), torch.cat(list(images.batches(5))))


def test_mixed_sizes_are_refused_by_name_unless_a_size_is_given(tmp_path):
    write_images(tmp_path / "a", 2, size=16)
    write_images(tmp_path / "b", 1, size=(20, 24))
    with pytest.raises(ValueError, match=r"16 x 16 pixels and .*000\.png 20 x 24"):
        list(FolderImages([tmp_path]).batches(1))
    assert torch.cat(list(FolderImages([tmp_path], size=12).batches(2))).shape == (3, 3, 12, 12)


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "letter.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"letter\.png"):
        list(FolderImages([tmp_path]).batches(4))


def test_npz_is_adms(tmp_path):
    pixels = torch.randint(0, 256, (7, 3, 6, 5), dtype=torch.uint8)
    write_npz(tmp_path / "samples.npz", pixels.split(3), 7, torch.arange(7) % 4)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
        assert archive["arr_1"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    images = open_images(tmp_path / "samples.npz")
    assert len(images) == 7
    assert torch.equal(torch.cat(list(images.batches(4))), pixels)


def test_compressed_npz_is_read_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "images.npz", pixels)
    images = torch.cat(list(NpzImages(tmp_path / "images.npz").batches(3)))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)


def test_npz_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in (("floats", "must contain uint8"), ("other", "arr_0"), ("text", "arr_0")):
        with pytest.raises(ValueError, match=message):
            NpzImages(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        NpzImages(tmp_path / "missing.npz")
