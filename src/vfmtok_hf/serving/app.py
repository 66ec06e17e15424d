"""The HTTP routes, as a FastAPI application."""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.serving.batcher import Batcher
from vfmtok_hf.serving.decoding import Drawing
from vfmtok_hf.serving.engines import Engine, EnginePool, QueueFull, TokenEngine, Unavailable
from vfmtok_hf.serving.requests import (
    MAX_IMAGES,
    HubRequest,
    ImageReply,
    ImagesRequest,
    SamplingParameters,
    TokensRequest,
    encode_image,
    from_base64,
    to_base64,
)


T = TypeVar("T")
R = TypeVar("R")

MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}  # otherwise the rest of a body would still be received
OPEN_ROUTES = ("/health", "/metrics")
UNAUTHORIZED = (401, "Send the server's key as `Authorization: Bearer KEY`.", {"WWW-Authenticate": "Bearer", **CLOSE})
# It determines the seed if the body has none, so that a repeated request gives the same images.
KEY_HEADER = "idempotency-key"
# Error types of OpenAI's API.
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_reply(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error reply in the format of OpenAI's API."""
    error = {"message": message, "type": ERROR_TYPES.get(status, "invalid_request_error"), "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


class BodyLimit:
    """
    ASGI middleware that refuses bodies that are large or never arrive.

    Args:
        app (`ASGIApp`): the wrapped application.
        max_bytes (`int`): size limit of a body.
        max_pause (`float`): seconds without a part of the body after which the request is refused.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES, max_pause: float = 30.0):
        self.app, self.max_bytes, self.max_pause = app, max_bytes, max_pause

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and watch its body."""
        num_bytes, is_complete = 0, False

        async def watched() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:  # what is left to receive is the disconnect
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.max_pause)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"The body paused for {self.max_pause} s.", CLOSE) from None
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes > self.max_bytes:
                raise HTTPException(413, self._too_large, CLOSE)
            return message

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif int(Headers(scope=scope).get("Content-Length", 0)) > self.max_bytes:
            await error_reply(413, self._too_large, CLOSE)(scope, receive, send)
        else:
            await self.app(scope, watched, send)

    @property
    def _too_large(self) -> str:
        return f"The body has more than {self.max_bytes} bytes."


def is_authorized(scope: Scope, api_key: str | None) -> bool:
    """Whether a request has the key, or needs none."""
    if api_key is None or scope["path"] in OPEN_ROUTES:
        return True
    scheme, _, given = Headers(scope=scope).get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(given.encode("latin-1"), api_key.encode())


class KeyCheck:
    """
    ASGI middleware that asks for a key before the body is read.

    Args:
        app (`ASGIApp`): the wrapped application.
        api_key (`str`, *optional*): bearer token that clients must send.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request with the key, and refuse others."""
        if scope["type"] == "http" and not is_authorized(scope, self.api_key):
            await error_reply(*UNAUTHORIZED)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class RequestCount:
    """
    ASGI middleware that counts requests by route and status.

    Args:
        app (`ASGIApp`): the wrapped application.
        counter (`Counter`): a counter with these two labels.
    """

    def __init__(self, app: ASGIApp, counter: Counter):
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and count its status."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                self.counter.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


