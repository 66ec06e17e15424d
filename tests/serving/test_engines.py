"""The server in front of token engines, which are stubs here: right images as long as one engine works."""

import asyncio
import base64
import io
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx
import PIL.Image
import PIL.ImageChops
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from typer.testing import CliRunner

from benchmarks.serving import server
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.serving.servers import free_port, running, wait_until
from tests.serving.test_app import metric, opened, post
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cli import app as command
from vfmtok_hf.serving import engines
from vfmtok_hf.serving.app import create_app
from vfmtok_hf.serving.decoding import Drawing
from vfmtok_hf.serving.engines import EnginePool, Unavailable, VLLMEngine, without_weights


class StubEngine:
    """An HTTP server with the route of vLLM's engines. `behaviors` answer its first requests, in their order."""

    def __init__(self, codebook_size: int, behaviors=()):
        self.codebook_size, self.behaviors = codebook_size, list(behaviors)
        self.bodies, self.num_disconnects, self.released = [], 0, False
        self.app = FastAPI()
        self.app.post("/inference/v1/generate")(self.generate)

    def tokens(self, body) -> list[int]:
        """They depend on the request alone, as a seed's do."""
        sampling = body["sampling_params"]
        source = random.Random(f"{body['token_ids']} {sampling['seed']}")
        return source.choices(range(self.codebook_size), k=sampling["max_tokens"])

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.behaviors:
            return await self.behaviors.pop(0)(self, request, body)
        return reply(self.tokens(body))


def reply(tokens, status=200) -> Response:
    return Response(json.dumps({"choices": [{"token_ids": tokens}]}), status, media_type="application/json")


async def fails(stub, request, body):
    return Response("EngineDeadError", 500)


async def dies(stub, request, body):
    """Amid its answer."""

    class Cut(Response):
        async def __call__(self, scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})
            # The server closes the connection after an incomplete body.

    return Cut()


async def hangs(stub, request, body):
    while not await request.is_disconnected():
        await anyio.sleep(0.01)
    stub.num_disconnects += 1
    return Response()


async def waits(stub, request, body):
    while not stub.released:
        await anyio.sleep(0.01)
    return reply(stub.tokens(body))


async def stops_early(stub, request, body):
    return reply(stub.tokens(body)[:-1])


async def leaves_the_codebook(stub, request, body):
    return reply([stub.codebook_size] * body["sampling_params"]["max_tokens"])


async def has_no_tokens(stub, request, body):
    return reply(None)


async def has_text_for_tokens(stub, request, body):
    return reply(["a"] * body["sampling_params"]["max_tokens"])


async def drips(stub, request, body):
    """Each byte arrives in time, but the answer never ends."""

    async def spaces():
        while True:
            yield b" "
            await anyio.sleep(0.05)

    return StreamingResponse(spaces())


async def talks_nonsense(stub, request, body):
    return Response("<html>", 200)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(engines, "PAUSES", (0.0, 0.01, 0.02))


def front(pipe, *urls, timeout=30.0, **options):
    return create_app(
        pipe, "tiny", token_engines=[VLLMEngine(url, pipe.transformer, timeout) for url in urls], **options
    )


def draw(url, seed=7, **parameters) -> httpx.Response:
    return post(url, "/", {"inputs": "heart", "parameters": {"seed": seed, **parameters}})


def image_of(stub, pipe, seed=7) -> bytes:
    """What the server should answer, from the stub's tokens."""
    codebook_size, num_conditions = pipe.transformer.config.codebook_size, pipe.transformer.num_condition_tokens
    sampling = {"seed": seed, "max_tokens": pipe.transformer.config.num_image_tokens}
    tokens = stub.tokens({"token_ids": [codebook_size + 1] * num_conditions, "sampling_params": sampling})
    return pipe.detokenize([tokens])[0].tobytes()


