"""The server, as its clients see it."""

import asyncio
import base64
import io
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import PIL.Image
import pytest
import torch
from huggingface_hub import InferenceClient

from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.serving.servers import running, wait_until
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokConfig, VFMTokPipeline
from vfmtok_hf.serving.app import BodyLimit, create_app


NUM_TOKENS = VFMTokConfig.from_pretrained(DEFAULT_CHECKPOINT, subfolder="vq_model").num_anchors


@pytest.fixture(scope="module")
def pipe():
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def url(pipe):
    with running(create_app(pipe, "emoji", max_batch_size=16, max_queue_size=64)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def opened(text: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(text)))


def post(url: str, path: str, body, **headers) -> httpx.Response:
    return httpx.post(url + path, json=body, headers=headers, timeout=120)


def metric(url: str, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1])


# -- OpenAI's images API


def test_openai_client_gets_the_images_of_its_seeds(client, pipe):
    reply = client.images.generate(prompt="heart", n=2, extra_body={"seed": 5})
    for number, image in enumerate(reply.data):
        assert image.seed == 5 + number
        expected = pipe("heart", generator=torch.Generator().manual_seed(5 + number)).images[0]
        # The pipeline attends to shorter caches, which rounds differently.
        difference = torch.tensor([*opened(image.b64_json).tobytes()]) - torch.tensor([*expected.tobytes()])
        assert difference.abs().max() <= 1
    assert reply.usage.output_tokens == 2 * pipe.transformer.config.num_image_tokens
    assert reply.output_format == "png"


def test_a_seed_drawn_by_the_server_repeats_the_image(client):
    first = client.images.generate(prompt="3").data[0]
    again = client.images.generate(prompt="3", extra_body={"seed": first.seed}).data[0]
    assert again.b64_json == first.b64_json


def test_a_key_stands_for_the_seed_of_a_request_without_one(url):
    first, again, other = (
        post(url, "/", {"inputs": "heart"}, **{"Idempotency-Key": key}).json() for key in ("one", "one", "two")
    )
    assert first == again != other
    for headers in ({}, {"Idempotency-Key": ""}):
        assert (
            post(url, "/", {"inputs": "heart"}, **headers).json()
            != post(url, "/", {"inputs": "heart"}, **headers).json()
        )


def test_openai_stream_grows_to_the_whole_image(client):
    stream = client.images.generate(prompt="heart", stream=True, partial_images=3, extra_body={"seed": 1})
    *partial, whole = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert whole.type == "image_generation.completed"
    assert len({event.b64_json for event in (*partial, whole)}) == 4
    assert whole.b64_json == client.images.generate(prompt="heart", extra_body={"seed": 1}).data[0].b64_json


def test_formats(client):
    for output_format in ("jpeg", "webp"):
        image = client.images.generate(prompt="heart", output_format=output_format).data[0]
        assert opened(image.b64_json).format == output_format.upper()


