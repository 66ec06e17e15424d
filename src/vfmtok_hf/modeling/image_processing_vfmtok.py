"""Images to `pixel_values` and back, with the pixel arithmetic of the original training and evaluation code."""

from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import BatchFeature, ImageProcessingMixin, PilBackend  # noqa: F401 - pipelines look up the mixin here
from transformers.image_utils import PILImageResampling, SizeDict

from .image_reading_vfmtok import each_image, read_image
from .loading_vfmtok import one_line_errors


# A centre crop of anything longer keeps less than one percent of the picture.
MAX_ASPECT_RATIO = 100


class VFMTokImageProcessor(PilBackend):
    r"""
    Image processor of [`VFMTokModel`].

    Preprocessing is the original's, bit for bit (`center_crop_arr` of guided-diffusion): halve with a box filter while
    the shorter side is at least twice the target, resize the shorter side to the target with bicubic interpolation,
    crop the centre, scale to [-1, 1]. Images are of any kind that [`read_image`] takes, alone, in a list, a generator or a
    column of a data set, or as a batch: all are read as upright 8-bit RGB over white. Only one of them is decoded at a
    time, so that a batch of large photographs takes little memory.

    Args:
        size (`int` or `dict`, defaults to `{"height": 336, "width": 336}`):
            Side of the square output in pixels. It is the crop's size as well; there is no separate `crop_size`.
        do_resize, do_center_crop, do_rescale, do_normalize (`bool`, default to `True`):
            Which steps are done. Images are RGB in any case: `do_convert_rgb` cannot be switched off.
        resample (`int`, defaults to `PILImageResampling.BICUBIC`), rescale_factor (`float`, defaults to 1 / 255):
            Filter of the last resize, and the factor from 8-bit levels to [0, 1].
        image_mean, image_std (`list[float]`, default to 0.5):
            From [0, 1] to [-1, 1], the range in which the model draws. The vision model's own normalisation happens
            inside [`VFMTokModel`].

    Raises (on call):
        ValueError, TypeError, OSError: what [`read_image`] refuses, and an image more than 100 times longer than wide.
    """

    size = {"height": 336, "width": 336}
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As in transformers.

        Raises:
            OSError: there is no such folder, repository, revision or file, or no access or connection to it.
        """
        with one_line_errors(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    # -- images -> pixel_values

    def _preprocess_image_like_inputs(self, images: Any, *args, return_tensors=None, **kwargs) -> BatchFeature:
        pixel_values = [
            self._preprocess([self.process_image(image, **kwargs)], *args, return_tensors=None, **kwargs)[
                "pixel_values"
            ][0]
            for image in each_image(images)
        ]
        if not pixel_values:
            raise ValueError("There are no images: pass at least one.")
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def process_image(self, image: Any, input_data_format: str | None = None, **kwargs) -> np.ndarray:
        """
        One `image` of any kind as uint8 of shape `(3, height, width)`; `input_data_format` and errors are those of
        [`read_image`].
        """
        return np.asarray(read_image(image, input_data_format=input_data_format)).transpose(2, 0, 1)

    def resize(self, image: np.ndarray, size: SizeDict, resample: int, **kwargs) -> np.ndarray:
        """
        Bring the shorter side of a uint8 `image` `(channels, height, width)` to that of `size` as guided-diffusion's
        `center_crop_arr` does, in its last step with the filter `resample` of PIL.

        Raises:
            ValueError: the image is more than 100 times longer than wide.
        """
        side = size.height
        height, width = image.shape[1:]
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"The image is {width} x {height} pixels: more than {MAX_ASPECT_RATIO} times longer than wide, so that "
                "a centre crop would keep almost nothing of it. Crop it first."
            )
        picture = PIL.Image.fromarray(image.transpose(1, 2, 0))
        while min(picture.size) >= 2 * side:
            picture = picture.resize((picture.width // 2, picture.height // 2), PILImageResampling.BOX)
        scale = side / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), resample)
        return np.asarray(picture).transpose(2, 0, 1)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """
        The central square, of side `size`, of an `image` `(channels, height, width)`. An odd margin leaves its extra
        pixel below and right.

        Raises:
            ValueError: the image is smaller than that.
        """
        side = size.height
        height, width = image.shape[1:]
        if min(height, width) < side:
            raise ValueError(f"Cannot crop {side} x {side} pixels from {width} x {height}: set do_resize=True.")
        top, left = (height - side) // 2, (width - side) // 2
        return image[:, top : top + side, left : left + side]

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, crop_size: SizeDict | None, **kwargs):
        return super()._preprocess(images, size=size, crop_size=size, **kwargs)

    def _validate_preprocess_kwargs(
        self, size=None, crop_size=None, do_rescale=None, do_normalize=None, do_convert_rgb=None, **kwargs
    ):
        if size.height is None or size.height != size.width:
            raise ValueError(f"VFMTok images are square: size needs equal height and width, got {dict(size)}.")
        if crop_size is not None:
            raise ValueError("VFMTok crops to `size`: leave crop_size unset.")
        if do_convert_rgb is False:
            raise ValueError("VFMTok reads every image as RGB: leave do_convert_rgb=True.")
        if do_normalize and not do_rescale:
            raise ValueError(
                "do_normalize needs do_rescale=True: images are 8-bit until they are rescaled, and float images in "
                "[0, 1] are accepted as they are."
            )
        super()._validate_preprocess_kwargs(
            size=size, crop_size=size, do_rescale=do_rescale, do_normalize=do_normalize, **kwargs
        )

    # -- the model's output -> images

    @staticmethod
    def to_uint8(images: torch.Tensor) -> torch.Tensor:
        """
        Float images in [-1, 1] to uint8 of the same shape as the original does it: `x * 127.5 + 128`, clamped, the
        fraction cut off. That is the usual mapping to [0, 255] rounded to nearest, halves up.
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
        The model's images to pictures. All output types hold the same 8-bit picture.

        Args:
            images (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): about [-1, 1].
            output_type (`str`):
                `"pil"` for a list of PIL images, `"np"` for float32 `(batch_size, height, width, 3)` in [0, 1], `"pt"`
                for a float32 tensor `(batch_size, 3, height, width)` in [0, 1], `"uint8"` for the 8-bit tensor.
            size (`int`, *optional*):
                Side in pixels to resize to. Defaults to the images' own.
            resize_mode (`str`):
                The original resizes in two ways, the further apart the finer the detail, and numbers compare only
                within one. `"generation"`: bicubic on the floats without antialiasing, then 8 bits
                (`decode_codes_to_img`). `"reconstruction"`: 8 bits first, then PIL's bicubic (`vqgan_test.py`).

        Raises:
            ValueError: wrong shape, NaN or infinite values, or an unknown `output_type` or `resize_mode`.
        """
        if output_type not in ("pil", "np", "pt", "uint8"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'uint8', got {output_type!r}.")
        if resize_mode not in ("generation", "reconstruction"):
            raise ValueError(f"resize_mode must be 'generation' or 'reconstruction', got {resize_mode!r}.")
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