@pytest.mark.parametrize("kind", ["ar", "rar"])
def test_tokens_of_an_engine_become_the_image(kind):
    pipe, stub = tiny_pipeline(kind), StubEngine(64)
    pipe.transformer.to("meta")  # its weights are not needed
    with running(stub.app) as engine, running(front(pipe, engine)) as url:
        assert opened(draw(url, temperature=0.8, top_k=5, top_p=0.9).json()).tobytes() == image_of(stub, pipe)
    num_tokens = pipe.transformer.config.num_image_tokens
    (body,) = stub.bodies
    assert body["token_ids"] == [64 + 1] * {"ar": 1, "rar": 2}[kind]
    assert body["sampling_params"] == {
        "seed": 7, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_tokens": num_tokens, "max_tokens": num_tokens,
        "ignore_eos": True, "detokenize": False,
    }  # fmt: skip


def test_engines_share_the_images():
    async def waits_for_the_other(stub, request, body):
        while not all(other.bodies for other in stubs):
            await anyio.sleep(0.01)
        return reply(stub.tokens(body))

    pipe, stubs = tiny_pipeline(), [StubEngine(64, [waits_for_the_other] * 8) for _ in range(2)]
    with running(stubs[0].app) as first, running(stubs[1].app) as second, running(front(pipe, first, second)) as url:
        images = post(url, "/", {"inputs": "heart", "parameters": {"seed": 0, "num_images_per_label": 8}}).json()
    assert [opened(image).tobytes() for image in images] == [image_of(stubs[0], pipe, seed) for seed in range(8)]


@pytest.mark.parametrize(
    "behavior",
    [
        fails,
        dies,
        hangs,
        drips,
        stops_early,
        leaves_the_codebook,
        has_no_tokens,
        has_text_for_tokens,
        talks_nonsense,
    ],
)
def test_another_engine_gives_the_same_image(behavior):
    pipe, broken, sound = tiny_pipeline(), StubEngine(64, [behavior] * 9), StubEngine(64)
    with (
        running(broken.app) as first,
        running(sound.app) as second,
        running(front(pipe, first, second, timeout=0.5)) as url,
    ):
        image = draw(url).json()
        # The first engine rests meanwhile.
        assert draw(url).json() == image
    assert opened(image).tobytes() == image_of(sound, pipe)
    assert len(broken.bodies) == 1
    assert [body == broken.bodies[0] for body in sound.bodies] == [True, True]


def test_engines_have_their_own_limits():
    """The places of an engine that rests do not go to another one."""
    running_now, peaks = 0, []

    async def counts(stub, request, body):
        nonlocal running_now
        running_now += 1
        peaks.append(running_now)
        await anyio.sleep(0.05)
        running_now -= 1
        return reply(stub.tokens(body))

    pipe, broken, sound = tiny_pipeline(), StubEngine(64, [fails]), StubEngine(64, [counts] * 9)
    with (
        running(broken.app) as first,
        running(sound.app) as second,
        running(front(pipe, first, second, max_batch_size=2)) as url,
    ):
        assert draw(url).status_code == 200
        assert draw(url, num_images_per_label=8).status_code == 200
    assert len(broken.bodies) == 1
    assert max(peaks) == 2


def test_engines_that_all_rest_share_the_images():
    async def waits_for_the_other(stub, request, body):
        while not all(len(other.bodies) > 2 for other in stubs):
            await anyio.sleep(0.01)
        return reply(stub.tokens(body))

    pipe, stubs = tiny_pipeline(), [StubEngine(64, [fails] * 2 + [waits_for_the_other]) for _ in range(2)]
    with running(stubs[0].app) as first, running(stubs[1].app) as second, running(front(pipe, first, second)) as url:
        assert draw(url).status_code == 503
        assert draw(url, num_images_per_label=2).status_code == 200


@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_request_is_the_clients_error(status, caplog):
    async def refuses(stub, request, body):
        return Response("top_p is wrong", status)

    pipe, stubs = tiny_pipeline(), [StubEngine(64, [refuses]), StubEngine(64)]
    with running(stubs[0].app) as first, running(stubs[1].app) as second, running(front(pipe, first, second)) as url:
        refused = draw(url)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == "The engines refuse these settings."
        assert draw(url).status_code == 200
    assert "top_p is wrong" in caplog.text
    # It was not repeated, and the engine does not rest.
    assert [len(stub.bodies) for stub in stubs] == [2, 0]


