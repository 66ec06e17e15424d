"""Read images of any type as upright 8-bit RGB without transparency, or raise an error that names the image."""

import io
import os
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL.ExifTags import Base as ExifTag
from PIL.Image import Transpose
from transformers.image_utils import infer_channel_dimension_format


UPRIGHT_BY_ORIENTATION = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


class UnreadableImage(ValueError):
    """An image cannot be read: it is damaged, empty or of an unknown format. The message states its name and the reason."""


def read_image(
    image: Any,
    name: str | None = None,
    min_side: int | None = None,
    input_data_format: str | None = None,
    timeout: float = 30.0,
    background: tuple[int, int, int] = WHITE,
) -> PIL.Image.Image:
    """
    Read an image of any type as viewers show it: upright, 8-bit RGB, transparency on white.

    The same image gives the same pixels from every source. 16-bit values are divided by 257 and rounded. EXIF data are used
    only for the orientation, so other damage in them is ignored. An animation gives its first frame.

    Args:
        image:
            A path, an `http(s)://`, `file://` or `data:` URL, the bytes of a file, an open binary file, a PIL image, an array or
            tensor with or without a channel axis, or a cell of a data set (`{"bytes": ..., "path": ...}`).
        name (`str`, *optional*): name of the image in messages. Defaults to its path or type.
        min_side (`int`, *optional*):
            Let JPEG decoders reduce the image while decoding, to a shorter side of at least this. The pixels then differ
            slightly from those of a decoded and resized image.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
        timeout (`float`, defaults to 30): seconds to wait for the server of a URL.
        background (`tuple[int, int, int]`, defaults to white): the color behind transparent pixels.

    Raises:
        UnreadableImage (a `ValueError`): damaged, of an unknown format, empty, too large for Pillow, or not downloadable.
        ValueError: an array without pixels, or floats outside of [0, 1].
        TypeError: not an image, or integers of unknown range.
        OSError: the file is missing (`FileNotFoundError`) or cannot be opened.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return image_of_array(image, input_data_format, background)
    name = name or image_name(image)
    encoded = None if isinstance(image, PIL.Image.Image) else encoded_bytes(image, name, timeout)
    try:
        return flattened(image, background) if encoded is None else decoded(encoded, min_side, background)
    # For damaged files, Pillow's readers raise nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableImage(f"{name} cannot be read as an image: {reason_of(error, encoded)}") from error


def image_name(image: Any) -> str:
    """The name of an image in messages."""
    if isinstance(image, dict):
        return str(image.get("path") or "A data set's image")
    if isinstance(image, str):
        return repr(image) if not image.startswith("data:") else "The data: URL"
    if isinstance(image, os.PathLike):
        return repr(os.fspath(image))
    # PIL images and open files may know their path.
    path = getattr(image, "filename", None) or getattr(image, "name", None)
    return repr(path) if path else f"An image given as {type(image).__name__}"


def encoded_bytes(image: Any, name: str | None = None, timeout: float = 30.0) -> bytes:
    """
    The content of an image file, from any encoded source of [`read_image`], with its arguments `image`, `name` and
    `timeout`.

    Raises:
        UnreadableImage: a data set cell is empty, or a URL cannot be read.
        TypeError: the image is not encoded.
        OSError: the file is missing or cannot be opened.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is None:
        raise UnreadableImage(f"{name or 'The image'} is empty: there is no image.")
    if isinstance(image, str) and image.startswith(("http://", "https://", "file://", "data:")):
        return _fetched(image, name or image_name(image), timeout)
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(image, "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"There is no image file {os.fspath(image)!r}.") from error
    if hasattr(image, "read"):
        if image.seekable():
            image.seek(0)
        image = image.read()
    if not isinstance(image, (bytes, bytearray, memoryview)):
        raise TypeError(f"Not an image: {type(image).__name__}. Pass a path, URL, bytes, PIL image, array or tensor.")
    return bytes(image)


def _fetched(url: str, name: str, timeout: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "vfmtok-hf"})  # some servers refuse urllib's default
    try:
        with urllib.request.urlopen(request, timeout=timeout) as content:
            return content.read()
    except (OSError, ValueError, HTTPException) as error:
        raise UnreadableImage(f"{name} cannot be read: {error or type(error).__name__}") from error


