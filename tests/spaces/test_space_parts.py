"""The Space's functions, without a page."""

import base64
import io

import numpy as np
import PIL.Image
import pytest
import torch


pytestmark = pytest.mark.usefixtures("parts")


@pytest.fixture
def warnings(monkeypatch):
    """What visitors are warned of; gradio shows it only within a request."""
    gradio = pytest.importorskip("gradio")
    messages = []
    monkeypatch.setattr(gradio, "Warning", messages.append)
    return messages


def picture_file(folder, suffix=".png", size=(80, 60), **settings):
    path = folder / f"picture{suffix}"
    PIL.Image.effect_noise(size, 60).convert("RGB").save(path, **settings)
    return path


def test_the_mark_for_zerogpu_changes_nothing_elsewhere():
    from model import gpu

    def compute():
        return 1

    assert gpu(compute) is compute
    assert gpu(duration=30)(compute) is compute


# -- settings


def test_a_link_restores_the_settings(warnings):
    from settings import Settings

    link = {
        "label": "heart", "images": "2", "seed": "7", "temperature": "0.8", "top_k": "50", "top_p": "0.9",
        "guidance": "1.5",
    }  # fmt: skip
    assert Settings.from_link(link) == Settings("heart", 2, 7, 0.8, 50, 0.9, 1.5)
    assert warnings == []


@pytest.mark.parametrize("label", ["moon", "Moon", "moon, moon phase", "9"])
def test_a_class_of_a_link_is_that_of_the_picker(label, warnings):
    from settings import Settings

    assert Settings.from_link({"label": label}).label == "moon"


def test_an_empty_link_is_the_default_without_guidance(warnings):
    from settings import DEFAULT_LABEL, Settings

    settings = Settings.from_link({"__theme": "dark"})
    assert settings == Settings(DEFAULT_LABEL)
    assert (settings.guidance, settings.temperature, settings.top_k) == (1.0, 0.7, 100)
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("label", "<img src=x onerror=alert(1)>"),
        ("label", "9" * 5000),
        ("label", "99"),
        ("label", ""),
        ("images", "1000000"),
        ("images", "-1"),
        ("seed", "1e999"),
        ("seed", "seven"),
        ("temperature", "nan"),
        ("temperature", "0"),
        ("top_p", "inf"),
        ("top_k", "' OR 1=1"),
        ("guidance", "<script>alert(1)</script>"),
    ],
)
def test_a_hostile_link_keeps_the_default_and_says_so_harmlessly(name, text, warnings):
    from settings import DEFAULT_LABEL, Settings

    assert Settings.from_link({name: text, "seed" if name != "seed" else "images": "5"}) == Settings(
        DEFAULT_LABEL, **{"seed" if name != "seed" else "images": 5}
    )
    assert len(warnings) == 1
    assert "<" not in warnings[0]
    assert len(warnings[0]) < 500


def test_every_class_is_offered_by_a_text_that_means_it():
    from model import PIPE
    from settings import class_choices

    choices = class_choices()
    assert [names for names, _ in choices] == list(PIPE.id2label.values())
    assert [PIPE.get_label_ids(value) for _, value in choices] == [[class_id] for class_id in PIPE.id2label]


def test_a_wrong_class_gets_a_suggestion():
    gradio = pytest.importorskip("gradio")
    from settings import Settings

    with pytest.raises(gradio.Error, match="Did you mean &#x27;heart&#x27;"):
        Settings.checked("hart")


# -- uploads