def test_models(client):
    assert [model.id for model in client.models.list()] == ["emoji"]
    with pytest.raises(openai.NotFoundError, match="this server has 'emoji'"):
        client.images.generate(prompt="heart", model="dall-e-3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "hart"}, "Did you mean 'heart'"),
        ({"prompt": 1001 * "a"}, "prompt: .*at most 1000 characters"),
        ({"prompt": "99"}, "must be in 0 to"),
        ({"prompt": "heart", "n": 11}, "n: .*less than or equal to 10"),
        ({"prompt": "heart", "response_format": "url"}, "response_format: .*b64_json"),
        ({"prompt": "heart", "size": "1024x1024"}, "leave size out"),
        ({"prompt": "heart", "n": 2, "stream": True}, "one image"),
        ({"prompt": "heart", "extra_body": {"temperature": -1}}, "temperature must be above 0"),
        ({"prompt": "heart", "extra_body": {"seed": -1}}, "seed"),
        ({"prompt": "heart", "extra_body": {"sead": 1}}, "sead: Extra inputs"),
    ],
)
def test_what_cannot_be_meant_is_a_bad_request(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.images.generate(**options)


# -- the Hub's


def test_inference_client_of_the_hub(url, client, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    image = InferenceClient(model=url).text_to_image("heart", seed=3)
    expected = client.images.generate(prompt="heart", extra_body={"seed": 3}).data[0]
    assert image.tobytes() == opened(expected.b64_json).tobytes()


def test_hub_body(url):
    body = {"inputs": ["heart", 3], "parameters": {"seed": 1, "num_images_per_label": 2}}
    images = post(url, "/predict", body).json()
    alone = post(url, "/", {"inputs": 3, "parameters": {"seed": 4}}).json()
    assert len(images) == 4
    assert images[3] == alone
    assert "accept application/json" in post(url, "/", body, Accept="image/png").json()["error"]["message"]
    jpeg = post(url, "/", {"inputs": "heart"}, Accept="image/jpeg")
    assert jpeg.headers["Content-Type"] == "image/jpeg"
    assert PIL.Image.open(io.BytesIO(jpeg.content)).format == "JPEG"


# -- tokens


def test_tokens_of_images_and_images_of_tokens(url, pipe):
    image = pipe("heart", generator=torch.Generator().manual_seed(0)).images[0]
    image.save(buffer := io.BytesIO(), "png")
    text = base64.b64encode(buffer.getvalue()).decode()
    tokens = post(url, "/v1/tokens", {"images": [text, f"data:image/png;base64,{text}"]}).json()["image_tokens"]
    assert tokens == [pipe.tokenize(image)[0].tolist()] * 2
    data = post(url, "/v1/tokens", {"image_tokens": tokens}).json()["data"]
    assert opened(data[0]["b64_json"]).tobytes() == pipe.detokenize(tokens[:1])[0].tobytes()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Send images or image_tokens"),
        ({"images": ["***"]}, "not base64"),
        ({"images": [base64.b64encode(b"no picture").decode()]}, "cannot be read"),
        ({"images": ["https://example.org/image.png"]}, "not base64|cannot be read"),
        (
            {"images": [base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()]},
            "cannot be read",
        ),
        ({"image_tokens": [[1, 2, 3]]}, "tokens per image, got 3"),
        ({"image_tokens": [[10**6] * NUM_TOKENS]}, "must be in"),
    ],
)
def test_unusable_images_and_tokens_are_bad_requests(url, body, message):
    reply = post(url, "/v1/tokens", body)
    assert reply.status_code == 400
    assert re.search(message, reply.json()["error"]["message"])


def test_pictures_that_would_fill_the_memory_are_refused(url):
    PIL.Image.new("1", (8000, 8000)).save(buffer := io.BytesIO(), "png")
    reply = post(url, "/v1/tokens", {"images": [base64.b64encode(buffer.getvalue()).decode()]})
    assert reply.status_code == 400
    assert "8000 x 8000" in reply.json()["error"]["message"]


# -- batches


def test_an_image_is_the_same_in_any_company(url, client):
    """With other settings, with guidance, streamed ones and tokens among them."""
    bodies = [{"prompt": str(seed % 14), "seed": seed} for seed in range(24)]
    for body, settings in zip(
        bodies, 6 * [{}, {"top_k": 20}, {"guidance_scale": 1.5}, {"temperature": 0.8}], strict=True
    ):
        body |= settings

    def draw(body):
        return post(url, "/v1/images/generations", body).json()["data"][0]["b64_json"]

    with ThreadPoolExecutor(24) as threads:
        together = list(threads.map(draw, bodies))
    assert len({*together}) == 24
    for body, image in list(zip(bodies, together, strict=True))[::5]:
        assert draw(body) == image
    assert metric(url, "vfmtok_images_running") == 0


def test_requests_share_decode_steps(pipe, monkeypatch):
    rows, decode_step = [], pipe.transformer.decode_step
    monkeypatch.setattr(
        pipe.transformer,
        "decode_step",
        lambda tokens, *others: rows.append(len(tokens)) or decode_step(tokens, *others),
    )
    with running(create_app(pipe, "emoji", max_batch_size=4)) as url, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: post(url, "/", {"inputs": seed}), range(8)))
    assert max(rows) == 4
    assert len(rows) < 8 * NUM_TOKENS


# -- limits


