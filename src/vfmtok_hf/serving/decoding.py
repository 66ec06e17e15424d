"""
Continuous batching: images that share decode steps, each at its own position.

Images join and leave between two steps. Each operation computes rows independently, so an image depends only on its class,
seed and sampling settings. Settings may differ within a batch.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import PIL.Image
import torch

from vfmtok_hf.modeling.generation_vfmtok import SamplingSettings, decode_step, sample_tokens, uniform_numbers
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration


@dataclass(eq=False)
class Drawing:
    """
    An image to generate.

    Args:
        label (`int`): class of the image.
        seed (`int`): seed of its random numbers.
        settings (`SamplingSettings`): sampling settings.
        partial_steps (`tuple[int]`): numbers of drawn tokens after which `on_partial` is called.
        on_partial (`Callable`, *optional*): called as `on_partial(index, image)` with the unfinished image.
        future (`Future`): receives the finished `PIL.Image.Image`. Cancel it to drop the image.
        num_drawn (`int`): decode steps so far.
    """

    label: int
    seed: int
    settings: SamplingSettings
    partial_steps: tuple[int, ...] = ()
    on_partial: Callable[[int, PIL.Image.Image], None] | None = None
    future: Future = field(default_factory=Future)
    num_drawn: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that the image occupies. Guidance needs a second one, without the class."""
        return 2 if self.settings.effective_guidance_scale > 1 else 1


class DecodeBatch:
    """
    Images that share decode steps.

    On accelerators, each step computes all `max_rows` rows, so shapes are fixed. On CPUs, where that would take longer, it
    computes the occupied rows.

    Args:
        model ([`VFMTokARForImageGeneration`] or [`VFMTokRARForImageGeneration`]): the generator.
        max_rows (`int`): rows of the key/value cache.
    """

    def __init__(self, model: VFMTokARForImageGeneration | VFMTokRARForImageGeneration, max_rows: int):
        self.model, self.max_rows = model, max_rows
        num_tokens, device = model.config.num_image_tokens, model.device
        self.drawings: list[Drawing] = []
        self.rows: list[tuple[Drawing, bool]] = []  # and whether the row has the class
        self.positions = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(max_rows, num_tokens, dtype=torch.int64, device=device)
        self.numbers = uniform_numbers(num_tokens, max_rows, None, device).T.contiguous()
        self.largest_logits = torch.zeros(max_rows, num_tokens, device=device)
        # The first forward pass gives the cache its rows, dtype and device.
        self.cache = model.new_cache()
        model(torch.zeros_like(self.positions), self.tokens[:, :0], cache=self.cache)
        self.groups: list[Group] = []

    def fits(self, drawing: Drawing) -> bool:
        """Whether there is room for `drawing`."""
        return len(self.rows) + drawing.num_rows <= self.max_rows

    def add(self, drawings: list[Drawing]) -> None:
        """Start generating `drawings`, which must fit."""
        self.drawings += drawings
        for drawing in drawings:
            generator = torch.Generator().manual_seed(drawing.seed)
            numbers = uniform_numbers(self.tokens.shape[1], 1, generator, self.tokens.device)[:, 0]
            for has_class in (True, False)[: drawing.num_rows]:
                row = len(self.rows)
                self.rows.append((drawing, has_class))
                self.positions[row] = 0
                self.numbers[row] = numbers
        self._begin()

    def remove(self, drawings: list[Drawing]) -> None:
        """Remove `drawings`. The last rows move to the rows that become free."""
        stays = [drawing not in drawings for drawing, _ in self.rows]
        num_left = sum(stays)
        free = [row for row in range(num_left) if not stays[row]]
        moving = [row for row in range(num_left, len(stays)) if stays[row]]
        caches = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        for tensor in (self.positions, self.tokens, self.numbers, self.largest_logits, *caches):
            tensor[free] = tensor[moving]
        for row, source in zip(free, moving, strict=True):
            self.rows[row] = self.rows[source]
        del self.rows[num_left:]
        self.positions[num_left:] = 0
        self.drawings = [drawing for drawing in self.drawings if drawing not in drawings]
        self._begin()

    def _begin(self) -> None:
        """Recompute what depends on which images are in which rows."""
        classes = [drawing.label if has_class else self.model.config.num_classes for drawing, has_class in self.rows]
        if self.positions.device.type != "cpu":
            classes += [0] * (self.max_rows - len(classes))
        if classes:
            labels = torch.tensor(classes).to(self.positions.device)
            self.model.begin(self.cache, self.model.embed_condition(labels))
        rows_of: dict[Drawing, list[int]] = {}
        for row, (drawing, _) in enumerate(self.rows):
            rows_of.setdefault(drawing, []).append(row)
        members: dict[SamplingSettings, list[list[int]]] = {}
        for drawing, rows in rows_of.items():
            members.setdefault(drawing.settings, []).append(sorted(rows, key=lambda row: not self.rows[row][1]))
        self.groups = [Group(settings, rows, self.tokens) for settings, rows in members.items()]

    def step(self) -> list[Drawing]:
        """Draw the next token of every image and return the finished images."""
        model, num_rows = self.model, len(self.cache.condition_embeds)
        positions, tokens = self.positions[:num_rows], self.tokens[:num_rows]
        model.prepare_step(positions, self.cache)
        last_read = (positions - model.num_condition_tokens).clamp(min=0)
        logits = decode_step(model, tokens.take_along_dim(last_read[:, None], dim=1)[:, 0], positions, self.cache)
        # The first position of a RAR predicts nothing. The token drawn there is overwritten in the next step.
        steps = (positions - (model.num_condition_tokens - 1)).clamp(min=0)
        for group in self.groups:
            group.draw(logits, steps, self.numbers, self.tokens, self.largest_logits)
        self.positions[: len(self.rows)] += 1
        for drawing in self.drawings:
            drawing.num_drawn += 1
        num_steps = self.tokens.shape[1] + model.num_condition_tokens - 1
        return [drawing for drawing in self.drawings if drawing.num_drawn == num_steps]

    def image_tokens(self, drawing: Drawing) -> torch.Tensor:
        """
        Tokens `(1, num_image_tokens)` of `drawing`, 0 where none is drawn yet.

        Raises:
            ValueError: its logits were not finite.
        """
        row = next(row for row, (owner, has_class) in enumerate(self.rows) if owner is drawing and has_class)
        length = max(drawing.num_drawn - (self.model.num_condition_tokens - 1), 0)
        if not self.largest_logits[row, :length].isfinite().all():
            raise ValueError(
                "The logits were not finite: a sampling setting is extreme, the weights hold NaN, or their dtype overflows."
            )
        image_tokens = torch.zeros_like(self.tokens[:1])
        image_tokens[0, :length] = self.tokens[row, :length]
        return image_tokens


