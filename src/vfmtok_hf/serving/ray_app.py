"""
Replicas of the server on a [Ray](https://docs.ray.io) cluster, behind one front end.

    serve run vfmtok_hf.serving.ray_app:build model=you/vfmtok-pipeline replicas=4 num_gpus=1

Each replica runs the application of `vfmtok serve`. The front end passes requests on. If a replica dies, it repeats the
request on another one, with the same seed.
"""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Scope

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.cpu.programs import prepare_cpu_program
from vfmtok_hf.serving.app import (
    KEY_HEADER,
    UNAUTHORIZED,
    BodyLimit,
    add_errors,
    create_app,
    error_reply,
    is_authorized,
    unless_gone,
)
from vfmtok_hf.serving.engines import PAUSES, QueueFull, Unavailable
from vfmtok_hf.serving.requests import Body


logger = logging.getLogger(__name__)

DRAIN_SECONDS = 60


class RayArguments(Body):
    """
    Arguments of [`build`].

    Args:
        model (`str`): pipeline folder or repository, which all nodes can read.
        replicas (`int`): number of servers, each with its own copy of the pipeline.
        max_batch_size, max_queue_size, api_key: as in [`create_app`]. The queue is that of the whole application.
        device (`str`, *optional*): device of the pipelines. Defaults to the accelerator, if available.
        dtype (`str`): precision of the weights.
        num_cpus (`float`), num_gpus (`float`): what Ray reserves for each replica. On CPUs it is also the number of threads.
    """

    model: str = DEFAULT_CHECKPOINT
    replicas: int = Field(1, ge=1)
    max_batch_size: int = Field(32, ge=2)
    max_queue_size: int = Field(256, ge=1)
    api_key: str | None = Field(default_factory=lambda: os.environ.get("VFMTOK_API_KEY"))
    device: str | None = None
    dtype: str = "float32"
    num_cpus: float = 1
    num_gpus: float = 0


async def messages_of(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
    """Handle one request in this process and yield what `app` sends. Closing the generator cancels the request."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    received = iter([{"type": "http.request", "body": body}])

    async def receive() -> Message:
        for message in received:
            return message
        return await asyncio.get_running_loop().create_future()  # a client that stays

    task = asyncio.ensure_future(app(scope, receive, sent.put))  # type: ignore[arg-type]
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
        if error := task.exception():  # answered with status 500
            logger.error("A request failed.", exc_info=error)
    finally:
        task.cancel()


@serve.deployment(graceful_shutdown_timeout_s=DRAIN_SECONDS)
class Replica:
    """
    A pipeline and the application of `vfmtok serve`.

    Args:
        arguments ([`RayArguments`]): the arguments.
    """

    async def __init__(self, arguments: RayArguments):  # type: ignore[misc]
        if os.nice(0) > 0:
            logger.warning("This worker has niceness %d. Start Ray with RAY_worker_niceness=0.", os.nice(0))
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        pipe = VFMTokPipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(arguments.device or accelerator or "cpu")
        if pipe.device.type == "cpu":
            prepare_cpu_program(pipe.vq_model, pipe.transformer)
        model_name = Path(arguments.model).name if Path(arguments.model).is_dir() else arguments.model
        self.app = create_app(pipe, model_name, arguments.max_batch_size, arguments.max_queue_size, arguments.api_key)
        await self.app.router.lifespan_context(self.app).__aenter__()

    async def respond(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages that answer a request."""
        async for message in messages_of(self.app, scope, body):
            yield message

    async def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises."""
        scope = {"type": "http", "method": "GET", "path": "/health", "query_string": b"", "headers": []}
        async for message in self.respond(scope, b""):
            if message.get("status", 200) != 200:
                raise RuntimeError("The batcher has ended.")


routes = FastAPI(title="vfmtok serve", docs_url=None, redoc_url=None, openapi_url=None)
routes.add_middleware(BodyLimit)
add_errors(routes)


@serve.deployment(graceful_shutdown_timeout_s=DRAIN_SECONDS, ray_actor_options={"num_cpus": 0})
@serve.ingress(routes)
class FrontEnd:
    """
    Passes requests to replicas, and repeats those of replicas that die or shut down.

    Args:
        replicas (`DeploymentHandle`): the handle of [`Replica`].
        api_key (`str`, *optional*): bearer token that clients must send.
    """

    def __init__(self, replicas: DeploymentHandle, api_key: str | None):
        self.replicas, self.api_key = replicas.options(stream=True), api_key

    @routes.get("/metrics")
    async def metrics(self) -> None:
        """A request would reach any one of the replicas."""
        raise HTTPException(404, "Ray exports the metrics of its nodes and deployments.")

    @routes.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(self, request: Request) -> Response:
        """Answer a request with the messages of a replica."""
        if not is_authorized(request.scope, self.api_key):
            return error_reply(*UNAUTHORIZED)
        scope = {name: request.scope[name] for name in ("type", "method", "path", "query_string", "headers")}
        if KEY_HEADER not in request.headers:
            scope["headers"] = [*scope["headers"], (KEY_HEADER.encode(), uuid.uuid4().hex.encode())]
        messages = self.messages(scope, await request.body())
        start = await unless_gone(request, anext(messages))

        async def body() -> AsyncIterator[bytes]:
            try:
                async for message in messages:
                    yield message["body"]
            finally:
                await messages.aclose()

        response = StreamingResponse(body(), start["status"])
        response.raw_headers = start["headers"]
        return response

    async def messages(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """
        Yield the ASGI messages that answer a request. A repeated request gives the same messages, so those that were already
        yielded are skipped.

        Raises:
            QueueFull, Unavailable: no replica answered.
        """
        num_yielded = 0
        for pause in (0, *PAUSES):
            await asyncio.sleep(pause)
            answer, number = self.replicas.respond.remote(scope, body), 0
            try:
                async for message in answer:
                    if message.get("status") == 503:
                        break
                    if number == num_yielded:
                        yield message
                        num_yielded += 1
                    number += 1
                else:
                    return
            except BackPressureError as error:
                raise QueueFull("Too many requests are waiting.") from error
            except RayActorError as error:
                logger.warning("A replica died, its request is repeated: %s", error)
            finally:
                answer.cancel()
        raise Unavailable("No replica could answer.")


def build(arguments: RayArguments) -> serve.Application:
    """
    Build the Ray Serve application. `serve run` and `serve deploy` call it.

    Args:
        arguments ([`RayArguments`]): the arguments.
    """
    # Twice the batch: the next images wait in the replica, and few are repeated if it dies.
    num_ongoing = 2 * arguments.max_batch_size
    replicas = Replica.options(
        num_replicas=arguments.replicas,
        max_ongoing_requests=num_ongoing,
        max_queued_requests=arguments.max_queue_size,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
    ).bind(arguments)
    # Never the bottleneck, so that health checks and refusals need not wait.
    num_connections = 2 * (arguments.replicas * num_ongoing + arguments.max_queue_size)
    return FrontEnd.options(max_ongoing_requests=num_connections).bind(replicas, arguments.api_key)


__all__ = ["RayArguments", "build"]
