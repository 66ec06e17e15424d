"""One reader for every way in: the same pixels for the same picture, or an error that names the image."""

import base64
import io
import struct
import threading
import tracemalloc
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageDraw

from tests.pipelines.tiny_pipeline import tiny_pipeline
from vfmtok_hf import VFMTokImageProcessor
from vfmtok_hf.data.sources import open_records
from vfmtok_hf.modeling.image_reading_vfmtok import UnreadableImage, each_image, read_image
from vfmtok_hf.modeling.image_tokens_vfmtok import VFMTokImageTokensPipeline


SIDE = 32


def png_of(color_type, bits, rows, transparent=b""):
    """A PNG file of 2 x 1 pixels, with a transparent level or color that Pillow itself does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 1, bits, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")


def transparent_picture():
    picture = PIL.Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse((8, 8, 24, 24), fill=(255, 0, 0, 255))
    return picture


def sixteen_bits():
    return PIL.Image.fromarray(np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16))


def palette():
    picture = transparent_picture().convert("RGB").convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    picture.info["transparency"] = picture.getpixel((16, 16))
    return picture


PICTURES = {"transparent": transparent_picture, "16 bits": sixteen_bits, "palette": palette}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def address(tmp_path):
    """Of a server of the files in `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES.keys())
def test_every_way_in_gives_the_same_pixels_and_tokens(make, pipe, address, tmp_path):
    picture, file = make(), tmp_path / "class" / "picture.png"
    file.parent.mkdir()
    picture.save(file)
    content = file.read_bytes()
    column = datasets.Dataset.from_dict({"image": [{"bytes": content}]}).cast_column("image", datasets.Image())[
        "image"
    ]
    with file.open("rb") as opened:
        ways = {
            "string": str(file),
            "path": file,
            "open file": opened,
            "stream at its end": io.BytesIO(content),
            "bytes": content,
            "memoryview": memoryview(content),
            "PIL, opened": PIL.Image.open(file),
            "PIL, made": picture,
            "cell with bytes": {"bytes": content, "path": "a.png"},
            "cell with a path": {"bytes": None, "path": str(file)},
            "data: URL": "data:image/png;base64," + base64.b64encode(content).decode(),
            "URL": f"{address}/class/picture.png",
        }
        ways["stream at its end"].read()
        if picture.mode != "P":
            ways["array"] = np.asarray(picture)
        expected = np.asarray(read_image(file))
        for way, image in ways.items():
            found = read_image(image)
            assert found.mode == "RGB", way
            np.testing.assert_array_equal(np.asarray(found), expected, err_msg=way)
    np.testing.assert_array_equal(np.asarray(open_records(tmp_path)[0]), expected)
    tokens = pipe.tokenize(file)
    task = VFMTokImageTokensPipeline(pipe.vq_model, image_processor=pipe.image_processor)
    assert torch.equal(pipe.tokenize(column), tokens)
    assert torch.equal(pipe.tokenize(image for image in [file]), tokens)
    for way in (str(file), PIL.Image.open(file), ways["data: URL"], ways["URL"]):
        assert torch.equal(pipe.tokenize(way), tokens)
        assert task(way) == tokens[0].tolist()


def test_what_is_read_is_read_no_differently_again(tmp_path):
    """Above all it is not turned once more."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    once = read_image(tmp_path / "turned.jpg")
    assert once.size == read_image(once).size == (10, 30)


def test_images_of_the_caller_are_left_as_they_are():
    picture = transparent_picture()
    read_image(picture)
    assert (picture.mode, picture.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 0))


def colors_of(encoded):
    return np.asarray(read_image(encoded))[0].tolist()


def test_transparency_without_an_alpha_channel():
    """A transparent level or color, in one and two bytes."""
    gray16 = png_of(0, 16, struct.pack(">2H", 0, 40000), struct.pack(">H", 0))
    assert colors_of(gray16) == [[255] * 3, [156] * 3]
    gray8 = png_of(0, 8, bytes([7, 100]), struct.pack(">H", 7))
    assert colors_of(gray8) == [[255] * 3, [100] * 3]
    color16 = png_of(2, 16, struct.pack(">6H", 0x1234, 0, 0, 40000, 0, 0), struct.pack(">3H", 0x1234, 0, 0))
    assert colors_of(color16) == [[255] * 3, [156, 0, 0]]


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "CMYK", "YCbCr", "HSV", "LAB", "1", "I;16B", "RGBX"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    assert read_image(PIL.Image.new(mode, (4, 4))).mode == "RGB"


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_byte_order_changes_nothing(suffix, tmp_path):
    levels = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).round()
    expected = np.asarray(read_image(levels.astype("<u2")))
    np.testing.assert_array_equal(np.asarray(read_image(levels.astype(">u2"))), expected)
    np.testing.assert_array_equal(np.asarray(read_image((levels / 65535).astype(">f4"))), expected)
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2")):
        file = tmp_path / f"{kind[1:]}-{mode[-1]}.{suffix}"
        PIL.Image.frombytes(mode, (SIDE, SIDE), levels.astype(kind).tobytes()).save(file)
        np.testing.assert_array_equal(np.asarray(read_image(file)), expected)


# -- EXIF data


def odd_exif(tag):
    """EXIF data of the orientation 6 and another entry, whose value lies behind the entries."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + tag
    return (
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<ii", -1, 0)
    )


@pytest.mark.parametrize(
    "tag",
    [
        struct.pack("<HHII", 282, 10, 1, 8 + 2 + 24 + 4),
        struct.pack("<HHIi", 259, 9, 1, -5),
        struct.pack("<HHII", 306, 2, 1000, 10**6),
        struct.pack("<HHII", 0x8769, 4, 1, 10**6),
    ],
    ids=["resolution of -1/0", "negative", "text beyond the end", "sub-directory beyond the end"],
)
def test_odd_exif_data_are_no_damage(tag, tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 255
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=odd_exif(tag), quality=95)
    upright = np.asarray(read_image(tmp_path / "photo.jpg"))
    assert upright.shape == (60, 40, 3)
    assert upright[:25].mean() < 60 < 200 < upright[35:].mean()


@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"Exif\x00\x00II*\x00", b"Exif\x00\x00nonsense" * 3])
def test_exif_data_that_are_none(exif, tmp_path):
    PIL.Image.new("RGB", (8, 4), "red").save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (8, 4)


# -- damage


def texture_of_an_unknown_format():
    header = struct.pack("<IIIIIII", 124, 0x1007, 4, 4, 0, 0, 0) + bytes(44)
    header += struct.pack("<II4sIIIII", 32, 4, b"DX10", 0, 0, 0, 0, 0) + bytes(20)
    return b"DDS " + header + struct.pack("<IIIII", 93, 3, 0, 1, 0) + bytes(64)


def encoded_as(image_format, **options):
    stream = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).convert("RGB").save(stream, image_format, **options)
    return stream.getvalue()


DAMAGED = {
    "panorama.png": lambda: encoded_panorama(),
    "texture.dds": texture_of_an_unknown_format,
    "short.dds": lambda: texture_of_an_unknown_format()[:40],
    "header.psd": lambda: b"8BPS" + bytes(10),
    "half.tif": lambda: encoded_as("TIFF")[:200],
    "half.webp": lambda: encoded_as("WEBP")[:60],
    "half.jp2": lambda: encoded_as("JPEG2000")[:100],
    "head.ico": lambda: b"\x00\x00\x01\x00\x01\x00" + bytes(16),
    "page.html.jpg": lambda: b"<html>not found</html>",
    "empty.gif": lambda: b"",
}


def encoded_panorama():
    """22 kB, more pixels than Pillow decodes."""
    stream = io.BytesIO()
    PIL.Image.new("1", (14_000, 13_000)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_of_any_kind_is_one_error_that_names_the_image(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(DAMAGED[name]())
    for read in (read_image, VFMTokImageProcessor(size=16)):
        with pytest.raises(UnreadableImage, match=name):
            read(file)
    with pytest.raises(UnreadableImage, match="the third"):
        read_image(file.read_bytes(), name="the third")


def test_what_is_no_image():
    with pytest.raises(UnreadableImage, match="is empty"):
        read_image({"bytes": None, "path": None})
    with pytest.raises(UnreadableImage, match="is empty"):
        read_image(None)
    with pytest.raises(TypeError, match="Not an image: int"):
        read_image(3)
    with pytest.raises(TypeError, match="Not an image: str"):
        read_image(io.StringIO("text"))
    with pytest.raises(UnreadableImage, match="no pixels"):
        read_image(PIL.Image.new("RGB", (0, 4)))
    with pytest.raises(ValueError, match="two dimensions"):
        read_image(np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="no images"):
        VFMTokImageProcessor()([])


def test_files_that_cannot_be_opened_are_no_damaged_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no image file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


def test_addresses_that_give_no_image(address):
    with pytest.raises(UnreadableImage, match=r"absent\.png.*404"):
        read_image(f"{address}/absent.png")
    with pytest.raises(UnreadableImage, match=r"The data: URL"):
        read_image("data:image/png;base64,####")


def test_heic_hints_at_its_package(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(40))
    with pytest.raises(UnreadableImage, match="pillow-heif"):
        read_image(tmp_path / "photo.jpg")


def test_heic_is_read_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="reads HEIC; pip install pillow-heif runs this test")
    heif.register_heif_opener()
    photo = tmp_path / "photo.heic"
    PIL.Image.new("RGB", (64, 48), "red").save(photo, quality=100)
    read = read_image(photo)
    assert read.size == (64, 48)
    assert np.abs(np.asarray(read).astype(int) - (255, 0, 0)).max() <= 3


# -- size


def test_decoders_shrink_on_request():
    encoded = encoded_as("JPEG")
    assert read_image(encoded).size == (64, 64)
    assert read_image(encoded, min_side=20).size == (32, 32)
    assert read_image(encoded, min_side=33).size == (64, 64)
    assert read_image(encoded_as("PNG"), min_side=8).size == (64, 64)


def test_one_image_of_a_batch_is_decoded_at_a_time():
    """Eight images of 12 megapixels are 288 MB, one of them 36 MB."""
    stream = io.BytesIO()
    PIL.Image.new("RGB", (4000, 3000), "red").save(stream, "JPEG")
    processor = VFMTokImageProcessor(size=16)
    tracemalloc.start()  # it sees arrays and bytes, of which there would be eight
    processor([stream.getvalue()] * 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_images_come_out_of_whatever_holds_them():
    picture, array = PIL.Image.new("RGB", (2, 2)), np.zeros((2, 2, 3), np.uint8)
    assert list(each_image(picture)) == [picture]
    assert list(each_image([picture, [picture], (image for image in [picture])])) == [picture] * 3
    assert [image.shape for image in each_image([array, np.stack([array, array])])] == [(2, 2, 3)] * 3
    assert [image.shape for image in each_image(torch.zeros(2, 3, 4, 4))] == [(3, 4, 4)] * 2
    assert list(each_image("a.png")) == ["a.png"]