class Group:
    """
    Images of a batch with equal sampling settings.

    Args:
        settings (`SamplingSettings`): their settings.
        rows (`list[list[int]]`): rows of each image: with the class, and for guidance without.
        tokens (`torch.Tensor` of shape `(max_rows, num_image_tokens)`): the batch's tokens.
    """

    def __init__(self, settings: SamplingSettings, rows: list[list[int]], tokens: torch.Tensor):
        device = tokens.device
        self.choice, self.limits = settings.choice, settings.limits(device)
        self.scales = torch.tensor(settings.guidance_scales(tokens.shape[1])).to(device)
        # (1 or 2, images): with the class, without
        self.rows = torch.tensor(rows).T.contiguous().to(device)

    def draw(
        self,
        logits: torch.Tensor,
        steps: torch.Tensor,
        numbers: torch.Tensor,
        tokens: torch.Tensor,
        largest_logits: torch.Tensor,
    ) -> None:
        """Draw one token per image with guidance and filters, and store it in `tokens` at `steps` `(rows,)`."""
        rows = self.rows[0]
        own, step = logits[rows], steps[rows]
        if len(self.rows) > 1:
            own = torch.lerp(logits[self.rows[1]], own, self.scales[step][:, None])
        if self.choice.do_sample:
            own = self.choice.filter(own, self.limits)
            drawn = sample_tokens(own, numbers[rows, step])
        else:
            drawn = own.argmax(dim=-1)
        tokens[self.rows, step] = drawn
        largest_logits[rows, step] = own.amax(dim=-1)


__all__ = ["DecodeBatch", "Drawing"]
