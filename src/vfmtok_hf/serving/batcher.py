"""The thread that runs the model. It moves images from a bounded queue to the running batch."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import PIL.Image
import torch

from vfmtok_hf.pipelines import VFMTokPipeline
from vfmtok_hf.serving.decoding import DecodeBatch, Drawing
from vfmtok_hf.serving.engines import Unavailable, check_capacity


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Images join the running batch at multiples of this many steps, and an empty batch immediately. Each time, RAR recomputes
# modulations.
JOIN_INTERVAL = 16


class Batcher:
    """
    The [`Engine`] of one process and one device.

    Tokens are decoded to pixels one image at a time, because rounding differs between batch sizes.

    Args:
        pipe ([`VFMTokPipeline`]): the pipeline, on its device.
        max_batch_size (`int`): images generated at once. An image with guidance counts twice.
        max_queue_size (`int`): images and calls that can wait.

    Raises:
        ValueError: `max_batch_size` is below 2, so a guided image would not fit.
    """

    def __init__(self, pipe: VFMTokPipeline, max_batch_size: int = 32, max_queue_size: int = 256):
        if max_batch_size < 2:
            raise ValueError(f"max_batch_size must be at least 2, the rows of a guided image, got {max_batch_size}.")
        self.pipe, self.max_queue_size = pipe, max_queue_size
        self.max_batch_size = max_batch_size
        self.waiting: deque[Drawing] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.batch = self._new_batch()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vfmtok-batcher", daemon=True)

    async def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Finish the accepted work and end the thread. New work is refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    @property
    def is_running(self) -> bool:
        """Whether new work is accepted."""
        return self._thread.is_alive() and not self._stopping

    @property
    def num_waiting(self) -> int:
        """Images that wait for a place in the batch."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Images in the batch."""
        return len(self.batch.drawings)

    async def draw(self, drawings: Sequence[Drawing]) -> list[PIL.Image.Image]:
        """Arguments, result and errors as in [`Engine.draw`]."""
        self._accept(len(drawings), lambda: self.waiting.extend(drawings))
        try:
            return await asyncio.gather(*(asyncio.wrap_future(drawing.future) for drawing in drawings))
        finally:
            for drawing in drawings:
                drawing.future.cancel()  # if another one failed

    async def call(self, function: Callable[[], T]) -> T:
        """Arguments, result and errors as in [`Engine.call`]. The call happens between two decode steps."""
        future: Future[T] = Future()
        self._accept(1, lambda: self.calls.append((function, future)))
        return await asyncio.wrap_future(future)

    def _accept(self, count: int, enqueue: Callable[[], None]) -> None:
        with self._changed:
            if not self.is_running:
                raise Unavailable("The server is shutting down.")
            check_capacity(count, len(self.waiting) + len(self.calls), self.max_queue_size)
            enqueue()
            self._changed.notify()

    # -- the thread

    @torch.no_grad()
    def _run(self) -> None:
        step = 0
        try:
            while self._wait_for_work():
                try:
                    self._work(step)
                except Exception:
                    logger.exception("A decode step failed. Its images are dropped.")
                    for drawing in self.batch.drawings:
                        self._fail(drawing.future, Unavailable("Generation failed."))
                    self.batch = self._new_batch()
                step += 1
        finally:
            self._refuse_waiting()

    @torch.no_grad()
    def _new_batch(self) -> DecodeBatch:
        return DecodeBatch(self.pipe.transformer, self.max_batch_size)

    def _work(self, step: int) -> None:
        self._drop_cancelled()
        if step % JOIN_INTERVAL == 0 or not self.batch.drawings:
            self._join()
        self._do_call()
        if self.batch.drawings:
            self._advance()

    def _refuse_waiting(self) -> None:
        """If the thread ends by an error, the clients are told."""
        with self._changed:
            self._stopping = True
            futures = [drawing.future for drawing in (*self.batch.drawings, *self.waiting)]
            for future in (*futures, *(future for _, future in self.calls)):
                self._fail(future, Unavailable("The server is shutting down."))

    def _wait_for_work(self) -> bool:
        """Wait for work. Returns False when the thread should end."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_work() or self._stopping)
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self.batch.drawings or self.waiting or self.calls)

    def _drop_cancelled(self) -> None:
        """Drop images whose clients have disconnected, and those that have failed."""
        if dropped := [drawing for drawing in self.batch.drawings if drawing.future.done()]:
            self.batch.remove(dropped)
        with self._changed:
            self.waiting = deque(drawing for drawing in self.waiting if not drawing.future.done())

    def _join(self) -> None:
        """Move the images that have waited longest to the batch."""
        joining: list[Drawing] = []
        num_free = self.batch.max_rows - len(self.batch.rows)
        with self._changed:
            while self.waiting and self.waiting[0].num_rows <= num_free:
                joining.append(self.waiting.popleft())
                num_free -= joining[-1].num_rows
        if joining:
            self.batch.add(joining)

    def _do_call(self) -> None:
        """Run one queued call."""
        with self._changed:
            if not self.calls:
                return
            function, future = self.calls.popleft()
        self._finish(future, function)

    def _advance(self) -> None:
        """Run one decode step and deliver partial and finished images."""
        complete = self.batch.step()
        first = self.pipe.transformer.num_condition_tokens - 1
        for drawing in self.batch.drawings:
            if drawing.on_partial is not None and drawing.num_drawn - first in drawing.partial_steps:
                index = drawing.partial_steps.index(drawing.num_drawn - first)
                try:
                    drawing.on_partial(index, self._image(drawing))
                except Exception as error:
                    self._fail(drawing.future, error)
        for drawing in complete:
            self._finish(drawing.future, partial(self._image, drawing))
        if complete:
            self.batch.remove(complete)

    def _image(self, drawing: Drawing) -> PIL.Image.Image:
        return self.pipe.detokenize(self.batch.image_tokens(drawing))[0]

    def _finish(self, future: Future, function: Callable[[], Any]) -> None:
        """Set the result of `function` on a future that is not cancelled. If it fails, no other image does."""
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    @staticmethod
    def _fail(future: Future, error: Exception) -> None:
        if not future.done() and future.set_running_or_notify_cancel():
            future.set_exception(error)


__all__ = ["Batcher"]