class Blocked:
    """A pipeline whose decode steps wait until they are let go."""

    def __init__(self):
        self.pipe, self.gate = tiny_pipeline(), threading.Event()
        decode_step = self.pipe.transformer.decode_step
        self.num_steps = 0

        def gated(*arguments):
            self.num_steps += 1
            assert self.gate.wait(60)
            return decode_step(*arguments)

        self.pipe.transformer.decode_step = gated


def test_a_full_queue_answers_429(tmp_path):
    blocked = Blocked()
    app = create_app(blocked.pipe, "tiny", max_batch_size=2, max_queue_size=2)
    with running(app) as url, ThreadPoolExecutor(8) as threads:
        first = threads.submit(post, url, "/", {"inputs": 1, "parameters": {"num_images_per_label": 2}})
        wait_until(lambda: metric(url, "vfmtok_images_waiting") == 0 and blocked.num_steps == 1)
        waiting = threads.submit(post, url, "/", {"inputs": 1, "parameters": {"num_images_per_label": 2}})
        wait_until(lambda: metric(url, "vfmtok_images_waiting") == 2)
        refused = post(url, "/", {"inputs": 1})
        assert refused.status_code == 429
        assert refused.headers["Retry-After"]
        blocked.gate.set()
        assert first.result().status_code == waiting.result().status_code == 200


def test_work_of_clients_that_have_gone_is_dropped():
    blocked = Blocked()
    app = create_app(blocked.pipe, "tiny", max_batch_size=2, max_queue_size=8)
    body = {"inputs": 1, "parameters": {"num_images_per_label": 4}}
    with running(app) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/", json=body, timeout=httpx.Timeout(30, read=0.5))
        body = {"prompt": "1", "stream": True, "partial_images": 1}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/images/generations", json=body, timeout=httpx.Timeout(30, read=0.5))
        blocked.gate.set()
        wait_until(lambda: metric(url, "vfmtok_images_running") == metric(url, "vfmtok_images_waiting") == 0)
        assert metric(url, "vfmtok_images_total") == 0
        # Neither the two images in the batch nor those that waited were finished.
        assert blocked.num_steps < 9
        assert post(url, "/", {"inputs": 1}).status_code == 200


@pytest.mark.parametrize("stream", [{}, {"stream": True, "partial_images": 1}])
def test_an_image_that_fails_takes_no_other_with_it(pipe, stream):
    """Guidance that overflows, beside an image that runs longer."""
    body = {"prompt": "heart", "seed": 1}
    with running(create_app(pipe, "emoji", max_batch_size=4)) as url, ThreadPoolExecutor(2) as threads:
        path = "/v1/images/generations"
        bad = threads.submit(post, url, path, {"prompt": "1", "guidance_scale": 1e38, **stream})
        wait_until(lambda: metric(url, "vfmtok_images_running") == 1)
        good = threads.submit(post, url, path, body)
        assert bad.result().status_code == 400
        assert "extreme" in bad.result().json()["error"]["message"]
        assert good.result().status_code == 200
        assert good.result().json()["data"] == post(url, path, body).json()["data"]


def test_clients_are_told_when_the_thread_ends():
    """A step fails, and then there is no memory for a new batch."""
    pipe = tiny_pipeline()
    app = create_app(pipe, "tiny", max_batch_size=2)

    def failing(*arguments, **options):
        raise RuntimeError("out of memory")

    pipe.transformer.decode_step = failing
    pipe.transformer.new_cache = failing
    with running(app) as url:
        assert post(url, "/", {"inputs": 1, "parameters": {"num_images_per_label": 4}}).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503


def test_more_images_than_the_queue_holds_are_a_bad_request():
    with running(create_app(tiny_pipeline(), "tiny", max_queue_size=2)) as url:
        reply = post(url, "/", {"inputs": 1, "parameters": {"num_images_per_label": 3}})
    assert reply.status_code == 400
    assert "up to 2 images at once, not 3" in reply.json()["error"]["message"]


