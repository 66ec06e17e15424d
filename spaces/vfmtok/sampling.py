"""Class labels to pictures, shown while they grow."""

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


@dataclass(frozen=True)
class Generation:
    """Pictures as far as they are generated."""

    pictures: list[PIL.Image.Image]
    tokens_generated: int  # of each picture
    seconds: float  # spent on sampling tokens; turning them into pictures is not counted

    @property
    def tokens_per_second(self) -> float:
        """Over all pictures."""
        return len(self.pictures) * self.tokens_generated / self.seconds


class Stopwatch:
    """Seconds between `start` and `pause`, added up. A GPU's pending work is waited for and counted."""

    def __init__(self):
        self.seconds = 0.0

    def start(self) -> None:
        """Go on."""
        self.started = time.perf_counter()

    def pause(self) -> None:
        """Leave out what follows."""
        if PIPE.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.started


@cache
def blank_tokens() -> torch.Tensor:
    """Image tokens of a white picture, `(num_tokens,)`: what is not known yet looks like paper."""
    return PIPE.tokenize(PIL.Image.new("RGB", (64, 64), "white"))[0]


def decode_on_paper(image_tokens: torch.Tensor, tokens_generated: int) -> list[PIL.Image.Image]:
    """Pictures of `(batch_size, num_tokens)` image tokens of which the first `tokens_generated` are known."""
    paper = blank_tokens().expand_as(image_tokens)
    return PIPE.detokenize(torch.cat([image_tokens[:, :tokens_generated], paper[:, tokens_generated:]], dim=1))


def sample(settings: Settings, callback: Callable[[int, torch.Tensor], bool | None] | None = None) -> torch.Tensor:
    """
    Image tokens `(images, num_tokens)`. Picture i depends on `seed + i` alone, not on the others nor on other visitors.
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
    Pictures after each row of tokens, whole at the end. Closing the iterator stops the sampling.

    Sampling pushes tokens and a page pulls pictures, hence the thread between them.
    """
    generations: queue.SimpleQueue[Generation | None] = queue.SimpleQueue()
    stopped = threading.Event()
    watch = Stopwatch()

    def on_token(step: int, image_tokens: torch.Tensor) -> bool:
        tokens_generated = step + 1
        if tokens_generated % GRID_SIZE == 0 or tokens_generated == NUM_TOKENS:
            watch.pause()
            generations.put(
                Generation(decode_on_paper(image_tokens, tokens_generated), tokens_generated, watch.seconds)
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
    """The same pictures, timed without pauses."""
    watch = Stopwatch()
    # What the first steps of a process or of a batch size set up is not the time of generation.
    sample(settings, callback=lambda step, image_tokens: step < 2)
    watch.start()
    image_tokens = sample(settings)
    watch.pause()
    return Generation(PIPE.detokenize(image_tokens), NUM_TOKENS, watch.seconds)
