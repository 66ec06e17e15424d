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

from benchmarks.serving import load
from tests.pipelines.tiny_pipeline import tiny_pipeline
from tests.serving.servers import free_port, running
from tests.serving.test_app import Blocked, post
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cpu.programs import prepare_cpu_program
from vfmtok_hf.serving.app import create_app
from vfmtok_hf.serving.engines import QueueFull, Unavailable


pytest.importorskip("ray", reason="vfmtok-hf[ray] brings it")
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from vfmtok_hf.serving import ray_app


ROOT = Path(__file__).parents[2]
START = {"type": "http.response.start", "status": 200, "headers": []}
PARTS = [{"type": "http.response.body", "body": bytes([number])} for number in range(3)]


# -- the front end


class Answer:
    """What a replica yields. An exception among the messages is raised."""

    def __init__(self, messages):
        self.messages, self.is_cancelled = messages, False

    async def __aiter__(self):
        for message in self.messages:
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self):
        self.is_cancelled = True


def relayed(monkeypatch, *answers):
    """The messages of a front end whose replicas give these answers in turn."""
    monkeypatch.setattr(ray_app, "PAUSES", (0, 0, 0))
    waiting = [Answer(messages) for messages in answers]
    replicas = SimpleNamespace(respond=SimpleNamespace(remote=lambda scope, body: waiting.pop(0)))
    messages = ray_app.FrontEnd.func_or_class.messages(SimpleNamespace(replicas=replicas), {}, b"")

    async def collected():
        return [message async for message in messages]

    return asyncio.run(collected())


@pytest.mark.parametrize("num_sent", range(5))
def test_another_replica_continues_where_one_died(monkeypatch, num_sent):
    whole = [START, *PARTS]
    assert relayed(monkeypatch, [*whole[:num_sent], ActorDiedError()], whole) == whole


def test_a_replica_that_shuts_down_is_replaced(monkeypatch):
    assert relayed(monkeypatch, [{**START, "status": 503}, PARTS[0]], [START, PARTS[1]]) == [START, PARTS[1]]


def test_errors_of_the_request_are_not_repeated(monkeypatch):
    bad = [{**START, "status": 400}, PARTS[0]]
    assert relayed(monkeypatch, bad) == bad


def test_four_deaths_are_503_and_a_full_queue_is_429(monkeypatch):
    with pytest.raises(Unavailable):
        relayed(monkeypatch, *[[ActorDiedError()]] * 4)
    with pytest.raises(QueueFull):
        relayed(monkeypatch, [BackPressureError(1, 1)])


# -- a replica


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
    """Address and process of `serve run` with two replicas."""
    config = yaml.safe_load((ROOT / "serving" / "ray.yaml").read_text())
    with free_port() as probe:
        config["http_options"]["port"] = port = probe.getsockname()[1]
    config["applications"][0]["args"] = {"replicas": 2, "max_batch_size": 8, "num_cpus": 0.5}
    file = tmp_path_factory.mktemp("ray") / "ray.yaml"
    file.write_text(yaml.safe_dump(config))
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    command = [Path(sys.executable).with_name("serve"), "run", file]
    process = subprocess.Popen(command, env={**os.environ, **settings})
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_healthy(url):
            assert process.poll() is None
            time.sleep(0.5)
        yield url, psutil.Process(process.pid)
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
    url, _ = on_ray
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
    url, server = on_ray

    async def kill() -> int:
        await asyncio.sleep(15)  # the first images are drawn alone
        victim = replicas(server)[0]
        victim.kill()
        return victim.pid

    async def killed_under_load():
        return await asyncio.gather(load(url, clients=32, seconds=40, num_images=8), kill())

    figures, victim = asyncio.run(killed_under_load())
    sys.stdout.write(json.dumps(figures))
    assert figures["wrong"] == []
    assert figures["images"] > 0
    assert {200, 400} <= figures["statuses"].keys() <= {200, 400, 429}
    assert victim not in {process.pid for process in replicas(server)}
