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

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Scope

from vfmtok_hf import DEFAULT_CHECKPOINT
from vfmtok_hf.pipelines.loading import load_pipeline
from vfmtok_hf.serving.app import (
    KEY_HEADER,
    UNAUTHORIZED,
    BodyLimit,
    add_errors,
    create_app,
    error_reply,
    is_authorized,
    list_of_models,
    name_of_model,
    unless_gone,
)
from vfmtok_hf.serving.engines import PAUSES, QueueFull, Unavailable
from vfmtok_hf.serving.requests import MAX_IMAGES, Body


logger = logging.getLogger(__name__)

DRAIN_SECONDS = 60
# What a replica needs to know of a request.
SCOPE = ("type", "method", "path", "root_path", "query_string", "headers")


class RayArguments(Body):
    """
    Arguments of [`build`].

    Args:
        model (`str`): pipeline folder or repository, which all nodes can read.
        replicas (`int`): number of servers, each with its own copy of the pipeline.
        max_batch_size (`int`): images that a replica generates at once. One with guidance counts twice.
        max_queue_size (`int`): requests that can wait for a replica. Further ones get status 429.
        api_key (`str`, *optional*): bearer token that clients must send. Defaults to `VFMTOK_API_KEY` where [`build`] runs.
        device, dtype (`str`): as in [`load_pipeline`].
        num_cpus (`float`), num_gpus (`float`): what Ray reserves for each replica. Unless `OMP_NUM_THREADS` is set, Ray sets it
            to `num_cpus`, rounded down and at least 1.
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
    """
    Handle one request in this process and yield what `app` sends. Closing the generator cancels the request.

    Raises:
        Exception: the error of `app` that left the answer incomplete.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    received = iter([{"type": "http.request", "body": body}])

    async def receive() -> Message:
        for message in received:
            return message
        return await asyncio.get_running_loop().create_future()  # a client that stays

    task = asyncio.ensure_future(app(scope, receive, sent.put))  # type: ignore[arg-type]
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        is_complete = False
        while (message := await sent.get()) is not None:
            yield message
            is_complete = is_last(message)
        if error := task.exception():
            if not is_complete:
                raise error
            logger.error("A request failed.", exc_info=error)  # answered with status 500
    finally:
        task.cancel()


def is_last(message: Message) -> bool:
    """Whether an ASGI message ends its answer."""
    return message["type"] == "http.response.body" and not message.get("more_body")


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
        pipe = load_pipeline(arguments.model, arguments.device, arguments.dtype, generates=True)
        # Ray bounds the queue, by requests. What it has admitted is never refused here.
        max_queue_size = MAX_IMAGES * num_ongoing_requests(arguments)
        model_name = name_of_model(arguments.model)
        self.app = create_app(pipe, model_name, arguments.max_batch_size, max_queue_size, arguments.api_key)
        await self.app.router.lifespan_context(self.app).__aenter__()

    async def respond(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages that answer a request."""
        async for message in messages_of(self.app, scope, body):
            yield message

    async def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises."""
        if not self.app.state.engine.is_running:
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
        model_name (`str`): name of the model in `/v1/models`.
        api_key (`str`, *optional*): bearer token that clients must send.
    """

    async def __init__(self, replicas: DeploymentHandle, model_name: str, api_key: str | None):  # type: ignore[misc]
        self.replicas, self.api_key = replicas.options(stream=True), api_key
        self.models_reply = list_of_models(model_name)
        await replicas.check_health.remote()  # waits for the first replica

    @routes.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether requests are accepted. Ray itself watches the replicas."""
        return {"status": "ok"}

    @routes.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """The model, at once."""
        if not is_authorized(request.scope, self.api_key):
            return error_reply(*UNAUTHORIZED)
        return JSONResponse(self.models_reply)

    @routes.get("/metrics")
    async def metrics(self) -> None:
        """A request would reach any one of the replicas."""
        raise HTTPException(404, "Ray exports the metrics of its nodes and deployments.")

    @routes.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(self, request: Request) -> Response:
        """Answer a request with the messages of a replica."""
        if not is_authorized(request.scope, self.api_key):
            return error_reply(*UNAUTHORIZED)
        scope = {name: request.scope[name] for name in SCOPE}
        if not request.headers.get(KEY_HEADER):
            # In front of an empty key, because the replica reads the first one.
            scope["headers"] = [(KEY_HEADER.encode(), uuid.uuid4().hex.encode()), *scope["headers"]]
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
        Yield the ASGI messages that answer a request. The start is held back until the first part of the body, which is the
        whole one unless events are streamed. A repeated request gives the same messages, so those that were already yielded
        are skipped.

        Raises:
            QueueFull: no replica is free, and the queue is full.
            Unavailable: all tries failed.
            RuntimeError: the answer to the repeated request begins differently, for example with an error.
        """
        started, num_yielded, is_complete = None, 0, False
        for pause in (0, *PAUSES):
            await asyncio.sleep(pause)
            answer, number = self.replicas.respond.remote(scope, body), 0
            try:
                start = await anext(answer)
                if start["status"] == 503:
                    continue
                if started not in (None, start):
                    raise RuntimeError("The answer to a repeated request begins differently.")
                async for message in answer:
                    if started is None:
                        yield (started := start)
                    if number == num_yielded:
                        yield message
                        num_yielded += 1
                    number += 1
                    is_complete = is_last(message)
            except BackPressureError as error:
                if started is None:
                    raise QueueFull("Too many requests are waiting.") from error
            except (RayActorError, RayTaskError) as error:
                logger.warning("A replica failed, its request is repeated: %s", error)
            finally:
                answer.cancel()
            if is_complete:
                return
        raise Unavailable("No replica could answer.")


def num_ongoing_requests(arguments: RayArguments) -> int:
    """Twice the batch: the next requests wait in the replica, and few are repeated if it dies."""
    return 2 * arguments.max_batch_size


def build(arguments: RayArguments) -> serve.Application:
    """
    Build the Ray Serve application. `serve run` and `serve deploy` call it.

    Args:
        arguments ([`RayArguments`]): the arguments.
    """
    num_ongoing = num_ongoing_requests(arguments)
    replicas = Replica.options(
        num_replicas=arguments.replicas,
        max_ongoing_requests=num_ongoing,
        max_queued_requests=arguments.max_queue_size,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
    ).bind(arguments)
    # Never the bottleneck, so that health checks and refusals need not wait.
    num_connections = 2 * (arguments.replicas * num_ongoing + arguments.max_queue_size)
    return FrontEnd.options(max_ongoing_requests=num_connections).bind(
        replicas, name_of_model(arguments.model), arguments.api_key
    )


__all__ = ["RayArguments", "build"]
