"""
An engine generates the images of a server.

[`Batcher`] generates them in this process. [`EnginePool`] requests image tokens from other servers, such as vLLM's, and decodes
them to pixels in this process.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx
import PIL.Image
import torch
from transformers import AutoConfig, AutoModel, GenerationConfig

from vfmtok_hf.modeling.generation_vfmtok import SamplingSettings
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.serving.decoding import Drawing


logger = logging.getLogger(__name__)

Generator = VFMTokARForImageGeneration | VFMTokRARForImageGeneration
T = TypeVar("T")

# Seconds before a failed image is tried again.
PAUSES = (0.25, 1.0, 4.0)
# Seconds for which others are preferred to a token engine that failed.
REST_SECONDS = 10.0


class QueueFull(RuntimeError):
    """The queue is full. The request can be sent again later."""


class Unavailable(RuntimeError):
    """The server is shutting down, or generation failed. The request can be sent again, here or to another server."""


class Engine(Protocol):
    """Generates the images of a server. Its methods are called in one event loop."""

    @property
    def is_running(self) -> bool:
        """Whether new work is accepted."""

    @property
    def num_waiting(self) -> int:
        """Accepted images that are not being generated yet."""

    @property
    def num_running(self) -> int:
        """Images that are being generated."""

    async def start(self) -> None:
        """Accept work."""

    async def stop(self) -> None:
        """Finish the accepted work. New work is refused."""

    async def draw(self, drawings: Sequence[Drawing]) -> list[PIL.Image.Image]:
        """
        Generate the images of `drawings`, in their order. They are dropped if the calling task is canceled.

        Raises:
            QueueFull, Unavailable: the images are not accepted, or could not be generated.
            ValueError: there are more images than the engine ever accepts, or it does not support their settings.
        """

    async def call(self, function: Callable[[], T]) -> T:
        """
        Call `function` in the thread that decodes images, and return its result.

        Raises:
            QueueFull, Unavailable: the call is not accepted.
        """


def check_capacity(count: int, num_accepted: int, capacity: int) -> None:
    """
    Check that an engine of `capacity` images, which has `num_accepted`, can accept `count` more.

    Raises:
        ValueError: it never can.
        QueueFull: it can later.
    """
    if count > capacity:
        raise ValueError(f"This server accepts up to {capacity} images at once, not {count}.")
    if num_accepted + count > capacity:
        raise QueueFull("The queue is full.")


# ---------------------------------------------------------------------------------------------------------------
# Engines elsewhere


def without_weights(name_or_path: str) -> Generator:
    """The generator of the pipeline `name_or_path`, a folder or repository, with its settings and on the meta device."""
    config = AutoConfig.from_pretrained(name_or_path, subfolder="transformer")
    with torch.device("meta"):
        generator = AutoModel.from_config(config)
    generator.generation_config = GenerationConfig.from_pretrained(name_or_path, subfolder="transformer")
    return generator


class TokenEngineError(RuntimeError):
    """A token engine gave no image tokens. Another one may."""


class TokenEngine(Protocol):
    """A server of image tokens. The tokens of a seed are the same on every engine of a pool."""

    async def draw(self, label: int, seed: int, settings: SamplingSettings) -> list[int]:
        """
        Generate one image of class `label` with `seed` and `settings`. Return its image tokens in raster order. Equal arguments
        give equal tokens.

        Raises:
            TokenEngineError: the engine gave none.
            ValueError: the engine does not support `settings`. Others of the pool do not either.
        """

    async def close(self) -> None:
        """Close the connections."""


class VLLMEngine:
    """
    A vLLM server with the plugin `vfmtok-vllm`, started with `--tokens-only`.

    Args:
        url (`str`): its address.
        generator ([`VFMTokARForImageGeneration`] or [`VFMTokRARForImageGeneration`]): its model. The weights are not used.
        timeout (`float`): seconds from the request to the last byte of the answer after which an image counts as failed.
    """

    def __init__(self, url: str, generator: Generator, timeout: float = 120.0):
        self.url, self.config, self.timeout = url, generator.config, timeout
        self.num_condition_tokens = generator.num_condition_tokens
        # The server applies guidance at its start, and one schedule to all requests.
        self.guidance_scales = self._scales(generator.sampling_settings.resolve({}, generator.generation_config))
        # The pool bounds the connections. Idle ones end before the server closes them, after 5 seconds.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self.client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(None, connect=5.0), limits=limits)

    def _scales(self, settings: SamplingSettings) -> list[float]:
        return settings.guidance_scales(self.config.num_image_tokens)

    async def draw(self, label: int, seed: int, settings: SamplingSettings) -> list[int]:
        """Arguments, result and errors as in [`TokenEngine.draw`]."""
        if self._scales(settings) != self.guidance_scales:
            raise ValueError(
                "This server's engines have one guidance scale, the checkpoint's: leave guidance_scale out."
            )
        request = self.client.post("/inference/v1/generate", json=self._body(label, seed, settings))
        try:
            reply = await asyncio.wait_for(request, self.timeout)
        except (httpx.HTTPError, asyncio.TimeoutError) as error:
            raise TokenEngineError(f"{self.url}: {error!r}") from error
        if reply.status_code in (400, 422):
            logger.warning("%s refused a request: %s", self.url, reply.text)
            raise ValueError("The engines refuse these settings.")
        return self._tokens(reply)

    def _tokens(self, reply: httpx.Response) -> list[int]:
        num_tokens, codebook = self.config.num_image_tokens, range(self.config.codebook_size)
        try:
            tokens = reply.raise_for_status().json()["choices"][0]["token_ids"]
            if len(tokens) != num_tokens or not all(type(token) is int and token in codebook for token in tokens):
                raise ValueError(f"its tokens are not {num_tokens} of this model's codebook")
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            raise TokenEngineError(f"{self.url}: {error!r}") from error
        return tokens

    def _body(self, label: int, seed: int, settings: SamplingSettings) -> dict[str, Any]:
        num_tokens = self.config.num_image_tokens
        sampling = {
            "seed": seed,
            "temperature": settings.temperature if settings.do_sample else 0.0,
            "top_k": min(settings.top_k, self.config.codebook_size),
            "top_p": settings.top_p,
            "min_tokens": num_tokens,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "detokenize": False,
        }
        # The plugin's vocabulary: image tokens, then classes.
        prompt = [self.config.codebook_size + label] * self.num_condition_tokens
        return {"token_ids": prompt, "sampling_params": sampling}

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()


@dataclass
class Member:
    """
    A token engine of a pool.

    Args:
        engine (`TokenEngine`): the engine.
        num_running (`int`): images that it generates.
        rests_until (`float`): end of its rest, by `time.monotonic()`.
    """

    engine: TokenEngine
    num_running: int = 0
    rests_until: float = 0.0

    @property
    def is_resting(self) -> bool:
        """Whether it failed a short time ago."""
        return time.monotonic() < self.rests_until


class EnginePool:
    """
    Generates image tokens on the least busy of several token engines, and decodes them in this process.

    An engine that fails rests: it gets images only while all engines rest. The failed image is tried again with the same seed, up
    to three times with growing pauses. Tokens are decoded to pixels one image at a time, because rounding differs between batch
    sizes. There are no partial images.

    Args:
        pipe ([`VFMTokPipeline`]): the pipeline. Its generator's weights are not used.
        token_engines (`Sequence[TokenEngine]`): engines with the pipeline's generator.
        max_batch_size (`int`): images that one engine generates at once.
        max_queue_size (`int`): images and calls that can wait.

    Raises:
        ValueError: `max_batch_size` is below 1.
    """

    def __init__(
        self,
        pipe: VFMTokPipeline,
        token_engines: Sequence[TokenEngine],
        max_batch_size: int = 32,
        max_queue_size: int = 256,
    ):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}.")
        self.pipe, self.max_batch_size = pipe, max_batch_size
        self.members = [Member(engine) for engine in token_engines]
        self.capacity = max_batch_size * len(self.members) + max_queue_size
        self.num_accepted = 0
        self.is_running = False
        self._turn = asyncio.Lock()
        self._changed, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._decoder = ThreadPoolExecutor(1, "vfmtok-decoder")

    @property
    def num_running(self) -> int:
        """Images that the engines generate."""
        return sum(member.num_running for member in self.members)

    @property
    def num_waiting(self) -> int:
        """Accepted images and calls that no engine works on."""
        return self.num_accepted - self.num_running

    async def start(self) -> None:
        """Accept work."""
        self.is_running = True

    async def stop(self) -> None:
        """Finish the accepted work and close the connections. New work is refused."""
        self.is_running = False
        await self._idle.wait()
        for member in self.members:
            await member.engine.close()
        await asyncio.to_thread(self._decoder.shutdown)

    async def draw(self, drawings: Sequence[Drawing]) -> list[PIL.Image.Image]:
        """Arguments, result and errors as in [`Engine.draw`]."""
        with self._accepted(len(drawings)):
            tasks = [asyncio.create_task(self._image(drawing)) for drawing in drawings]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()  # if another one failed

    async def call(self, function: Callable[[], T]) -> T:
        """Arguments, result and errors as in [`Engine.call`]."""
        with self._accepted(1):
            return await self._decode(function)

    @contextmanager
    def _accepted(self, count: int) -> Iterator[None]:
        if not self.is_running:
            raise Unavailable("The server is shutting down.")
        check_capacity(count, self.num_accepted, self.capacity)
        self.num_accepted += count
        self._idle.clear()
        try:
            yield
        finally:
            self.num_accepted -= count
            if self.num_accepted == 0:
                self._idle.set()

    async def _image(self, drawing: Drawing) -> PIL.Image.Image:
        tokens = await self._tokens(drawing)
        return await self._decode(lambda: self.pipe.detokenize([tokens])[0])

    async def _tokens(self, drawing: Drawing) -> list[int]:
        """
        Raises:
            Unavailable: the last try failed as well.
        """
        for pause in (0.0, *PAUSES):
            await asyncio.sleep(pause)
            try:
                async with self._engine() as engine:
                    return await engine.draw(drawing.label, drawing.seed, drawing.settings)
            except TokenEngineError as error:
                logger.warning("An image of class %d with seed %d failed. %s", drawing.label, drawing.seed, error)
        raise Unavailable("No engine generated the image.")

    @asynccontextmanager
    async def _engine(self) -> AsyncIterator[TokenEngine]:
        """
        A place on the least busy engine that does not rest. If all rest, on the least busy one. Images wait for places in the
        order of their arrival.
        """
        async with self._turn:
            while (member := self._next_member()).num_running >= self.max_batch_size:
                self._changed.clear()
                await self._changed.wait()
            member.num_running += 1
        try:
            yield member.engine
        except TokenEngineError:
            member.rests_until = time.monotonic() + REST_SECONDS
            asyncio.get_running_loop().call_later(REST_SECONDS, self._changed.set)
            raise
        finally:
            member.num_running -= 1
            self._changed.set()

    def _next_member(self) -> Member:
        # Of equally busy engines, the one that failed least recently.
        return min(self.members, key=lambda member: (member.is_resting, member.num_running, member.rests_until))

    async def _decode(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoder, function)


__all__ = [
    "Engine",
    "EnginePool",
    "QueueFull",
    "TokenEngine",
    "TokenEngineError",
    "Unavailable",
    "VLLMEngine",
    "check_capacity",
    "without_weights",
]
