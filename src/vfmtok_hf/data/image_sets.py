"""Sets of images for evaluation: folders of files, and `.npz` files of ADM's evaluation suite."""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from vfmtok_hf.data.files import find_images
from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.image_reading_vfmtok import read_image


class ImageSet(Protocol):
    """Images of one size."""

    name: str

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """8-bit images `(at most batch_size, 3, height, width)`, in order."""
        ...


class FolderImages:
    """
    Image files, and all images below folders.

    Args:
        paths (`Sequence[Path]`): files and folders.
        size (`int`, *optional*): side in pixels to crop and resize to, as VFMTok's image processor does. Without it
            images are not resized and must have the same size.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image.
        ValueError (while reading): an unreadable file, or images of different sizes; the error names the file.
    """

    def __init__(self, paths: Sequence[Path], size: int | None = None):
        self.name = ", ".join(map(str, paths))
        self.files = list(find_images(paths).values())
        self.processor = VFMTokImageProcessor(do_rescale=False, do_normalize=False)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        shape: torch.Size | None = None
        for start in range(0, len(self.files), batch_size):
            images = []
            for file in self.files[start : start + batch_size]:
                images.append(self._read(file))
                shape = shape or images[0].shape
                if images[-1].shape != shape:
                    raise ValueError(
                        f"{self.files[0]} is {shape[2]} x {shape[1]} pixels and {file} {images[-1].shape[2]} x "
                        f"{images[-1].shape[1]}: pass the size that all should be resized to."
                    )
            yield torch.stack(images)

    def _read(self, file: Path) -> torch.Tensor:
        options = {"do_resize": False, "do_center_crop": False} if self.size is None else {"size": self.size}
        return self.processor(read_image(file), return_tensors="pt", **options)["pixel_values"][0]


class NpzImages:
    """
    Images of a `.npz` file in the format of ADM (guided-diffusion): `arr_0`, uint8 `(images, height, width, 3)`. They
    are read batch by batch.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not contain this array.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.path = path
        with self._array() as (_, self.shape):
            pass

    def _array(self) -> "_NpyMember":
        return _NpyMember(self.path, "arr_0")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        _, height, width, channels = self.shape
        with self._array() as (member, _):
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                # A copy, because torch needs writable memory.
                pixels = np.frombuffer(member.read(count * height * width * channels), np.uint8).copy()
                if pixels.size != count * height * width * channels:
                    raise ValueError(f"{self.path} is truncated: write or download it again.")
                yield torch.from_numpy(pixels.reshape(count, height, width, channels)).permute(0, 3, 1, 2)


class _NpyMember:
    """Open an array inside a `.npz` after its header. Yields the open member and the array's shape."""

    def __init__(self, path: Path, name: str):
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        self.path, self.name = path, f"{name}.npy"

    def __enter__(self):
        try:
            self.archive = zipfile.ZipFile(self.path)
            self.member = self.archive.open(self.name)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{self.path} is not a .npz file with images in arr_0: {error}") from error
        version = np.lib.format.read_magic(self.member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(self.member)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran_order:
            raise ValueError(
                f"{self.path} must contain uint8 images (images, height, width, 3), got {dtype} of shape {shape}."
            )
        return self.member, shape

    def __exit__(self, *_):
        self.member.close()
        self.archive.close()


def write_npz(path: Path, batches: Iterable[torch.Tensor], num_images: int, labels: torch.Tensor) -> None:
    """
    Write images atomically in the format of ADM's evaluation suite: `arr_0`, uint8 `(images, height, width, 3)`,
    and `arr_1`, their class labels. Only one batch is in memory at a time.

    Args:
        batches (iterable of `torch.ByteTensor` of shape `(any, 3, height, width)`): `num_images` images in all.
        labels (`torch.LongTensor` of shape `(num_images,)`).
    """
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for index, batch in enumerate(batches):
                pixels = np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
                if index == 0:
                    _write_header(member, (num_images, *pixels.shape[1:]), pixels.dtype)
                member.write(pixels.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            _write_header(member, tuple(labels.shape), np.dtype(np.int64))
            member.write(labels.numpy().astype(np.int64).tobytes())


def _write_header(member, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def open_images(path: Path, size: int | None = None) -> ImageSet:
    """A folder of images or a `.npz` file."""
    if path.suffix == ".npz":
        return NpzImages(path)
    return FolderImages([path], size)
