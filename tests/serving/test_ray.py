"""Replicas on Ray, behind a front end that repeats what they lose."""

import asyncio
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from benchmarks.serving import load
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.serving.servers import free_port, running
from tests.serving.test_app import Blocked, post
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cpu.programs import prepare_cpu_program
from vfmtok_hf.serving.app import create_app, list_of_models
from vfmtok_hf.serving.engines import QueueFull, Unavailable
from vfmtok_hf.serving.requests import MAX_IMAGES


pytest.importorskip("ray", reason="vfmtok-hf[ray] brings it")
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from vfmtok_hf.serving import ray_app


ROOT = Path(__file__).parents[2]
START = {"type": "http.response.start", "status": 200, "headers": []}
PARTS = [{"type": "http.response.body", "body": bytes([number]), "more_body": number < 2} for number in range(3)]
WHOLE = [START, *PARTS]


# -- the front end


class Answer:
    """What a replica yields. An exception among the messages is raised."""

    def __init__(self, messages):
        self.messages, self.is_cancelled = list(messages), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.messages:
            raise StopAsyncIteration
        if isinstance(message := self.messages.pop(0), Exception):
            raise message
        return message

    def cancel(self):
        self.is_cancelled = True


def relayed(monkeypatch, *answers):
    """The messages of a front end whose replicas give these answers in turn."""
    monkeypatch.setattr(ray_app, "PAUSES", (0, 0, 0))
    messages = ray_app.FrontEnd.func_or_class.messages(SimpleNamespace(replicas=handle(answers)), {}, b"")
    return asyncio.run(collected(messages))


def handle(answers):
    """The handle of replicas that give these answers in turn."""
    waiting = [Answer(messages) for messages in answers]
    return SimpleNamespace(respond=SimpleNamespace(remote=lambda scope, body: waiting.pop(0)))


async def collected(messages):
    return [message async for message in messages]


def failure():
    """What Ray raises if a replica does."""
    return RayTaskError("respond", "", ValueError("a CUDA error")).as_instanceof_cause()


@pytest.mark.parametrize("error", [ActorDiedError, failure])
@pytest.mark.parametrize("num_sent", range(4))
def test_another_replica_continues_where_one_failed(monkeypatch, num_sent, error):
    assert relayed(monkeypatch, [*WHOLE[:num_sent], error()], WHOLE) == WHOLE


def test_a_whole_answer_is_not_repeated(monkeypatch):
    assert relayed(monkeypatch, [*WHOLE, ActorDiedError()]) == WHOLE


@pytest.mark.parametrize("status", [400, 429])
def test_a_repeat_answered_otherwise_replaces_only_what_was_not_begun(monkeypatch, status):
    refused = [{**START, "status": status}, PARTS[2]]
    assert relayed(monkeypatch, [START, ActorDiedError()], refused) == refused
    with pytest.raises(RuntimeError, match="begins differently"):
        relayed(monkeypatch, [START, PARTS[0], ActorDiedError()], refused)


def test_a_begun_answer_waits_for_a_place(monkeypatch):
    assert relayed(monkeypatch, [*WHOLE[:2], ActorDiedError()], [BackPressureError(1, 1)], WHOLE) == WHOLE


def test_a_replica_that_shuts_down_is_replaced(monkeypatch):
    assert relayed(monkeypatch, [{**START, "status": 503}, PARTS[2]], WHOLE) == WHOLE


def test_errors_of_the_request_are_not_repeated(monkeypatch):
    bad = [{**START, "status": 400}, PARTS[2]]
    assert relayed(monkeypatch, bad) == bad


def test_four_deaths_are_503_and_a_full_queue_is_429(monkeypatch):
    with pytest.raises(Unavailable):
        relayed(monkeypatch, *[[ActorDiedError()]] * 4)
    with pytest.raises(QueueFull):
        relayed(monkeypatch, [BackPressureError(1, 1)])