def test_uploads_of_usual_formats_open(tmp_path, warnings):
    from pictures import open_upload, pixel_values_of

    for suffix in (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff"):
        picture = open_upload(picture_file(tmp_path, suffix))
        assert picture.size == (80, 60)
        assert pixel_values_of(picture).shape == (1, 3, 128, 128)
    assert warnings == []


def test_transparent_and_sixteen_bit_uploads_open(tmp_path):
    from pictures import open_upload, pixel_values_of

    PIL.Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixel_values_of(open_upload(tmp_path / "clear.png")).min() > 0.99
    PIL.Image.fromarray(np.full((64, 64), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert pixel_values_of(open_upload(tmp_path / "deep.png")).min() > 0.99


def test_of_an_animation_the_first_frame_is_used(tmp_path, warnings):
    from pictures import open_upload

    frames = [PIL.Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    picture = open_upload(tmp_path / "moving.gif")
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert "only its first frame" in warnings[0]


def damaged(data: bytes) -> dict[str, bytes]:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    return {"truncated": data[: len(data) // 2], "text": b"not a picture", "empty": b"", "program": postscript}


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "program"])
def test_a_damaged_upload_gets_a_friendly_word(kind, tmp_path):
    gradio = pytest.importorskip("gradio")
    from pictures import open_upload

    path = tmp_path / "upload.png"
    path.write_bytes(damaged(picture_file(tmp_path).read_bytes())[kind])
    with pytest.raises(gradio.Error, match="cannot be read as an image"):
        open_upload(path)


@pytest.mark.parametrize("size", [(8000, 6000), (20000, 20000)])
def test_a_huge_upload_is_refused_before_it_is_unpacked(size, tmp_path):
    gradio = pytest.importorskip("gradio")
    from pictures import open_upload

    file = io.BytesIO()
    PIL.Image.new("1", (8, 8)).save(file, "PNG")
    header = bytearray(file.getvalue())
    header[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(rewritten_checksum(header))
    with pytest.raises(gradio.Error, match="40 million pixels"):
        open_upload(tmp_path / "huge.png")


def rewritten_checksum(png: bytearray) -> bytes:
    """A PNG whose header chunk was changed, made consistent."""
    import zlib

    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def test_a_strip_of_a_picture_is_refused():
    gradio = pytest.importorskip("gradio")
    from pictures import pixel_values_of

    with pytest.raises(gradio.Error, match="Crop it first"):
        pixel_values_of(PIL.Image.new("RGB", (2000, 4)))


# -- generation


def test_images_grow_row_by_row_into_what_the_pipeline_generates():
    from model import GRID_SIZE, NUM_TOKENS, PIPE
    from sampling import generate_stepwise
    from settings import Settings

    generations = list(generate_stepwise(Settings("clock", images=2, seed=3)))
    assert [generation.tokens_generated for generation in generations] == list(
        range(GRID_SIZE, NUM_TOKENS + 1, GRID_SIZE)
    )
    assert all(later.seconds > earlier.seconds for earlier, later in zip(generations, generations[1:], strict=False))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = PIPE("clock", num_images_per_label=2, generator=generators).images
    assert [picture.tobytes() for picture in generations[-1].images] == [picture.tobytes() for picture in expected]


def test_tokens_not_generated_yet_are_blank():
    from sampling import generate_stepwise
    from settings import Settings

    first = next(generate_stepwise(Settings("heart", images=1)))
    lower_half = np.asarray(first.images[0])[32:]
    assert lower_half.mean() > 250


def test_closing_a_generation_stops_the_sampling(monkeypatch):
    import sampling
    from settings import Settings

    steps = []
    sample = sampling.sample

    def counting_sample(settings, callback):
        def counting_callback(step, image_tokens):
            steps.append(step)
            return callback(step, image_tokens)

        return sample(settings, counting_callback)

    monkeypatch.setattr(sampling, "sample", counting_sample)
    # The first picture takes a while, so that the sampling thread cannot be at its end when it is stopped.
    generation = sampling.generate_stepwise(Settings("heart", images=8))
    next(generation)
    generation.close()
    assert len(steps) < 144


def test_a_failure_while_sampling_reaches_the_visitor(monkeypatch):
    import sampling
    from settings import Settings

    def failing_sample(settings, callback):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampling, "sample", failing_sample)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(sampling.generate_stepwise(Settings("heart")))


def test_a_view_veils_the_tokens_that_are_missing():
    from sampling import Generation
    from settings import Settings
    from views import generation_view

    images = [PIL.Image.new("RGB", (64, 64))] * 2
    growing = generation_view(Settings("heart", images=2, seed=3), Generation(images, 36, 0.5))
    assert growing["veil"].count("<rect") == 144 - 36
    assert [image["caption"] for image in growing["images"]] == ["heart, seed 3", "heart, seed 4"]
    assert growing["images"][0]["file"] == "heart-seed-3.png"
    assert growing["rate"] == "144"
    assert generation_view(Settings("heart", images=2), Generation(images, 144, 0.5))["veil"] == ""


def test_every_class_of_the_checkpoint_has_a_thumbnail():
    from model import PIPE
    from views import class_thumbnails

    thumbnails = class_thumbnails()
    assert [PIPE.get_label_ids(choice["value"]) for choice in thumbnails] == [[class_id] for class_id in PIPE.id2label]
    assert all(choice["thumbnail"].startswith("data:image/png") for choice in thumbnails)


# -- tokens


def test_inspection_agrees_with_the_model():
    from inspection import UNITS, inspect
    from model import PIPE
    from neighbors import EXAMPLES

    shown = inspect(PIL.Image.open(EXAMPLES[0]))
    pixel_values = PIPE.image_processor(PIL.Image.open(EXAMPLES[0]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        encoded = PIPE.vq_model.encode(pixel_values, output_sampling_locations=True)
    assert shown["tokens"] == encoded.image_tokens[0].tolist()
    places = torch.tensor(shown["points"], dtype=torch.float).view(len(shown["tokens"]), -1, 3)
    locations = encoded.sampling_locations[-1][0].flatten(1, 3)
    torch.testing.assert_close(places[..., :2] / UNITS, locations, atol=0.5 / UNITS + 1e-6, rtol=0)
    level_of_place = torch.arange(places.shape[1]) // shown["points_per_level"] % shown["levels"]
    weights = encoded.attention_weights[-1][0]
    by_level = torch.stack([places[:, level_of_place == level, 2].sum(1) for level in range(shown["levels"])], dim=1)
    # Each of the rounded weights is off by half a unit at most.
    torch.testing.assert_close(by_level / UNITS, weights.sum(dim=(1, 3)), atol=places.shape[1] * 0.5 / UNITS, rtol=0)
    assert 0 < shown["spread"] < 1
    assert shown["psnr"] > 18


def test_weight_in_the_own_cell_does_not_count_as_spread():
    from inspection import weight_outside_own_cell
    from model import GRID_SIZE, NUM_TOKENS

    cells = torch.arange(NUM_TOKENS)
    centers = (torch.stack([cells % GRID_SIZE, cells // GRID_SIZE], dim=-1) + 0.5) / GRID_SIZE
    corner = torch.full_like(centers, -0.01)
    locations = torch.stack([centers, corner], dim=1)
    weights = torch.tensor([0.75, 0.25]).expand(NUM_TOKENS, 2)
    assert weight_outside_own_cell(locations, weights) == pytest.approx(0.25)


@pytest.mark.parametrize("tokens", [[], [0], [0] * 143 + [1024], [0] * 143 + [-1], [0.5] * 144, "0" * 144, None])
def test_wrong_tokens_get_a_friendly_word(tokens):
    gradio = pytest.importorskip("gradio")
    from inspection import decode_tokens

    with pytest.raises(gradio.Error, match="144 tokens, integers from 0 to 1023"):
        decode_tokens(tokens)


# -- inpainting


def test_marked_cells_are_repainted_as_the_pipeline_does():
    import inpainting
    from model import PIPE
    from neighbors import EXAMPLES
    from settings import Settings

    picture, cells = PIL.Image.open(EXAMPLES[0]), [5, 6, 17, 18]
    repainted = inpainting.inpaint(picture, cells, Settings("heart", images=1, seed=3))
    mask = torch.zeros(144, dtype=torch.bool).index_fill(0, torch.tensor(cells), True)
    [expected] = PIPE.inpaint(picture, "heart", mask, generator=torch.Generator().manual_seed(3)).images
    assert PIL.Image.open(io.BytesIO(base64.b64decode(repainted["url"].split(",")[1]))).tobytes() == expected.tobytes()
    assert (repainted["caption"], repainted["file"]) == ("heart, seed 3", "heart-seed-3.png")


@pytest.mark.parametrize("cells", [[], [144], [-1], [0.5], "5", None])
def test_wrong_cells_get_a_friendly_word(cells):
    gradio = pytest.importorskip("gradio")
    import inpainting
    from settings import Settings

    with pytest.raises(gradio.Error, match="Mark at least one cell"):
        inpainting.inpaint(PIL.Image.new("RGB", (64, 64)), cells, Settings("heart"))