def test_top_k_ends_at_the_codebook():
    pipe, stub = tiny_pipeline(), StubEngine(64)
    with running(stub.app) as engine, running(front(pipe, engine)) as url:
        assert draw(url, top_k=10**9).status_code == 200
    assert stub.bodies[0]["sampling_params"]["top_k"] == 64


def test_an_engine_that_cannot_be_reached_is_passed_over():
    pipe, stub = tiny_pipeline(), StubEngine(64)
    with free_port() as closed, running(stub.app) as engine:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with running(front(pipe, nowhere, engine)) as url:
            assert opened(draw(url).json()).tobytes() == image_of(stub, pipe)


def test_without_a_working_engine_it_is_503_until_one_works(caplog):
    pipe, stubs = tiny_pipeline(), [StubEngine(64, [fails] * 2) for _ in range(2)]
    with running(stubs[0].app) as first, running(stubs[1].app) as second, running(front(pipe, first, second)) as url:
        refused = draw(url)
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        # The cause is logged, and clients do not learn the engines' addresses.
        assert refused.json()["error"]["message"] == "No engine generated the image."
        assert all(address in caplog.text for address in (first, second))
        assert httpx.get(f"{url}/health").status_code == 200
        assert [len(stub.bodies) for stub in stubs] == [2, 2]
        assert opened(draw(url).json()).tobytes() == image_of(stubs[0], pipe)


def test_work_of_clients_that_have_gone_is_dropped():
    pipe, stub = tiny_pipeline(), StubEngine(64, [hangs] * 2)
    with running(stub.app) as engine, running(front(pipe, engine)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/", json={"inputs": [1, 2]}, timeout=httpx.Timeout(30, read=0.5))
        wait_until(lambda: stub.num_disconnects == 2)
        assert metric(url, "vfmtok_images_running") == metric(url, "vfmtok_images_waiting") == 0
        assert draw(url).status_code == 200


def test_a_full_queue_answers_429():
    pipe, stub = tiny_pipeline(), StubEngine(64, [waits] * 2)
    with running(stub.app) as engine:
        app = front(pipe, engine, max_batch_size=2, max_queue_size=1)
        with running(app) as url, ThreadPoolExecutor(2) as threads:
            held = threads.submit(post, url, "/", {"inputs": [1, 2]})
            wait_until(lambda: metric(url, "vfmtok_images_running") == 2)
            waiting = threads.submit(draw, url)
            wait_until(lambda: metric(url, "vfmtok_images_waiting") == 1)
            refused = draw(url)
            stub.released = True  # before anything is asserted: the pool waits for its threads
            assert refused.status_code == 429
            assert held.result().status_code == waiting.result().status_code == 200


def test_a_request_that_can_never_fit_is_400():
    pipe, stub = tiny_pipeline(), StubEngine(64)
    with running(stub.app) as engine, running(front(pipe, engine, max_batch_size=2, max_queue_size=1)) as url:
        refused = draw(url, num_images_per_label=4)
        assert refused.status_code == 400
        assert "up to 3 images at once, not 4" in refused.json()["error"]["message"]
        assert draw(url, num_images_per_label=3).status_code == 200


def test_a_pool_needs_places():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EnginePool(tiny_pipeline(), [], max_batch_size=0)


class SlowEngine:
    """A token engine that generates when `released`."""

    def __init__(self):
        self.released, self.is_closed = asyncio.Event(), False

    async def draw(self, label, seed, settings):
        await self.released.wait()
        assert not self.is_closed
        return [0] * 9

    async def close(self):
        self.is_closed = True


def test_stop_finishes_the_accepted_work():
    pipe, engine = tiny_pipeline(), SlowEngine()
    pool = EnginePool(pipe, [engine])
    drawing = Drawing(1, 7, pipe.transformer.sampling_settings())

    async def scenario():
        await pool.start()
        image = asyncio.create_task(pool.draw([drawing]))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(pool.stop())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="shutting down"):
            await pool.draw([drawing])
        engine.released.set()
        assert len(await image) == 1
        await stopping
        assert engine.is_closed

    asyncio.run(scenario())