def passed_on(scope) -> Request:
    """What a replica receives for a request without a body."""
    scopes = []
    front_end = SimpleNamespace(api_key=None, messages=lambda scope, body: scopes.append(scope) or gone())

    async def gone():
        raise Unavailable
        yield

    received = [{"type": "http.request", "body": b""}]

    async def receive():
        return received.pop() if received else await asyncio.Future()  # a client that stays

    request = Request({"type": "http", "method": "GET", "root_path": "", "query_string": b"", **scope}, receive)
    with pytest.raises(Unavailable):
        asyncio.run(ray_app.FrontEnd.func_or_class.forward(front_end, request))
    return Request(scopes[0])


def test_the_prefix_of_the_application_is_passed_on():
    request = passed_on({"path": "/emoji/v1/tokens", "root_path": "/emoji", "headers": []})
    assert request.scope["root_path"] == "/emoji"


def test_a_request_without_a_key_gets_one():
    """With it, a repeated request gives the same images. An empty key is none, as for `vfmtok serve`."""
    requests = [passed_on({"path": "/", "headers": headers}) for headers in ([], [(b"idempotency-key", b"")]) * 2]
    assert len({request.headers["idempotency-key"] for request in requests} - {""}) == 4
    request = passed_on({"path": "/", "headers": [(b"idempotency-key", b"mine")]})
    assert request.headers.getlist("idempotency-key") == ["mine"]


def test_the_list_of_models_needs_the_key():
    front_end = SimpleNamespace(api_key="secret", models_reply=list_of_models("tiny"))

    def reply(*headers):
        request = Request({"type": "http", "method": "GET", "path": "/v1/models", "headers": headers})
        return asyncio.run(ray_app.FrontEnd.func_or_class.models(front_end, request))

    assert reply().status_code == 401
    assert json.loads(reply((b"authorization", b"Bearer secret")).body)["data"][0]["id"] == "tiny"


# -- a replica


def test_a_replica_queues_all_that_ray_admits(monkeypatch):
    """And it is healthy until its engine ends."""
    monkeypatch.setattr(ray_app, "load_pipeline", lambda *arguments, **options: tiny_pipeline())
    arguments = ray_app.RayArguments(model="tiny", max_batch_size=2, max_queue_size=1)
    deployment = ray_app.build(arguments)._bound_deployment.init_args[0]._bound_deployment
    replica = SimpleNamespace()

    async def started_and_stopped():
        await ray_app.Replica.func_or_class.__init__(replica, arguments)
        await ray_app.Replica.func_or_class.check_health(replica)
        await replica.app.state.engine.stop()
        with pytest.raises(RuntimeError, match="ended"):
            await ray_app.Replica.func_or_class.check_health(replica)

    asyncio.run(started_and_stopped())
    assert replica.app.state.engine.max_queue_size == deployment.max_ongoing_requests * MAX_IMAGES


def test_messages_are_those_that_a_server_sends():
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    headers = [(b"content-type", b"application/json"), (b"accept", b"image/png")]
    body = {"inputs": 1, "parameters": {"seed": 3}}

    async def in_process(app):
        async with app.router.lifespan_context(app):
            messages = ray_app.messages_of(app, {**scope, "headers": headers}, json.dumps(body).encode())
            return [message async for message in messages]

    pipe = tiny_pipeline()
    start, *parts = asyncio.run(in_process(create_app(pipe, "tiny")))
    with running(create_app(pipe, "tiny")) as url:
        reply = post(url, "/", body, Accept="image/png")
    assert (start["status"], b"".join(part["body"] for part in parts)) == (reply.status_code, reply.content)
    assert (b"content-type", b"image/png") in start["headers"]


def test_an_answer_that_fails_half_way_raises():
    app = FastAPI()

    @app.get("/")
    async def half():
        async def parts():
            yield b"half"
            raise ValueError("The second half failed.")

        return StreamingResponse(parts())

    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "query_string": b"", "headers": []}
    with pytest.raises(ValueError, match="second half"):
        asyncio.run(collected(ray_app.messages_of(app, scope, b"")))