class Metrics:
    """
    Prometheus metrics of a server.

    Args:
        engine (`Engine`): its engine.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter("vfmtok_requests", "Requests.", ["route", "status"], registry=self.registry)
        self.images = Counter("vfmtok_images", "Images generated.", registry=self.registry)
        self.seconds = Histogram(
            "vfmtok_image_seconds", "Seconds from the request to its images.", registry=self.registry,
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100),
        )  # fmt: skip
        waiting = Gauge("vfmtok_images_waiting", "Images that wait for a place in a batch.", registry=self.registry)
        waiting.set_function(lambda: engine.num_waiting)
        running = Gauge("vfmtok_images_running", "Images in a batch.", registry=self.registry)
        running.set_function(lambda: engine.num_running)


class Service:
    """
    The work behind the routes, independent of HTTP.

    Args:
        pipe ([`VFMTokPipeline`]): the pipeline, on its device.
        engine (`Engine`): generates images of that pipeline.
    """

    def __init__(self, pipe: VFMTokPipeline, engine: Engine):
        self.pipe, self.engine, self.metrics = pipe, engine, Metrics(engine)

    def drawings(
        self,
        labels: Sequence[str | int],
        parameters: SamplingParameters,
        key: str | None = None,
        num_images_per_label: int = 1,
    ) -> list[Drawing]:
        """
        The images of a request. Image i uses the request's seed + i. If there is none, `key` determines it, unless it is empty.

        Raises:
            ValueError: an unknown class, a setting out of range, or too many images.
        """
        class_ids = [class_id for class_id in self.pipe.get_label_ids(labels) for _ in range(num_images_per_label)]
        if len(class_ids) > MAX_IMAGES:
            raise ValueError(f"A request may have {MAX_IMAGES} images, got {len(class_ids)}.")
        settings = parameters.settings(self.pipe.transformer)
        seed = random.Random(key or None).getrandbits(31) if parameters.seed is None else parameters.seed
        return [Drawing(class_id, seed + number, settings) for number, class_id in enumerate(class_ids)]

    async def draw(self, drawings: list[Drawing]) -> list[PIL.Image.Image]:
        """Generate images. They are dropped if the calling task is canceled."""
        started = time.perf_counter()
        images = await self.engine.draw(drawings)
        self.metrics.images.inc(len(images))
        self.metrics.seconds.observe(time.perf_counter() - started)
        return images

    async def stream(
        self, drawing: Drawing, partial_images: int
    ) -> AsyncGenerator[tuple[int | None, PIL.Image.Image], None]:
        """Yield numbered partial images, and at the end None with the finished image."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()  # type: ignore[var-annotated]
        num_tokens = self.pipe.transformer.config.num_image_tokens
        parts = partial_images + 1
        drawing.partial_steps = tuple(num_tokens * part // parts for part in range(1, parts))
        drawing.on_partial = lambda *partial: loop.call_soon_threadsafe(arrived.put_nowait, partial)
        task = asyncio.create_task(self.draw([drawing]))
        task.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while (partial := await arrived.get()) is not None:
                yield partial
            (image,) = await task
            yield None, image
        finally:
            task.cancel()

    async def call_each(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """
        Results of `function` in the thread that decodes images. Items are separate calls: the result does not depend on the
        others, and images are generated in between.
        """
        return await asyncio.gather(*(self.engine.call(partial(function, item)) for item in items))


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "The client has disconnected.")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


def create_app(
    pipe: VFMTokPipeline,
    model_name: str,
    max_batch_size: int = 32,
    max_queue_size: int = 256,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    token_engines: Sequence[TokenEngine] = (),
) -> FastAPI:
    """
    Create the HTTP server of a pipeline. Do not use the pipeline elsewhere while the server runs.

    Args:
        pipe ([`VFMTokPipeline`]): the pipeline, on its device.
        model_name (`str`): name of the model in `/v1/models`.
        max_batch_size (`int`): images generated at once, with token engines by each. In this process, an image with guidance
            counts twice.
        max_queue_size (`int`): images that can wait. Further ones get status 429.
        api_key (`str`, *optional*): bearer token that clients must send.
        max_body_bytes (`int`): size limit of a request body. Larger ones get status 413.
        token_engines (`Sequence[TokenEngine]`, *optional*): where image tokens are generated instead of in this process.

    Raises:
        ValueError: the pipeline has no generator, the key is empty, or `max_batch_size` is below 2 (below 1 with token engines).
    """
    if api_key == "":
        raise ValueError("The API key is empty.")
    pipe.get_label_ids(0)  # raises without a generator
    if token_engines:
        engine: Engine = EnginePool(pipe, token_engines, max_batch_size, max_queue_size)
    else:
        engine = Batcher(pipe, max_batch_size, max_queue_size)
    service = Service(pipe, engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    # The documentation pages would load scripts from other sites.
    app = FastAPI(title="vfmtok serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(KeyCheck, api_key=api_key)
    app.add_middleware(RequestCount, counter=service.metrics.requests)
    app.state.engine = engine
    add_errors(app)
    add_monitoring(app, service)
    add_generation(app, service, model_name)
    return app


def name_of_model(name_or_path: str) -> str:
    """The repository, or the last part of a folder's path."""
    return Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path


def list_of_models(model_name: str) -> dict[str, Any]:
    """The reply of `/v1/models`."""
    model = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "vfmtok-hf"}
    return {"object": "list", "data": [model]}


def add_errors(app: FastAPI) -> None:
    """Reply to errors in the format of OpenAI's API."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        return error_reply(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        problems = [
            f"{'.'.join(map(str, problem['loc'][1:])) or 'body'}: {problem['msg']}" for problem in error.errors()
        ]
        return error_reply(400, "; ".join(problems))

    @app.exception_handler(ValueError)
    async def unusable(request: Request, error: ValueError) -> Response:
        return error_reply(400, " ".join(str(error).split()))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return error_reply(429, str(error), RETRY_AFTER)

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return error_reply(503, str(error), RETRY_AFTER)


def add_monitoring(app: FastAPI, service: Service) -> None:
    """Add `/health` and `/metrics`, which need no key."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.engine.is_running:
            raise HTTPException(503, "The server is shutting down.", RETRY_AFTER)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def add_generation(app: FastAPI, service: Service, model_name: str) -> None:
    """Add the routes that use the model."""
    config, models_reply = service.pipe.vq_model.config, list_of_models(model_name)

    def tokenize(image: bytes) -> list[int]:
        return service.pipe.tokenize(image)[0].tolist()

    def detokenize(image_tokens: list[int]) -> PIL.Image.Image:
        return service.pipe.detokenize([image_tokens])[0]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return models_reply

    @app.post("/v1/images/generations")
    async def generations(body: ImagesRequest, request: Request) -> Response:
        if body.model not in (None, model_name):
            raise HTTPException(404, f"There is no model {body.model!r}: this server has {model_name!r}.")
        reply = ImageReply(body, config.image_size, config.num_anchors)
        if body.size not in ("auto", reply.facts["size"]):
            raise ValueError(
                f"This model makes images of size {reply.facts['size']}, not {body.size}: leave size out."
            )
        drawings = service.drawings([body.prompt] * body.n, body, request.headers.get(KEY_HEADER))
        if body.stream:
            if body.n > 1:
                raise ValueError("A stream has one image: leave n out, or stream.")
            return await streamed(
                request, service.stream(drawings[0], body.partial_images), drawings[0].seed, body, reply
            )
        images = await unless_gone(request, service.draw(drawings))
        files = await asyncio.to_thread(lambda: [to_base64(image, body.output_format) for image in images])
        data = [{"b64_json": file, "seed": drawing.seed} for file, drawing in zip(files, drawings, strict=True)]
        return JSONResponse(reply.whole(data))

    @app.post("/")
    @app.post("/predict")
    async def predict(body: HubRequest, request: Request) -> Response:
        labels = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        key = request.headers.get(KEY_HEADER)
        drawings = service.drawings(labels, body.parameters, key, body.parameters.num_images_per_label)
        kind, _, image_format = request.headers.get("Accept", "").partition(";")[0].partition("/")
        if kind == "image" and len(drawings) > 1:
            raise ValueError("One image fits into an answer of type image: accept application/json for several.")
        images = await unless_gone(request, service.draw(drawings))
        if kind == "image":
            image_format = image_format if image_format in ("jpeg", "webp") else "png"
            content = await asyncio.to_thread(encode_image, images[0], image_format)
            return Response(content, media_type=f"image/{image_format}")
        files = await asyncio.to_thread(lambda: [to_base64(image, "png") for image in images])
        return JSONResponse(files[0] if len(files) == 1 else files)

    @app.post("/v1/tokens")
    async def tokens(body: TokensRequest, request: Request) -> Response:
        if (body.images is None) == (body.image_tokens is None):
            raise ValueError("Send images or image_tokens.")
        if body.images is not None:
            contents = [from_base64(image) for image in body.images]
            found = await unless_gone(request, service.call_each(tokenize, contents))
            return JSONResponse({"image_tokens": found})
        images = await unless_gone(request, service.call_each(detokenize, body.image_tokens))
        files = await asyncio.to_thread(lambda: [to_base64(image, body.output_format) for image in images])
        return JSONResponse({"data": [{"b64_json": file} for file in files]})


async def streamed(
    request: Request,
    growing: AsyncGenerator[tuple[int | None, PIL.Image.Image], None],
    seed: int,
    body: ImagesRequest,
    reply: ImageReply,
) -> Response:
    """Send partial images and the finished image as server-sent events. Errors before the first event set the status."""
    first = await unless_gone(request, anext(growing))

    async def events() -> AsyncIterator[str]:
        pending: tuple[int | None, PIL.Image.Image] | None = first
        try:
            while pending is not None:
                index, image = pending
                fields: dict[str, Any] = {"b64_json": await asyncio.to_thread(to_base64, image, body.output_format)}
                if index is None:
                    event = reply.event("completed", usage=reply.usage, seed=seed, **fields)
                else:
                    event = reply.event("partial_image", partial_image_index=index, **fields)
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                pending = await anext(growing, None)
        finally:
            await growing.aclose()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


__all__ = ["create_app"]