def test_a_step_that_fails_is_503_and_the_server_goes_on():
    pipe = tiny_pipeline()
    decode_step, failures = pipe.transformer.decode_step, [RuntimeError("out of memory")]

    def failing(*arguments):
        if failures:
            raise failures.pop()
        return decode_step(*arguments)

    pipe.transformer.decode_step = failing
    with running(create_app(pipe, "tiny")) as url:
        failed = post(url, "/", {"inputs": 1})
        assert failed.status_code == 503
        assert failed.headers["Retry-After"]
        assert failed.json()["error"]["message"] == "Generation failed."  # the cause is only in the server's log
        assert post(url, "/", {"inputs": 1}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_key_is_asked_for():
    with running(create_app(tiny_pipeline(), "tiny", api_key="sesame")) as url:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic sesame"}):
            assert post(url, "/", {"inputs": 1}, **headers).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="other").images.generate(prompt="1")
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="sesame").images.generate(prompt="1").data
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/metrics").status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer sésame".encode("latin-1")}])
def test_a_key_is_asked_for_before_the_body_is_read(headers):
    async def refused():
        app = create_app(tiny_pipeline(), "tiny", api_key="sésame")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tiny") as client:
            known = await client.post("/", content=b"{", headers={"Authorization": "Bearer sésame".encode()})
            unknown = await client.post("/", content=endless(), headers=headers)
            closed = await client.get("/openapi.json")
        return known.status_code, unknown.status_code, closed.status_code

    async def endless():
        raise AssertionError("the body was read")
        yield b""

    assert asyncio.run(refused()) == (400, 401, 401)


def test_an_empty_key_is_refused():
    with pytest.raises(ValueError, match="empty"):
        create_app(tiny_pipeline(), "tiny", api_key="")


def test_a_body_that_pauses_is_refused(monkeypatch):
    monkeypatch.setattr(BodyLimit.__init__, "__defaults__", (1000, 0.2))
    head = b"POST / HTTP/1.1\r\nHost: tiny\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{"
    with running(create_app(tiny_pipeline(), "tiny", max_body_bytes=1000)) as url:
        for length, status in ((100, b"408"), (10**9, b"413")):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as connection:
                connection.sendall(head % length)
                assert connection.recv(1000).startswith(b"HTTP/1.1 " + status)


def test_large_bodies_are_refused_before_they_are_read():
    with running(create_app(tiny_pipeline(), "tiny", max_body_bytes=1000)) as url:
        assert post(url, "/", {"inputs": "x" * 1000}).status_code == 413

        def endless():
            while True:
                yield b" " * 1000

        # Either the answer arrives, or the connection ends under the sender.
        try:
            assert httpx.post(f"{url}/", content=endless()).status_code == 413
        except httpx.TransportError:
            pass
        assert post(url, "/", {"inputs": 1}).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"inputs": {"a": 1}}', b"\xff\xfe", json.dumps({}).encode()])
def test_malformed_bodies_are_bad_requests(url, content):
    for path in ("/", "/v1/images/generations", "/v1/tokens"):
        reply = httpx.post(url + path, content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, path
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_metrics_count_requests_and_images(url):
    before = metric(url, "vfmtok_images_total")
    post(url, "/", {"inputs": 1, "parameters": {"num_images_per_label": 2}})
    post(url, "/", {"inputs": "hart"})
    text = httpx.get(f"{url}/metrics").text
    assert metric(url, "vfmtok_images_total") == before + 2
    assert re.search(r'vfmtok_requests_total\{route="/",status="400"\} [1-9]', text)
    assert re.search(r'vfmtok_requests_total\{route="/",status="200"\} [1-9]', text)


def test_a_batch_too_small_for_guidance_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        create_app(tiny_pipeline(), "tiny", max_batch_size=1)


def test_accepted_images_are_finished_when_the_server_stops():
    blocked = Blocked()
    app = create_app(blocked.pipe, "tiny", max_batch_size=2)

    with ThreadPoolExecutor(1) as threads, running(app) as url:
        reply = threads.submit(post, url, "/", {"inputs": 1})
        wait_until(lambda: blocked.num_steps == 1)
        threading.Timer(0.5, blocked.gate.set).start()
        # Leaving `running` stops the server while the image is in the batch.
    assert reply.result().status_code == 200
