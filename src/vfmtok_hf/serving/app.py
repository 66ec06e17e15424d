"""The HTTP routes, as a FastAPI application."""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import PIL.Image
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
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

MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER = {"Retry-After": "1"}
# It determines the seed if the body has none, so that a repeated request gives the same images.
KEY_HEADER = "idempotency-key"
# Error types of OpenAI's API.
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class BodyLimit:
    """
    ASGI middleware that refuses large bodies before they are read into memory.

    Args:
        app (`ASGIApp`): the wrapped application.
        max_bytes (`int`): size limit of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and count the bytes of its body."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                # Otherwise the rest of the body would still be received.
                close = {"Connection": "close"}
                raise HTTPException(413, f"The body has more than {self.max_bytes} bytes.", close)
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)


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
        engine (`Engine`): what generates its images.
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
        engine (`Engine`): what generates images of that pipeline.
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
        The images of a request. Image i uses the request's seed + i. If there is none, `key` determines it.

        Raises:
            ValueError: an unknown class, a setting out of range, or too many images.
        """
        class_ids = [class_id for class_id in self.pipe.get_label_ids(labels) for _ in range(num_images_per_label)]
        if len(class_ids) > MAX_IMAGES:
            raise ValueError(f"A request may have {MAX_IMAGES} images, got {len(class_ids)}.")
        settings = parameters.settings(self.pipe.transformer)
        seed = random.Random(key).getrandbits(31) if parameters.seed is None else parameters.seed
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


def error_reply(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error reply in the format of OpenAI's API."""
    error = {"message": message, "type": ERROR_TYPES.get(status, "invalid_request_error"), "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


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
        ValueError: the pipeline has no generator, or `max_batch_size` is below 2.
    """
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
    app.add_middleware(RequestCount, counter=service.metrics.requests)
    add_errors(app)

    def authorize(request: Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if api_key is not None and not (
            scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), api_key.encode())
        ):
            raise HTTPException(
                401, "Send the server's key as `Authorization: Bearer KEY`.", {"WWW-Authenticate": "Bearer"}
            )

    add_monitoring(app, service)
    add_generation(app, service, model_name, [Depends(authorize)])
    return app


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


def add_generation(app: FastAPI, service: Service, model_name: str, dependencies: list[Any]) -> None:
    """Add the routes that use the model."""
    config, started = service.pipe.vq_model.config, int(time.time())

    @app.get("/v1/models", dependencies=dependencies)
    async def models() -> dict[str, Any]:
        model = {"id": model_name, "object": "model", "created": started, "owned_by": "vfmtok-hf"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/images/generations", dependencies=dependencies)
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

    @app.post("/", dependencies=dependencies)
    @app.post("/predict", dependencies=dependencies)
    async def predict(body: HubRequest, request: Request) -> Response:
        labels = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        key = request.headers.get(KEY_HEADER)
        drawings = service.drawings(labels, body.parameters, key, body.parameters.num_images_per_label)
        images = await unless_gone(request, service.draw(drawings))
        kind, _, image_format = request.headers.get("Accept", "").partition(";")[0].partition("/")
        if kind == "image":
            if len(images) > 1:
                raise ValueError("One image fits into an answer of type image: accept application/json for several.")
            image_format = image_format if image_format in ("jpeg", "webp") else "png"
            content = await asyncio.to_thread(encode_image, images[0], image_format)
            return Response(content, media_type=f"image/{image_format}")
        files = await asyncio.to_thread(lambda: [to_base64(image, "png") for image in images])
        return JSONResponse(files[0] if len(files) == 1 else files)

    @app.post("/v1/tokens", dependencies=dependencies)
    async def tokens(body: TokensRequest, request: Request) -> Response:
        if (body.images is None) == (body.image_tokens is None):
            raise ValueError("Send images or image_tokens.")
        if body.images is not None:
            contents = [from_base64(image) for image in body.images]
            # One at a time, so the result does not depend on the other images.
            tokenize = service.pipe.tokenize
            found = await unless_gone(
                request, service.engine.call(lambda: [tokenize(image)[0].tolist() for image in contents])
            )
            return JSONResponse({"image_tokens": found})
        sequences, detokenize = body.image_tokens, service.pipe.detokenize
        images = await unless_gone(request, service.engine.call(lambda: [detokenize([row])[0] for row in sequences]))
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