def test_stop_leaves_the_event_loop_free():
    """A call whose client has gone still occupies the decoder."""
    pool, released = EnginePool(tiny_pipeline(), [SlowEngine()]), threading.Event()

    async def scenario():
        await pool.start()
        call = asyncio.create_task(pool.call(lambda: released.wait(10)))
        await asyncio.sleep(0.05)
        call.cancel()
        asyncio.get_running_loop().call_later(0.05, released.set)
        await pool.stop()
        assert released.is_set()

    asyncio.run(scenario())


def test_guidance_is_the_engines():
    pipe, stub = tiny_pipeline(), StubEngine(64)
    pipe.transformer.generation_config.guidance_scale = 2.0
    with running(stub.app) as engine, running(front(pipe, engine)) as url:
        refused = draw(url, guidance_scale=3.0)
        assert refused.status_code == 400
        assert "leave guidance_scale out" in refused.json()["error"]["message"]
        assert draw(url, guidance_scale=2.0).json() == draw(url).json()


def test_streams_have_the_finished_image_alone():
    pipe, stub = tiny_pipeline(), StubEngine(64)
    body = {"prompt": "heart", "stream": True, "partial_images": 2, "seed": 7}
    with running(stub.app) as engine, running(front(pipe, engine)) as url:
        (event,) = re.findall(r"^data: (.*)$", post(url, "/v1/images/generations", body).text, re.MULTILINE)
    assert json.loads(event)["type"] == "image_generation.completed"
    assert opened(json.loads(event)["b64_json"]).tobytes() == image_of(stub, pipe)


def test_images_are_encoded_and_decoded_here():
    pipe = tiny_pipeline()
    PIL.Image.new("RGB", (40, 32), "red").save(buffer := io.BytesIO(), "png")
    with running(front(pipe, "http://127.0.0.1:1")) as url:
        text = base64.b64encode(buffer.getvalue()).decode()
        tokens = post(url, "/v1/tokens", {"images": [text]}).json()["image_tokens"]
        assert tokens == pipe.tokenize(PIL.Image.open(buffer)).tolist()


def test_a_generator_without_weights_has_the_settings(tmp_path):
    pipe = tiny_pipeline("rar")
    pipe.transformer.generation_config.guidance_scale_pow = 2.5
    pipe.save_pretrained(tmp_path)
    outline = without_weights(str(tmp_path))
    assert outline.device.type == "meta"
    assert outline.config.to_diff_dict() == pipe.transformer.config.to_diff_dict()
    assert outline.sampling_settings.resolve({}, outline.generation_config).guidance_scale_pow == 2.5


@pytest.mark.parametrize("url", ["localhost:8001", "127.0.0.1:8001", "http://", "ftp://host"])
def test_command_refuses_other_addresses_than_http(url):
    result = CliRunner().invoke(command, ["serve", "--model", "nowhere", "--engine", url])
    assert result.exit_code == 2
    assert "is not a URL like http://HOST:8001" in " ".join(result.output.replace("│", " ").split())


def test_command_with_engines():
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    stub = StubEngine(pipe.transformer.config.codebook_size)
    label = pipe.get_label_ids("heart")[0]
    with running(stub.app) as engine, server("--engine", engine) as (url, _):
        image = opened(draw(url).json())
    (body,) = stub.bodies
    assert body["token_ids"] == [pipe.transformer.config.codebook_size + label] * pipe.transformer.num_condition_tokens
    # The command packs the decoder's weights for the CPU, so rounding may cross the border between two of the 256 levels.
    expected = pipe.detokenize([stub.tokens(body)])[0]
    assert max(high for _, high in PIL.ImageChops.difference(image, expected).getextrema()) <= 1
