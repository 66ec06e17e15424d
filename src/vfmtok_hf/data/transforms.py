"""Convert images to the pixels that a model is trained on: crops and mirror images."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.modeling.image_reading_vfmtok import WHITE


def cut_square(image: Image.Image, left: float, top: float, side: float, image_size: int) -> Image.Image:
    """Crop a square of the image and resize it. Parts outside of the image are white. Lengths are in the image's pixels."""
    padding = max(0, int(np.ceil(side - min(image.size))))
    if padding:
        image = ImageOps.expand(image, padding, WHITE)
    # Rounding can move the far edges slightly past the image, which Pillow refuses.
    box = (
        left + padding,
        top + padding,
        min(left + padding + side, image.width),
        min(top + padding + side, image.height),
    )
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)


def as_pixel_values(image: Image.Image) -> torch.Tensor:
    """`(3, height, width)` in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Augmentation:
    """
    The training augmentation: crop, mirror and resize an image to a square of `image_size` pixels.

    Args:
        image_size (`int`): side of the square result in pixels.
        crop_scale (`tuple[float, float]`, *optional*): range of the random crop's side, relative to the image's
            shorter side. Above 1, the image is padded with white. `None` is the central square without augmentation.
        horizontal_flip (`bool`): mirror half of the images, only in training (with `crop_scale`).
    """

    image_size: int
    crop_scale: tuple[float, float] | None = None
    horizontal_flip: bool = False

    @property
    def min_side(self) -> int:
        """Shorter side in pixels at which even the tightest crop is not enlarged."""
        return math.ceil(self.image_size / (self.crop_scale[0] if self.crop_scale else 1.0))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """`pixel_values` `(3, image_size, image_size)` in [-1, 1]."""
        scale = rng.uniform(*self.crop_scale) if self.crop_scale else 1.0
        side = scale * min(image.size)
        shares = rng.uniform(size=2) if self.crop_scale else (0.5, 0.5)
        left, top = (share * (length - side) for share, length in zip(shares, image.size, strict=True))
        cropped = cut_square(image, left, top, side, self.image_size)
        if self.crop_scale and self.horizontal_flip and rng.uniform() < 0.5:
            cropped = ImageOps.mirror(cropped)
        return as_pixel_values(cropped)

    def shrunk(self, image: Image.Image) -> Image.Image:
        """The image, reduced to the pixels that the tightest crop needs."""
        factor = self.image_size / ((self.crop_scale[0] if self.crop_scale else 1.0) * min(image.size))
        if factor >= 1:
            return image
        return image.resize([max(round(side * factor), 1) for side in image.size], Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class ImageViews:
    """
    The views of an image that are encoded to token sequences once.

    Args:
        image_size (`int`): side of each view in pixels.
        crops (`str`): "random": `count` views by [`Augmentation`] with `crop_scale`, as in VFMTok's training;
            "ten": center and corners of the central square, each with its mirror image, for each of `ten_crop_ranges`,
            as LlamaGen extracts codes; "center": the central square, as [`VFMTokImageProcessor`]
            resizes it for `tokenize`.
        count (`int`), crop_scale (`tuple[float, float]`), horizontal_flip (`bool`), seed (`int`): options of random crops.
            `horizontal_flip` also adds the mirror image of the central square.
        ten_crop_ranges (`tuple[float, ...]`): side of the central square as a multiple of the crop's side, at least 1.
    """

    image_size: int
    crops: Literal["random", "ten", "center"] = "random"
    count: int = 4
    crop_scale: tuple[float, float] = (0.8, 1.0)
    ten_crop_ranges: tuple[float, ...] = (1.1,)
    horizontal_flip: bool = True
    seed: int = 0

    @property
    def num_views(self) -> int:
        if self.crops == "random":
            return self.count
        return 10 * len(self.ten_crop_ranges) if self.crops == "ten" else 1 + self.horizontal_flip

    @property
    def min_side(self) -> int | None:
        """As in [`Augmentation`]. None for "center", whose views are those of whole images."""
        if self.crops == "center":
            return None
        tightest = self.crop_scale[0] if self.crops == "random" else 1 / max(self.ten_crop_ranges)
        return math.ceil(self.image_size / tightest)

    def __call__(self, image: Image.Image, index: int) -> torch.Tensor:
        """`(num_views, 3, image_size, image_size)` in [-1, 1], which depends only on the image and its `index`."""
        if self.crops == "random":
            augment = Augmentation(self.image_size, self.crop_scale, self.horizontal_flip)
            views = [augment(image, np.random.default_rng((self.seed, view, index))) for view in range(self.count)]
            return torch.stack(views)
        if self.crops == "center":
            view = VFMTokImageProcessor(self.image_size)(image, return_tensors="pt")["pixel_values"]
            return torch.cat([view, view.flip(-1)]) if self.horizontal_flip else view
        corners = [(0.5, 0.5), (0, 0), (1, 0), (0, 1), (1, 1)]
        squares = [self._cut(image, crop_range, *corner) for crop_range in self.ten_crop_ranges for corner in corners]
        return torch.stack([as_pixel_values(view) for square in squares for view in (square, ImageOps.mirror(square))])

    def _cut(self, image: Image.Image, crop_range: float, across: float, down: float) -> Image.Image:
        """A crop of the central square; the shares are its position between the two ends of each axis."""
        square = min(image.size)
        side = square / crop_range
        left = (image.width - square) / 2 + across * (square - side)
        top = (image.height - square) / 2 + down * (square - side)
        return cut_square(image, left, top, side, self.image_size)
