"""The thread that owns the model: it takes images from a queue into the running batch, and does other work between steps."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.serving.decoding import DecodeBatch, Drawing


logger = logging.getLogger(__name__)

# New images join at least every so many steps, and at once if the batch is empty. A RAR computes modulations anew then.
JOIN_INTERVAL = 16


class QueueFull(RuntimeError):
    """There is no room for another request: it may come again later."""


class Unavailable(RuntimeError):
    """The server shuts down, or a step of the model failed: a request may be repeated, here or elsewhere."""


class Batcher:
    """
    Generates images for any number of threads.

    Images are decoded to pixels one by one, since a batch of another size would round otherwise.

    Args:
        pipe (`VFMTokPipeline`): on its device.
        max_batch_size (`int`): images at once; an image with guidance counts twice.
        max_queue_size (`int`): images and other work that may wait.
    """

    def __init__(self, pipe: VFMTokPipeline, max_batch_size: int = 32, max_queue_size: int = 256):
        if max_batch_size < 2:
            raise ValueError(f"max_batch_size must be at least 2, the rows of a guided image, got {max_batch_size}.")
        self.pipe, self.max_queue_size = pipe, max_queue_size
        self.max_batch_size = max_batch_size
        self.waiting: deque[Drawing] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.num_running = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vfmtok-batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what was accepted, accept nothing else, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether it accepts requests."""
        return self._thread.is_alive() and not self._stopping

    def draw(self, drawings: Sequence[Drawing]) -> None:
        """
        Queue images, all or none. Their futures get the result.

        Raises:
            QueueFull, Unavailable: the images are not accepted.
        """
        self._accept(len(drawings), lambda: self.waiting.extend(drawings))

    def call(self, function: Callable[[], Any]) -> Future:
        """
        Have `function` called between two decode steps, by the thread that owns the model.

        Raises:
            QueueFull, Unavailable: it is not accepted.
        """
        future: Future = Future()
        self._accept(1, lambda: self.calls.append((function, future)))
        return future

    def _accept(self, count: int, enqueue: Callable[[], None]) -> None:
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise Unavailable("The server shuts down.")
            if len(self.waiting) + len(self.calls) + count > self.max_queue_size:
                raise QueueFull(f"{self.max_queue_size} images wait already.")
            enqueue()
            self._changed.notify()

    # -- the thread

    @torch.no_grad()
    def _run(self) -> None:
        batch, step = self._new_batch(), 0
        while self._wait_for_work(batch):
            try:
                self._drop_cancelled(batch)
                if step % JOIN_INTERVAL == 0 or not batch.drawings:
                    self._join(batch)
                self._do_call()
                if batch.drawings:
                    self._advance(batch)
                step += 1
            except Exception as error:
                logger.exception("A decode step failed; its images are given up.")
                for drawing in batch.drawings:
                    fail(drawing.future, Unavailable(f"Generation failed: {error}"))
                batch = self._new_batch()
            self.num_running = len(batch.drawings)

    def _new_batch(self) -> DecodeBatch:
        return DecodeBatch(self.pipe.transformer, self.max_batch_size)

    def _wait_for_work(self, batch: DecodeBatch) -> bool:
        """Wait until there is work. False if there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: batch.drawings or self.waiting or self.calls or self._stopping)
            return bool(batch.drawings or self.waiting or self.calls)

    def _drop_cancelled(self, batch: DecodeBatch) -> None:
        """Give up the images whose clients have gone."""
        if dropped := [drawing for drawing in batch.drawings if drawing.future.cancelled()]:
            batch.remove(dropped)
        with self._changed:
            self.waiting = deque(drawing for drawing in self.waiting if not drawing.future.cancelled())

    def _join(self, batch: DecodeBatch) -> None:
        """Take the images that have waited longest into the batch."""
        joining: list[Drawing] = []
        num_free = batch.max_rows - len(batch.rows)
        with self._changed:
            while self.waiting and self.waiting[0].num_rows <= num_free:
                joining.append(self.waiting.popleft())
                num_free -= joining[-1].num_rows
        if joining:
            batch.add(joining)

    def _do_call(self) -> None:
        """Do one piece of other work."""
        with self._changed:
            function, future = self.calls.popleft() if self.calls else (None, None)
        if function is not None and future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _advance(self, batch: DecodeBatch) -> None:
        """One decode step, and what it completes."""
        complete = batch.step()
        first = self.pipe.transformer.num_condition_tokens - 1
        for drawing in batch.drawings:
            if drawing.on_partial is not None and drawing.num_drawn - first in drawing.partial_steps:
                index = drawing.partial_steps.index(drawing.num_drawn - first)
                drawing.on_partial(index, self.pipe.detokenize(batch.image_tokens(drawing))[0])
        tokens = {drawing: batch.image_tokens(drawing) for drawing in complete}
        if complete:
            batch.remove(complete)
        for drawing, image_tokens in tokens.items():
            image = self.pipe.detokenize(image_tokens)[0]
            if drawing.future.set_running_or_notify_cancel():
                drawing.future.set_result(image)


def fail(future: Future, error: Exception) -> None:
    """Pass an error on, unless nobody waits any more."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


__all__ = ["Batcher", "QueueFull", "Unavailable"]
