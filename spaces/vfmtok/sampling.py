"""Generate images from class labels, and show them while they grow."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import PIL.Image
import torch

from model import GRID_SIZE, NUM_TOKENS, PIPE
from settings import Settings


QUICK_SECONDS = 2


@dataclass(frozen=True)
class Generation:
    """Images, possibly unfinished."""

    images: list[PIL.Image.Image]
    tokens_generated: int  # per image
    seconds: float  # of sampling, without decoding tokens to images

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all images per second."""
        return len(self.images) * self.tokens_generated / self.seconds


class Stopwatch:
    """Sum of the seconds between `start` and `pause`, including pending work of a GPU."""

    def __init__(self):
        self.seconds = 0.0

    def start(self) -> None:
        """Start or continue."""
        self.started = time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        if PIPE.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.started


@cache
def blank_tokens() -> torch.Tensor:
    """Image tokens of a white image, `(num_tokens,)`."""
    return PIPE.tokenize(PIL.Image.new("RGB", (64, 64), "white"))[0]


def decode_unfinished(image_tokens: torch.Tensor, tokens_generated: int) -> list[PIL.Image.Image]:
    """Decode `(batch_size, num_tokens)` image tokens, with blank tokens after the first `tokens_generated`."""
    blank = blank_tokens().expand_as(image_tokens)
    return PIPE.detokenize(torch.cat([image_tokens[:, :tokens_generated], blank[:, tokens_generated:]], dim=1))


def sample(settings: Settings, callback: Callable[[int, torch.Tensor], bool | None] | None = None) -> torch.Tensor:
    """
    Sample image tokens `(images, num_tokens)`. Image i depends only on `seed + i`, not on other images or visitors.
    """
    return PIPE.transformer.generate(
        torch.full((settings.images,), settings.class_id, device=PIPE.transformer.device),
        guidance_scale=settings.guidance,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        generator=[torch.Generator().manual_seed(settings.seed + image) for image in range(settings.images)],
        callback=callback,
    )


def generate_stepwise(settings: Settings) -> Iterator[Generation]:
    """
    Yield the images after each row of tokens. Closing the iterator stops sampling.

    Sampling calls back and the page iterates, so sampling runs in a thread.
    """
    generations: queue.SimpleQueue[Generation | None] = queue.SimpleQueue()
    stopped = threading.Event()
    watch = Stopwatch()

    def on_token(step: int, image_tokens: torch.Tensor) -> bool:
        tokens_generated = step + 1
        if tokens_generated % GRID_SIZE == 0 or tokens_generated == NUM_TOKENS:
            watch.pause()
            generations.put(
                Generation(decode_unfinished(image_tokens, tokens_generated), tokens_generated, watch.seconds)
            )
            watch.start()
        return not stopped.is_set()

    with ThreadPoolExecutor(max_workers=1) as executor:
        watch.start()
        sampling = executor.submit(sample, settings, on_token)
        sampling.add_done_callback(lambda _: generations.put(None))
        try:
            while (generation := generations.get()) is not None:
                yield generation
        finally:
            stopped.set()
        sampling.result()


def generate_at_once(settings: Settings) -> Generation:
    """Generate the images without intermediate steps, for timing. Short ones are timed twice, because others may compute too."""
    # Warm-up: the first steps of a process or of a batch size take longer.
    sample(settings, callback=lambda step, image_tokens: step < 2)
    image_tokens, seconds = timed_sample(settings)
    if seconds < QUICK_SECONDS:
        seconds = min(seconds, timed_sample(settings)[1])
    return Generation(PIPE.detokenize(image_tokens), NUM_TOKENS, seconds)


def timed_sample(settings: Settings) -> tuple[torch.Tensor, float]:
    """Image tokens as of `sample`, and the seconds that they took."""
    watch = Stopwatch()
    watch.start()
    image_tokens = sample(settings)
    watch.pause()
    return image_tokens, watch.seconds
