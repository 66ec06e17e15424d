"""The image processor: the original's pixel arithmetic, and every kind of real image."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor

from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor


SIDE = 48


@pytest.fixture
def processor():
    return VFMTokImageProcessor(size=SIDE)


@pytest.fixture(scope="module")
def photographs():
    skimage_data = pytest.importorskip("skimage.data")
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    china, flower = sklearn_datasets.load_sample_images().images
    return {
        "astronaut": skimage_data.astronaut(),
        "chelsea": skimage_data.chelsea(),
        "coffee": skimage_data.coffee(),
        "china": china,
        "flower": flower,
    }


def guided_diffusion_crop(array, side):
    """`center_crop_arr` written out from its description, one resize after the other."""
    image = PIL.Image.fromarray(array)
    width, height = image.size
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=PIL.Image.Resampling.BOX)
    scale = side / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), resample=PIL.Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def levels(processor, image, **kwargs):
    """The 8-bit crop `(height, width, channels)` that the processor would normalize."""
    output = processor(image, do_rescale=False, do_normalize=False, **kwargs)
    return output["pixel_values"][0].transpose(1, 2, 0)


def gradient(height, width, channels=3):
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)
    return np.stack([(ramp * (c + 1)) % 256 for c in range(channels)], axis=-1).astype(np.uint8)


# -- preprocessing


@pytest.mark.parametrize("side", [48, 100, 336])
def test_photographs_are_cropped_as_guided_diffusion_crops_them(photographs, side):
    processor = VFMTokImageProcessor(size=side)
    for name, photograph in photographs.items():
        expected = guided_diffusion_crop(photograph, side)
        np.testing.assert_array_equal(levels(processor, PIL.Image.fromarray(photograph)), expected, err_msg=name)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (48, 48), (96, 97), (95, 301), (500, 49), (191, 193)])
def test_odd_sizes_are_cropped_as_guided_diffusion_crops_them(processor, height, width):
    image = gradient(height, width)
    np.testing.assert_array_equal(levels(processor, image), guided_diffusion_crop(image, SIDE))


def test_pixel_values_are_the_levels_scaled_to_minus_one_and_one(processor):
    image = gradient(SIDE, SIDE)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, SIDE, SIDE)
    assert pixel_values.dtype == torch.float32
    expected = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixel_values, expected, atol=1e-6, rtol=0)


def test_default_is_the_released_models_size():
    assert dict(VFMTokImageProcessor().size) == {"height": 336, "width": 336}
    assert VFMTokImageProcessor()(gradient(40, 40), return_tensors="pt")["pixel_values"].shape[-2:] == (336, 336)


def test_all_containers_give_the_same_pixels(processor, tmp_path):
    array = gradient(60, 83)
    PIL.Image.fromarray(array).save(tmp_path / "image.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = levels(processor, array)
    containers = {
        "PIL": PIL.Image.fromarray(array),
        "channels first": array.transpose(2, 0, 1),
        "uint8 tensor": tensor,
        "float tensor": tensor / 255,
        "float array": array.astype(np.float64) / 255,
        "path": tmp_path / "image.png",
        "string": str(tmp_path / "image.png"),
    }
    for name, image in containers.items():
        np.testing.assert_array_equal(levels(processor, image), expected, err_msg=name)
    batch = processor([containers["PIL"], array, tmp_path / "image.png"], return_tensors="pt")["pixel_values"]
    assert batch.shape == (3, 3, SIDE, SIDE)
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(processor(torch.stack([tensor, tensor]), return_tensors="pt")["pixel_values"], batch[:2])


def test_save_load_and_auto_class(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    image = gradient(60, 83)
    for loaded in (VFMTokImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VFMTokImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        np.testing.assert_array_equal(levels(loaded, image), levels(processor, image))


def test_size_of_a_call_moves_the_crop_with_it(processor):
    assert levels(processor, gradient(60, 83), size=32).shape == (32, 32, 3)


# -- real input


def test_grayscale(processor):
    gray = gradient(60, 83, channels=1)[..., 0]
    expected = levels(processor, np.stack([gray] * 3, axis=-1))
    for image in (PIL.Image.fromarray(gray), gray, gray[None], gray[..., None], torch.from_numpy(gray)):
        np.testing.assert_array_equal(levels(processor, image), expected)


def test_one_bit_images(processor):
    mask = gradient(SIDE, SIDE)[..., 0] > 127
    for image in (mask, PIL.Image.fromarray(mask)):
        np.testing.assert_array_equal(levels(processor, image)[..., 0], mask * np.uint8(255))


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparent_pixels_are_laid_over_white(processor, alpha):
    color = np.array([200, 40, 0])
    rgba = np.full((SIDE, SIDE, 4), [*color, alpha], dtype=np.uint8)
    expected = color * alpha / 255 + 255 * (1 - alpha / 255)
    for image in (PIL.Image.fromarray(rgba), rgba):
        assert np.abs(levels(processor, image)[0, 0] - expected).max() <= 1  # PIL and numpy round differently
    gray = PIL.Image.merge("LA", [PIL.Image.new("L", (SIDE, SIDE), value) for value in (40, alpha)])
    assert np.abs(levels(processor, gray)[0, 0] - (40 * alpha / 255 + 255 - alpha)).max() <= 1


def test_palette_with_transparency(processor):
    palette = PIL.Image.new("P", (SIDE, SIDE), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, SIDE // 2, SIDE))
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    crop = levels(processor, PIL.Image.open(buffer))
    assert crop[0, 0].tolist() == [255, 255, 255]
    assert crop[0, -1].tolist() == [10, 20, 30]


def test_cmyk(processor):
    crop = levels(processor, PIL.Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)))
    assert crop[0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled_not_clipped(processor, tmp_path):
    eight = gradient(SIDE, SIDE)[..., 0]
    sixteen = eight.astype(np.uint16) * 257
    PIL.Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    PIL.Image.fromarray(sixteen).save(tmp_path / "sixteen.tif")
    thirty_two = PIL.Image.fromarray(sixteen.astype(np.int32))
    for image in (sixteen, tmp_path / "sixteen.png", tmp_path / "sixteen.tif", thirty_two):
        np.testing.assert_array_equal(levels(processor, image)[..., 0], eight)
    np.testing.assert_array_equal(levels(processor, np.stack([sixteen] * 3, axis=-1))[..., 1], eight)


def test_float_image_files(processor, tmp_path):
    eight = gradient(SIDE, SIDE)[..., 0]
    PIL.Image.fromarray(eight.astype(np.float32) / 255).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(levels(processor, tmp_path / "float.tif")[..., 0], eight)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(processor, tmp_path, orientation):
    upright = PIL.Image.fromarray(gradient(SIDE, SIDE))
    stored_as = {
        1: None,
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    for image in (tmp_path / "turned.png", PIL.Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(levels(processor, image), np.asarray(upright))


def test_a_long_image_passes_and_a_strip_is_refused(processor):
    assert levels(processor, gradient(20, 2000)).shape == (SIDE, SIDE, 3)
    with pytest.raises(ValueError, match=r"10000 x 20 pixels.*Crop it first"):
        processor(gradient(20, 10000))


def test_damaged_and_missing_files(processor, tmp_path):
    PIL.Image.fromarray(gradient(200, 200)).save(tmp_path / "whole.png")
    PIL.Image.fromarray(gradient(200, 200)).save(tmp_path / "whole.jpg")
    for suffix in ("png", "jpg"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        truncated = tmp_path / f"truncated.{suffix}"
        truncated.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"truncated\.{suffix}.*cannot be read"):
            processor(truncated)
        with pytest.raises(ValueError, match=rf"truncated\.{suffix}.*cannot be read"):
            processor(PIL.Image.open(truncated))
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        processor([str(tmp_path / "text.png")])
    with pytest.raises(FileNotFoundError, match="There is no image file"):
        processor(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.full((8, 8, 3), 2.0), ValueError, r"must be in \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), ValueError, r"must be in \[0, 1\]"),
        (torch.full((3, 8, 8), -1.0), ValueError, r"must be in \[0, 1\]"),
        (np.zeros((8, 8, 3), dtype=np.int64), TypeError, "no known range"),
        (np.zeros((0, 8, 3), dtype=np.uint8), ValueError, "no pixels"),
    ],
)
def test_bad_values_are_refused(processor, image, error, message):
    with pytest.raises(error, match=message):
        processor(image)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": {"height": 32, "width": 48}}, "square"),
        ({"size": {"shortest_edge": 32}}, "square"),
        ({"crop_size": 32}, "leave crop_size unset"),
        ({"do_rescale": False}, "needs do_rescale=True"),
        ({"do_resize": False}, "set do_resize=True"),
        ({"do_convert_rgb": False}, "leave do_convert_rgb=True"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(gradient(20, 20), **kwargs)


# -- postprocessing


def test_uint8_truncates_as_the_original():
    values = torch.tensor([-3.0, -1.0, -1 / 255, 0.0, 0.5, 0.999, 1.0, 2.0])
    expected = [0, 0, 127, 128, 191, 255, 255, 255]
    assert VFMTokImageProcessor.to_uint8(values).tolist() == expected


def test_an_image_survives_pre_and_postprocessing(processor):
    image = gradient(SIDE, SIDE)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(np.asarray(processor.postprocess(pixel_values)[0]), image)


@pytest.mark.parametrize("size", [None, 31])
@pytest.mark.parametrize("resize_mode", ["generation", "reconstruction"])
def test_all_output_types_hold_the_same_picture(processor, size, resize_mode):
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    outputs = {
        output_type: processor.postprocess(images, output_type, size=size, resize_mode=resize_mode)
        for output_type in ("pil", "np", "pt", "uint8")
    }
    side = size or SIDE
    assert outputs["uint8"].shape == (2, 3, side, side)
    pictures = np.stack([np.asarray(picture) for picture in outputs["pil"]])
    np.testing.assert_array_equal(pictures, outputs["uint8"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.rint(outputs["np"] * 255), pictures)
    torch.testing.assert_close(outputs["pt"], torch.from_numpy(outputs["np"]).permute(0, 3, 1, 2))


def test_the_two_ways_to_resize(processor):
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generation = processor.postprocess(images, size=40, resize_mode="generation")[0]
    floats = torch.nn.functional.interpolate(images, size=(40, 40), mode="bicubic", antialias=False)
    np.testing.assert_array_equal(np.asarray(generation).transpose(2, 0, 1), processor.to_uint8(floats)[0].numpy())

    reconstruction = processor.postprocess(images, size=40, resize_mode="reconstruction")[0]
    full_size = PIL.Image.fromarray(processor.to_uint8(images)[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(reconstruction), np.asarray(full_size.resize((40, 40))))
    assert np.abs(np.asarray(generation).astype(int) - np.asarray(reconstruction)).mean() > 1


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (torch.zeros(1, 3, 4, 4), {"output_type": "jpeg"}, "output_type"),
        (torch.zeros(1, 3, 4, 4), {"resize_mode": "nearest"}, "resize_mode"),
        (torch.zeros(3, 4, 4), {}, "must have shape"),
        (torch.full((1, 3, 4, 4), torch.nan), {}, "weights are damaged"),
    ],
)
def test_postprocess_refuses(processor, images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor.postprocess(images, **kwargs)
