"""The Space through its API, as programs use it."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest
from transformers import GenerationConfig

from vfmtok_hf import DEFAULT_CHECKPOINT


gradio_client = pytest.importorskip("gradio_client", reason="needs gradio: pip install 'vfmtok-hf[space]'")

EXAMPLES = Path(__file__).parents[2] / "spaces" / "vfmtok" / "examples"
# The checkpoint's, with which the page compares.
SAMPLING = GenerationConfig.from_pretrained(DEFAULT_CHECKPOINT, subfolder="transformer")
SETTINGS = {"temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k, "top_p": 1.0, "guidance": 1.0}


@pytest.fixture(scope="module")
def client(space):
    return new_client(space)


def new_client(space):
    return gradio_client.Client(space.url, verbose=False, download_files=False)


def generate(client, label, seed, images=1, **changes):
    generation, _ = client.predict(label, images, seed, *{**SETTINGS, **changes}.values(), api_name="/generate")
    return [image["url"] for image in generation["images"]]


def upload(path):
    return gradio_client.handle_file(str(path))


def decoded(url: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_images_stream_while_they_grow(client):
    job = client.submit("heart", 2, 0, *SETTINGS.values(), api_name="/generate")
    job.result()
    generations = [generation for generation, _ in job.outputs()]
    assert len(generations) > 3
    shares = [generation["percent"] for generation in generations]
    assert shares == sorted(shares)
    assert [generation["whole"] for generation in generations[:-2]] == [False] * (len(generations) - 2)
    assert (generations[-1]["tokens"], generations[-1]["whole"], generations[-1]["passes"]) == ("144 / 144", True, 1)
    assert [image["caption"] for image in generations[-1]["images"]] == ["heart, seed 0", "heart, seed 1"]
    assert decoded(generations[-1]["images"][0]["url"]).size == (128, 128)


def test_the_gallery_holds_the_earlier_images_of_a_session_newest_first(space):
    client = new_client(space)
    for label in ("heart", "clock", "moon"):
        _, gallery = client.predict(label, 1, 5, *SETTINGS.values(), api_name="/generate")
    assert [image["caption"] for image in gallery] == ["clock, seed 5", "heart, seed 5"]


def test_results_are_documented_as_objects(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/generate", "/compare", "/look_inside", "/decode", "/find_nearest", "/inpaint"} == set(endpoints)
    for name in set(endpoints) - {"/decode"}:
        assert endpoints[name]["returns"][0]["type"]["type"] == "object"


def test_a_generator_of_raster_order_has_no_endpoint_to_repaint(ar_space):
    endpoints = new_client(ar_space).view_api(return_format="dict")["named_endpoints"]
    assert "/generate" in endpoints
    assert "/inpaint" not in endpoints


def test_a_marked_cell_is_repainted(client):
    repainted = client.predict(upload(EXAMPLES / "heart_noto_1f9e1.png"), [78, 79], "heart", 1, api_name="/inpaint")
    assert repainted["caption"] == "heart, seed 1"
    assert decoded(repainted["url"]).size == (128, 128)


def test_two_visitors_at_once_get_what_each_gets_alone(space):
    clients = [new_client(space), new_client(space)]
    tasks = [("heart", 1), ("clock", 2)]
    alone = [generate(client, *task) for client, task in zip(clients, tasks, strict=True)]
    with ThreadPoolExecutor(max_workers=2) as executor:
        together = list(executor.map(lambda client, task: generate(client, *task), clients, tasks))
    assert together == alone
    assert alone[0] != alone[1]


def test_both_sides_of_the_comparison_are_what_each_setting_generates(client):
    comparison = client.predict("smiley", 1, 3, 2.0, api_name="/compare")
    sides = [side["generation"] for side in comparison["sides"]]
    assert [side["passes"] for side in sides] == [1, 2]
    assert [side["images"][0]["url"] for side in sides] == [
        generate(client, "smiley", 3)[0],
        generate(client, "smiley", 3, guidance=2.0)[0],
    ]
    assert all(float(side["seconds"]) > 0 for side in sides)


def test_tokens_of_a_picture_decode_to_its_reconstruction(client):
    inside = client.predict(upload(EXAMPLES / "heart_noto_1f9e1.png"), api_name="/look_inside")
    assert client.predict(inside["tokens"], api_name="/decode") == inside["reconstruction"]
    erased = client.predict(inside["blank"], api_name="/decode")
    assert decoded(erased).convert("L").getextrema()[0] > 200


def test_the_nearest_of_an_example_are_others_of_its_kind(client):
    found = client.predict(upload(EXAMPLES / "heart_noto_1f9e1.png"), api_name="/find_nearest")
    assert {found[by][0]["name"] for by in ("shared", "embedding")} == {"heart"}
    counts = [int(neighbor["score"].split()[0]) for neighbor in found["shared"]]
    assert counts == sorted(counts, reverse=True)
    assert [len(neighbor["cells"]) for neighbor in found["shared"]] == counts
    cosines = [float(neighbor["score"]) for neighbor in found["embedding"]]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] < 0.999, "the picture itself is left out"


def test_a_blank_picture_has_neighbors_too(client, tmp_path):
    PIL.Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    found = client.predict(upload(tmp_path / "blank.png"), api_name="/find_nearest")
    assert len(found["shared"]) == len(found["embedding"]) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "hart"}, "Did you mean"),
        ({"label": "<b>x</b>"}, "&lt;b&gt;"),
        ({"images": 10_000}, "maximum|1 to 8"),
        ({"seed": -1}, "minimum|from 0"),
        ({"seed": None}, "Seed must be a number"),
        ({"temperature": 0}, "minimum|0.1 to"),
    ],
)
def test_wrong_settings_get_a_friendly_word(client, changes, message):
    values = {"label": "heart", "images": 1, "seed": 0, **SETTINGS, **changes}
    with pytest.raises(Exception, match=message):
        client.predict(*values.values(), api_name="/generate")


def test_wrong_uploads_get_a_friendly_word_and_the_space_lives_on(client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand then nothing")
    PIL.Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    for name, message in (("broken.png", "cannot be read as an image"), ("huge.png", "40 million pixels")):
        for api_name in ("/look_inside", "/find_nearest"):
            with pytest.raises(Exception, match=message):
                client.predict(upload(tmp_path / name), api_name=api_name)
    with pytest.raises(Exception, match="144 tokens"):
        client.predict([1, 2, 3], api_name="/decode")
    assert generate(client, "heart", 0)


def test_files_of_the_server_are_out_of_reach(client):
    for path in ("/etc/passwd", str(EXAMPLES.parent / "app.py")):
        with pytest.raises(Exception, match="(?i)not allowed|InvalidPath|cannot|error"):
            client.predict({"path": path, "meta": {"_type": "gradio.FileData"}}, api_name="/look_inside")


def test_nothing_is_written_outside_of_the_temp_folder(space, client):
    generate(client, "heart", 0)
    client.predict(upload(EXAMPLES / "heart_noto_1f9e1.png"), api_name="/look_inside")
    assert any(space.temp_folder.rglob("*.png"))
    assert [path for folder in space.other_folders for path in folder.rglob("*") if path.is_file()] == []
    own_suffixes = {".py", ".pyc", ".md", ".txt", ".png", ".html", ".css", ".js"}
    assert {path.suffix for path in EXAMPLES.parent.rglob("*") if path.is_file()} <= own_suffixes