def decoded(encoded: bytes, min_side: int | None = None, background: tuple[int, int, int] = WHITE) -> PIL.Image.Image:
    """Decode a file's content as [`read_image`] does. Raises the errors of Pillow."""
    with PIL.Image.open(io.BytesIO(encoded)) as image:
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        return flattened(image, background)


def reason_of(error: Exception, encoded: bytes | None) -> str:
    """The reason why Pillow could not read a file."""
    if isinstance(error, PIL.UnidentifiedImageError):
        if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIF_BRANDS:
            return (
                "it is HEIC. Install pillow-heif and call pillow_heif.register_heif_opener(), or convert it to JPEG."
            )
        return "its format is unknown." if encoded else "it has no content."
    return f"{error or type(error).__name__}"


def flattened(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """Convert any PIL image to upright 8-bit RGB on `background`."""
    image.load()
    if 0 in image.size:
        raise ValueError(f"it has no pixels: its size is {image.width} x {image.height}.")
    turn = UPRIGHT_BY_ORIENTATION.get(_orientation(image))
    image = _over(_eight_bit(image), background)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # otherwise PIL would apply the orientation again
    return image


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return image.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # the pixels are still intact
        return 1


def _eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert 16-bit, 32-bit and float grayscale to 8 bits, with an alpha channel if one of the levels is transparent."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    if image.mode == "I":  # 16 bits in PIL's 32-bit container
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"32-bit integer images must contain 16-bit values, got {levels.min()} to {levels.max()}: "
                "convert the image to 8 or 16 bits."
            )
        levels = levels.astype(np.uint16)
    gray = PIL.Image.fromarray(eight_bit_array(levels))
    if "transparency" in image.info:
        opaque = (levels != image.info["transparency"]).astype(np.uint8) * 255
        return PIL.Image.merge("LA", (gray, PIL.Image.fromarray(opaque)))
    return gray


def _over(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    if image.mode == "La":  # premultiplied, which PIL cannot convert directly to RGBA
        image = image.convert("LA")
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # For 16-bit RGB, Pillow keeps the high bytes of pixels but all bits of the transparent color.
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    if transparent is not None or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (*background, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def image_of_array(
    array: np.ndarray | torch.Tensor, input_data_format: str | None, background: tuple[int, int, int]
) -> PIL.Image.Image:
    """
    Convert arrays `(height, width)`, `(channels, height, width)` or `(height, width, channels)` to RGB on `background`. One
    channel is gray, four channels include alpha.

    Raises:
        ValueError: no pixels, another shape, or floats outside of [0, 1].
        TypeError: integers of unknown range.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.size == 0:
        raise ValueError(f"The image has no pixels: its shape is {array.shape}.")
    if array.ndim == 3:
        layout = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        if layout == "channels_first":
            array = array.transpose(1, 2, 0)
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3):
        raise ValueError(f"An image has two dimensions and optionally a channel axis, got shape {array.shape}.")
    return _over(PIL.Image.fromarray(np.ascontiguousarray(eight_bit_array(array))), background)


def eight_bit_array(image: np.ndarray) -> np.ndarray:
    """
    Convert an image to uint8, as in the original's training.

    Booleans become 0 and 255, uint16 is divided by 257, and floats must be in [0, 1]. Values are rounded to nearest.

    Raises:
        ValueError: floats outside [0, 1], NaN included.
        TypeError: another integer type, whose range is unknown.
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * 255
    if image.dtype.newbyteorder("=") == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"Images of {image.dtype} have no known range: convert them to uint8 or uint16.")
    levels = np.rint(image.astype(np.float32) * 255)
    if not ((levels >= 0) & (levels <= 255)).all():
        raise ValueError(
            f"Float images must be in [0, 1], got values from {image.min()} to {image.max()}: "
            "rescale them, or pass uint8."
        )
    return levels.astype(np.uint8)


def each_image(images: Any) -> Iterator[Any]:
    """
    Iterate over single images in an image, a batch, or an iterable of these, such as nested lists, a generator or a data set
    column.
    """
    if isinstance(images, (np.ndarray, torch.Tensor)):
        yield from images if images.ndim == 4 else [images]
    elif isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, dict, PIL.Image.Image)) or (
        hasattr(images, "read") or not hasattr(images, "__iter__")
    ):
        yield images
    else:
        for image in images:
            yield from each_image(image)


__all__ = ["UnreadableImage", "each_image", "encoded_bytes", "read_image"]
