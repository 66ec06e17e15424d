"""Convert images to `pixel_values` and back, with the pixel arithmetic of the original code."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import BatchFeature, ImageProcessingMixin  # noqa: F401 - pipelines look up ImageProcessingMixin here
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from .image_reading_vfmtok import each_image, read_image
from .loading_vfmtok import errors_naming, subfolder_named


# A center crop of a longer image keeps less than one percent of it.
MAX_ASPECT_RATIO = 100


def square_side(size: int | Mapping[str, int]) -> int:
    """
    Side in pixels of a `size`, an integer or a height and a width.

    Raises:
        ValueError: the size is not square.
    """
    if isinstance(size, int):
        return size
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"VFMTok images are square: size needs equal height and width, got {dict(size)}.")
    return size["height"]


class VFMTokImageProcessor(BaseImageProcessor):
    r"""
    Image processor of [`VFMTokModel`].

    Preprocessing is the original's, bit for bit (`center_crop_arr` of guided-diffusion): halve with a box filter while
    the shorter side is at least twice the target, resize the shorter side to the target with bicubic interpolation,
    crop the center, scale to [-1, 1]. An input is any image that [`read_image`] reads, a list, generator or data set column of
    images, or a batch. All are read as upright 8-bit RGB on white. Images are decoded one at a time, so a batch of large
    photographs takes little memory.

    Args:
        size (`int` or `dict`, defaults to `{"height": 336, "width": 336}`):
            Side of the square output in pixels. It is also the crop size; there is no separate `crop_size`.
        do_resize, do_center_crop, do_rescale, do_normalize (`bool`, default to `True`):
            Which steps to apply. Images are always RGB: `do_convert_rgb` cannot be turned off.
        resample (`int`, defaults to `PILImageResampling.BICUBIC`), rescale_factor (`float`, defaults to 1 / 255):
            Filter of the last resize, and the factor from 8-bit levels to [0, 1].
        image_mean, image_std (`list[float]`, default to 0.5):
            Normalization from [0, 1] to [-1, 1], the range of the model's images. [`VFMTokModel`] applies the vision model's
            own normalization.

    Raises (on call):
        ValueError, TypeError, OSError: [`read_image`] refuses the image, or it is more than 100 times longer than wide.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int | Mapping[str, int] = 336,
        do_resize: bool = True,
        resample: int = PILImageResampling.BICUBIC,
        do_center_crop: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        do_convert_rgb: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        side = square_side(size)
        self.size = {"height": side, "width": side}
        self.do_resize = do_resize
        self.resample = resample
        self.do_center_crop = do_center_crop
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As in transformers.

        Raises:
            OSError: the folder, repository, revision or file does not exist or is not accessible.
            ValueError: it is a whole pipeline.
        """
        source, file = str(pretrained_model_name_or_path), "preprocessor_config.json"
        with (
            errors_naming(source),
            subfolder_named(source, cls.__name__, file, "image_processor_type", cls.__name__, kwargs),
        ):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # -- images -> pixel_values

    def preprocess(
        self, images: Any, return_tensors: str | None = None, input_data_format: str | None = None, **settings
    ) -> BatchFeature:
        """
        Args:
            images: as in the class's description.
            return_tensors (`str`, *optional*): `"pt"` for a tensor, `"np"` for an array. Defaults to a list of arrays.
            input_data_format (`str`, *optional*):
                `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
            settings: arguments of the class to change for this call.

        Returns:
            `pixel_values` of shape `(batch_size, 3, height, width)`.

        Raises:
            ValueError, TypeError, OSError: as in the class's description, or the settings are invalid.
        """
        settings = self._settings(**settings)
        pixel_values = [
            self._pixel_values(read_image(image, input_data_format=input_data_format), settings)
            for image in each_image(images)
        ]
        if not pixel_values:
            raise ValueError("There are no images: pass at least one.")
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def _settings(self, crop_size: None = None, **overrides) -> dict[str, Any]:
        """The validated settings of one call."""
        if crop_size is not None:
            raise ValueError("VFMTok crops to `size`: leave crop_size unset.")
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        unknown = sorted(overrides.keys() - settings.keys())
        if unknown:
            raise TypeError(
                f"VFMTokImageProcessor has no setting {unknown[0]!r}; it has {', '.join(sorted(settings))}."
            )
        settings |= {name: value for name, value in overrides.items() if value is not None}
        settings["size"] = square_side(settings["size"])
        if not settings["do_convert_rgb"]:
            raise ValueError("VFMTok reads every image as RGB: leave do_convert_rgb=True.")
        if settings["do_normalize"] and not settings["do_rescale"]:
            raise ValueError(
                "do_normalize needs do_rescale=True: images are 8-bit until they are rescaled, and float images in "
                "[0, 1] are accepted unchanged."
            )
        return settings

    def _pixel_values(self, picture: PIL.Image.Image, settings: Mapping[str, Any]) -> np.ndarray:
        """`(3, height, width)`: uint8, or float32 if rescaled."""
        if settings["do_resize"]:
            picture = self._resize(picture, settings["size"], settings["resample"])
        if settings["do_center_crop"]:
            picture = self._center_crop(picture, settings["size"])
        pixels = np.asarray(picture)
        if settings["do_rescale"]:
            pixels = (pixels.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
        if settings["do_normalize"]:
            pixels = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
        return pixels.transpose(2, 0, 1)

    @staticmethod
    def _resize(picture: PIL.Image.Image, side: int, resample: int) -> PIL.Image.Image:
        """
        Resize the shorter side to `side` as guided-diffusion's `center_crop_arr` does, with PIL's filter `resample` in the
        last step.
        """
        if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
            raise ValueError(
                f"The image is {picture.width} x {picture.height} pixels: more than {MAX_ASPECT_RATIO} times longer than "
                "wide, so a center crop would keep almost nothing of it. Crop it first."
            )
        while min(picture.size) >= 2 * side:
            picture = picture.resize((picture.width // 2, picture.height // 2), PILImageResampling.BOX)
        scale = side / min(picture.size)
        return picture.resize((round(picture.width * scale), round(picture.height * scale)), resample)

    @staticmethod
    def _center_crop(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
        """The central square of side `side`. With an odd margin, the extra pixel is at the bottom and right."""
        if min(picture.size) < side:
            raise ValueError(
                f"Cannot crop {side} x {side} pixels from {picture.width} x {picture.height}: set do_resize=True."
            )
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    # -- the model's output -> images

    @staticmethod
    def to_uint8(images: torch.Tensor) -> torch.Tensor:
        """
        Convert float images in [-1, 1] to uint8 as the original does: `x * 127.5 + 128`, clamped and truncated. That is the
        usual mapping to [0, 255], rounded to nearest, halves up.
        """
        return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def postprocess(
        self,
        images: torch.Tensor,
        output_type: Literal["pil", "np", "pt", "uint8"] = "pil",
        size: int | None = None,
        resize_mode: Literal["generation", "reconstruction"] = "generation",
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Convert the model's output to images. All output types contain the same 8-bit image.

        Args:
            images (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): about [-1, 1].
            output_type (`str`):
                `"pil"` for a list of PIL images, `"np"` for float32 `(batch_size, height, width, 3)` in [0, 1], `"pt"`
                for a float32 tensor `(batch_size, 3, height, width)` in [0, 1], `"uint8"` for the 8-bit tensor.
            size (`int`, *optional*):
                Side in pixels to resize to. Defaults to the images' own.
            resize_mode (`str`):
                One of the original's two ways of resizing. They differ more for images with fine detail, and numbers are
                comparable only within one. `"generation"`: bicubic on the floats without antialiasing, then 8 bits
                (`decode_codes_to_img`). `"reconstruction"`: 8 bits first, then PIL's bicubic (`vqgan_test.py`).

        Raises:
            ValueError: wrong shape or size, NaN or infinite values, or an unknown `output_type` or `resize_mode`.
        """
        if output_type not in ("pil", "np", "pt", "uint8"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'uint8', got {output_type!r}.")
        if resize_mode not in ("generation", "reconstruction"):
            raise ValueError(f"resize_mode must be 'generation' or 'reconstruction', got {resize_mode!r}.")
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"size is the side of the image in pixels, at least 1, got {size!r}.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (batch_size, 3, height, width), got {tuple(images.shape)}.")
        if not images.isfinite().all():
            raise ValueError(
                "The images contain NaN or infinity: the weights are damaged or overflow their dtype; try float32."
            )
        pixels = self._resized_uint8(images, size, resize_mode)
        if output_type == "uint8":
            return pixels
        if output_type == "pt":
            return pixels.float() / 255
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return arrays.astype(np.float32) / 255
        return [PIL.Image.fromarray(array) for array in arrays]

    def _resized_uint8(self, images: torch.Tensor, size: int | None, resize_mode: str) -> torch.Tensor:
        if size is None or images.shape[-2:] == (size, size):
            return self.to_uint8(images)
        if resize_mode == "generation":
            return self.to_uint8(F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False))
        pictures = self.postprocess(images, output_type="pil")
        resized = [np.asarray(picture.resize((size, size), PILImageResampling.BICUBIC)) for picture in pictures]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


__all__ = ["VFMTokImageProcessor"]
