"""The views of an image."""

import numpy as np
import torch
from PIL import Image

from vfmtok_hf.data.transforms import ImageViews, as_pixel_values


def test_ten_crops_are_corners_center_and_their_mirror_images():
    gradient = np.zeros((44, 60, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(60) * 4, np.arange(44)[:, None] * 5
    image = Image.fromarray(gradient)
    views = ImageViews(40, crops="ten", ten_crop_ranges=(1.1,))(image, index=0)
    assert views.shape == (10, 3, 40, 40)
    # The central square of 44 pixels starts at column 8; crops of 40 pixels start at 0, 2 or 4 within it.
    for position, (left, top) in enumerate([(2, 2), (0, 0), (4, 0), (0, 4), (4, 4)]):
        crop = image.crop((8 + left, top, 48 + left, top + 40))
        torch.testing.assert_close(views[2 * position], as_pixel_values(crop))
        assert torch.equal(views[2 * position + 1], views[2 * position].flip(-1))
    assert len(ImageViews(40, crops="ten", ten_crop_ranges=(1.1, 1.05))(image, 0)) == 20
    assert len(ImageViews(40, crops="center", horizontal_flip=False)(image, 0)) == 1
