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
class Drawing:
    """Pictures as far as they are drawn."""

    pictures: list[PIL.Image.Image]
    tokens_drawn: int  # of each picture
    seconds: float  # spent on sampling tokens; turning them into pictures is not counted

    @property
    def tokens_per_second(self) -> float:
        """Over all pictures."""
        return len(self.pictures) * self.tokens_drawn / self.seconds


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
    """Image tokens of a white picture, `(num_tokens,)`: what is not drawn yet looks like paper."""
    return PIPE.tokenize(PIL.Image.new("RGB", (64, 64), "white"))[0]


def draw_on_paper(image_tokens: torch.Tensor, tokens_drawn: int) -> list[PIL.Image.Image]:
    """Pictures of `(batch_size, num_tokens)` image tokens of which the first `tokens_drawn` are known."""
    paper = blank_tokens().expand_as(image_tokens)
    return PIPE.detokenize(torch.cat([image_tokens[:, :tokens_drawn], paper[:, tokens_drawn:]], dim=1))


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


def draw(settings: Settings) -> Iterator[Drawing]:
    """
    Pictures after each row of tokens, whole at the end. Closing the iterator stops the sampling.

    Sampling pushes tokens and a page pulls pictures, hence the thread between them.
    """
    drawings: queue.SimpleQueue[Drawing | None] = queue.SimpleQueue()
    stopped = threading.Event()
    watch = Stopwatch()

    def on_token(step: int, image_tokens: torch.Tensor) -> bool:
        tokens_drawn = step + 1
        if tokens_drawn % GRID_SIZE == 0 or tokens_drawn == NUM_TOKENS:
            watch.pause()
            drawings.put(Drawing(draw_on_paper(image_tokens, tokens_drawn), tokens_drawn, watch.seconds))
            watch.start()
        return not stopped.is_set()

    with ThreadPoolExecutor(max_workers=1) as executor:
        watch.start()
        sampling = executor.submit(sample, settings, on_token)
        sampling.add_done_callback(lambda _: drawings.put(None))
        try:
            while (drawing := drawings.get()) is not None:
                yield drawing
        finally:
            stopped.set()
        sampling.result()


def draw_at_once(settings: Settings) -> Drawing:
    """The same pictures, timed without pauses."""
    watch = Stopwatch()
    # What the first steps of a process or of a batch size set up is not the time of drawing.
    sample(settings, callback=lambda step, image_tokens: step < 2)
    watch.start()
    image_tokens = sample(settings)
    watch.pause()
    return Drawing(PIPE.detokenize(image_tokens), NUM_TOKENS, watch.seconds)
