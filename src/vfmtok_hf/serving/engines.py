"""
Engines: what generates the images of a server.

[`Batcher`] is one, in this process. [`EnginePool`] is another: it asks servers for the image tokens, such as vLLM's, and decodes
the tokens to pixels in this process.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    """What generates the images of a server. Its methods are called in one event loop."""

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
        """

    async def call(self, function: Callable[[], T]) -> T:
        """
        Call `function` in the thread that decodes images, and return its result.

        Raises:
            QueueFull, Unavailable: the call is not accepted.
        """


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
            ValueError: no engine of this kind supports `settings`.
        """

    async def close(self) -> None:
        """Close the connections."""


class VLLMEngine:
    """
    A vLLM server with the plugin `vfmtok-vllm`, started with `--tokens-only`.

    Args:
        url (`str`): its address.
        generator ([`VFMTokARForImageGeneration`] or [`VFMTokRARForImageGeneration`]): its model. The weights are not used.
        timeout (`float`): seconds after which an image counts as failed.
    """

    def __init__(self, url: str, generator: Generator, timeout: float = 120.0):
        self.url, self.config = url, generator.config
        self.num_condition_tokens = generator.num_condition_tokens
        # The server applies guidance at its start, and one schedule to all requests.
        self.guidance_scales = self._scales(generator.sampling_settings.resolve({}, generator.generation_config))
        # The pool bounds the connections. Idle ones end before the server closes them, after 5 seconds.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self.client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(timeout, connect=5.0), limits=limits)

    def _scales(self, settings: SamplingSettings) -> list[float]:
        return settings.guidance_scales(self.config.num_image_tokens)

    async def draw(self, label: int, seed: int, settings: SamplingSettings) -> list[int]:
        """Arguments, result and errors as in [`TokenEngine.draw`]."""
        if self._scales(settings) != self.guidance_scales:
            raise ValueError(
                "This server's engines have one guidance scale, the checkpoint's: leave guidance_scale out."
            )
        try:
            reply = await self.client.post("/inference/v1/generate", json=self._body(label, seed, settings))
            reply.raise_for_status()
            tokens = reply.json()["choices"][0]["token_ids"]
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            raise TokenEngineError(f"{self.url}: {error or type(error).__name__}") from error
        expected = self.config.num_image_tokens
        if len(tokens) != expected or not all(0 <= token < self.config.codebook_size for token in tokens):
            raise TokenEngineError(f"{self.url}: its tokens are not {expected} of this model's codebook.")
        return tokens

    def _body(self, label: int, seed: int, settings: SamplingSettings) -> dict[str, Any]:
        num_tokens = self.config.num_image_tokens
        sampling = {
            "seed": seed,
            "temperature": settings.temperature if settings.do_sample else 0.0,
            "top_k": settings.top_k,
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


class Member:
    """
    A token engine of a pool.

    Args:
        engine (`TokenEngine`).
    """

    def __init__(self, engine: TokenEngine):
        self.engine = engine
        self.num_running = 0
        self.rests_until = 0.0  # by time.monotonic()

    async def draw(self, drawing: Drawing) -> list[int]:
        """Generate the tokens of `drawing`, counted as running. An engine that fails rests for a while."""
        self.num_running += 1
        try:
            return await self.engine.draw(drawing.label, drawing.seed, drawing.settings)
        except TokenEngineError:
            self.rests_until = time.monotonic() + REST_SECONDS
            raise
        finally:
            self.num_running -= 1


class EnginePool:
    """
    Generates image tokens on the least busy of several token engines, and decodes them in this process.

    A failed image is tried again, preferably elsewhere and with the same seed, up to three times with growing
    pauses. Tokens are decoded to pixels one image at a time, because rounding differs between batch sizes. There are no partial
    images.

    Args:
        pipe ([`VFMTokPipeline`]): the pipeline. Its generator's weights are not used.
        token_engines (`Sequence[TokenEngine]`): engines with the pipeline's generator.
        max_batch_size (`int`): images that one engine generates at once.
        max_queue_size (`int`): images and calls that can wait.
    """

    def __init__(
        self,
        pipe: VFMTokPipeline,
        token_engines: Sequence[TokenEngine],
        max_batch_size: int = 32,
        max_queue_size: int = 256,
    ):
        self.pipe, self.max_queue_size = pipe, max_queue_size
        self.members = [Member(engine) for engine in token_engines]
        self.num_places = max_batch_size * len(self.members)
        self.num_accepted = 0
        self.is_running = False
        self._places = asyncio.Semaphore(self.num_places)
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
        """Refuse work and close the connections. The server has finished its requests."""
        self.is_running = False
        for member in self.members:
            await member.engine.close()
        self._decoder.shutdown()

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
        if self.num_accepted + count > self.num_places + self.max_queue_size:
            raise QueueFull(f"The queue is full: {self.max_queue_size} images are waiting.")
        self.num_accepted += count
        try:
            yield
        finally:
            self.num_accepted -= count

    async def _image(self, drawing: Drawing) -> PIL.Image.Image:
        async with self._places:
            tokens = await self._tokens(drawing)
        return await self._decode(lambda: self.pipe.detokenize([tokens])[0])

    async def _tokens(self, drawing: Drawing) -> list[int]:
        """
        Raises:
            Unavailable: the last try failed as well.
        """
        for pause in PAUSES:
            try:
                return await self._next_member().draw(drawing)
            except TokenEngineError as error:
                logger.warning("Seed %d of class %d is tried again. %s", drawing.seed, drawing.label, error)
            await asyncio.sleep(pause)
        try:
            return await self._next_member().draw(drawing)
        except TokenEngineError as error:
            raise Unavailable(f"Generation failed: {error}") from error

    def _next_member(self) -> Member:
        """The least busy engine that does not rest. If all do, the one that failed first."""
        now = time.monotonic()
        return min(self.members, key=lambda member: (max(member.rests_until, now), member.num_running))

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
    "without_weights",
]