def test_a_failure_before_the_answer_is_status_500(caplog):
    app = FastAPI()

    @app.get("/")
    async def failing():
        raise LookupError("This is logged.")

    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "query_string": b"", "headers": []}
    start, _ = asyncio.run(collected(ray_app.messages_of(app, scope, b"")))
    assert start["status"] == 500
    assert "This is logged." in caplog.text


def test_closing_the_messages_drops_the_work():
    blocked = Blocked()
    app = create_app(blocked.pipe, "tiny", max_batch_size=2)
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
    headers = [(b"content-type", b"application/json")]
    body = json.dumps({"inputs": 1, "parameters": {"num_images_per_label": 4}}).encode()

    async def leave():
        async with app.router.lifespan_context(app):
            messages = ray_app.messages_of(app, {**scope, "headers": headers}, body)
            answer = asyncio.ensure_future(anext(messages))
            while blocked.num_steps == 0:
                await asyncio.sleep(0.01)
            answer.cancel()
            await asyncio.wait([answer])
            blocked.gate.set()

    asyncio.run(leave())  # until all accepted work is done
    assert blocked.num_steps < 2 * blocked.pipe.transformer.config.num_image_tokens


# -- on Ray


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    """Address, process and log of `serve run` with two replicas."""
    config = yaml.safe_load((ROOT / "serving" / "ray.yaml").read_text())
    with free_port() as probe:
        config["http_options"]["port"] = port = probe.getsockname()[1]
    config["applications"][0]["args"] = {"replicas": 2, "max_batch_size": 8, "num_cpus": 0.5}
    file = tmp_path_factory.mktemp("ray") / "ray.yaml"
    file.write_text(yaml.safe_dump(config))
    log = file.with_name("log")
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [Path(sys.executable).with_name("serve"), "run", file]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_healthy(url):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield url, psutil.Process(process.pid), log
    finally:
        process.terminate()
        process.wait()


def is_healthy(url) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def replicas(server: psutil.Process) -> list[psutil.Process]:
    """The processes of the replicas."""
    return [
        process
        for process in server.children(recursive=True)
        if process.is_running() and "".join(process.cmdline()).startswith("ray::ServeReplica:vfmtok:Replica")
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_images_are_those_of_vfmtok_serve(on_ray):
    url, *_ = on_ray
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    prepare_cpu_program(pipe.vq_model, pipe.transformer)
    bodies = [{"inputs": seed, "parameters": {"seed": seed}} for seed in range(8)]
    with running(create_app(pipe, "emoji", max_batch_size=8)) as alone, ThreadPoolExecutor(8) as threads:
        expected = list(threads.map(lambda body: post(alone, "/", body).text, bodies))
        assert list(threads.map(lambda body: post(url, "/", body).text, bodies)) == expected
    assert post(url, "/", {"inputs": "hart"}).status_code == 400
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "emoji"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_killed_under_load_loses_nothing(on_ray):
    """Among malformed bodies, slow readers and clients that leave."""
    url, server, log = on_ray
    before = {process.pid for process in replicas(server)}

    def num_refused() -> int:
        return log.read_text().count("POST /{path:path} 400")

    refused_before = num_refused()

    async def kill() -> None:
        while (
            num_refused() == refused_before
        ):  # the first images are drawn alone, without malformed bodies between them
            await asyncio.sleep(0.1)
        replicas(server)[0].kill()

    async def killed_under_load():
        return await asyncio.gather(load(url, clients=32, seconds=40, num_images=8), kill())

    figures, _ = asyncio.run(killed_under_load())
    sys.stdout.write(json.dumps(figures))
    assert figures["wrong"] == []
    assert figures["images"] > 0
    assert {200, 400} <= figures["statuses"].keys() <= {200, 400, 429}
    assert "its request is repeated" in log.read_text()
    while {process.pid for process in replicas(server)} <= before:  # until the victim is replaced
        time.sleep(0.5)
