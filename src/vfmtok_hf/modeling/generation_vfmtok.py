"""
Sampling image tokens: guidance, filters, draws and the decode loop that both generators share.

The order of operations is that of https://github.com/CVMI-Lab/VFMTok (autoregressive/models/generate.py, after
LlamaGen) and of RAR: guidance, then temperature, then top-k, then top-p, then one draw. Nothing in the loop waits for
the device, and its steps have a few fixed shapes, so that torch.compile and CUDA graphs can take them as they are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.utils import ModelOutput

from .cache_vfmtok import DecodeCache


@dataclass
class VFMTokGeneratorOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            Mean cross-entropy over all image tokens, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, num_image_tokens, codebook_size)`):
            float32 whatever the model's dtype; `logits[:, i]` predicts `image_tokens[:, i]`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Guidance


def constant_guidance(num_steps: int, scale: float, interval: int | None = None) -> list[float]:
    """
    One guidance scale per step: `scale`, and with `interval` 1 (none) from token `interval + 2` on.

    The offset is the original's: its interval counts decode steps after the first token, which is always guided.
    """
    guided_steps = num_steps if interval is None else min(interval + 2, num_steps)
    return [float(scale)] * guided_steps + [1.0] * (num_steps - guided_steps)


def power_cosine_guidance(num_steps: int, scale: float, power: float, interval: int | None = None) -> list[float]:
    """
    One guidance scale per step, rising from 1 towards `scale`: (scale - 1) (1 - cos(pi (t / num_steps)^power)) / 2 + 1.

    A larger `power` rises later; 0 is constant guidance. Source: RAR, modeling/rar.py. `interval` as above.
    """
    ramp = [(1 - math.cos(math.pi * (step / num_steps) ** power)) / 2 for step in range(num_steps)]
    limit = constant_guidance(num_steps, scale, interval)
    return [(step_scale - 1) * height + 1 for step_scale, height in zip(limit, ramp, strict=True)]


def apply_guidance(logits: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance u + scale (c - u) of `(2 * batch_size, ...)` logits, conditional rows c first."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


# ---------------------------------------------------------------------------------------------------------------
# Drawing a token


def filter_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Set all but the `top_k` largest logits of each row to -inf. Ties with the last one stay."""
    kth_largest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth_largest, -torch.inf)


def filter_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep each row's most probable tokens up to and including the one that takes their sum above `top_p`."""
    sorted_logits, sorted_tokens = logits.sort(dim=-1, descending=True)
    probabilities = sorted_logits.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, sorted_tokens, mass_before > top_p)
    return logits.masked_fill(removed, -torch.inf)


@lru_cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. Apple's MPS and some Intel GPUs do not, and torch offers no other way to ask."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def uniform_numbers(
    num_steps: int,
    batch_size: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """
    `(num_steps, batch_size)` numbers in [0, 1], drawn where the generator lives, so that a CPU seed means the same on any
    device. With a list each row draws from its own generator, hence the same numbers in any split of the batch. float64
    where `device` has it, else float32.
    """
    if isinstance(generator, Sequence):
        return torch.cat([uniform_numbers(num_steps, 1, row_generator, device) for row_generator in generator], dim=1)
    source = device if generator is None else generator.device
    drawn = torch.float64 if has_float64(source) else torch.float32
    numbers = torch.rand(num_steps, batch_size, generator=generator, dtype=drawn, device=source)
    return numbers.to(torch.float64 if has_float64(device) else torch.float32).to(device)


def sample_tokens(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """
    Draw one token per row of `(batch_size, codebook_size)` logits: `(batch_size,)` int64.

    The first token at which the sum of the probabilities exceeds a uniform number of `numbers` `(batch_size,)`: one random
    number a row, where `torch.multinomial` draws one a token and takes longer than a layer of the model. It never waits
    for the device. The sums have the precision of the numbers: in float64 the rarest token keeps its probability, in
    float32 probabilities below 1e-7 are rounded.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=numbers.dtype)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, numbers[:, None] * total, right=True)
    # A threshold may be rounded up to the total, which lies past the last token that has a probability.
    last = torch.searchsorted(cumulative, total)
    # Where NaN compares with nothing the result lies past the end; the decode loop reports it after its last step.
    return torch.minimum(drawn, last)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class SamplingSettings:
    """What one call of `generate` asks for, checked as a whole. The defaults sample without guidance or filters."""

    guidance_scale: float = 1.0
    guidance_interval: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True

    def __post_init__(self):
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be 1 (none) or larger, got {self.guidance_scale}.")
        if self.guidance_interval is not None and self.guidance_interval < 0:
            raise ValueError(
                f"guidance_interval must be None (all steps) or at least 0, got {self.guidance_interval}."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}. For greedy use do_sample=False.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or larger, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], where 1 is off, got {self.top_p}.")

    @classmethod
    def resolve(cls, requested: dict[str, Any], *generation_configs: GenerationConfig | None) -> "SamplingSettings":
        """
        Each setting from `requested`, else from the first configuration that has it, else the default above.

        transformers' own fallbacks (`top_k=50`, greedy) are never consulted: an unset field of its config is None.

        Raises:
            TypeError: `requested` has an unknown name.
        """
        names = [field.name for field in fields(cls)]
        if unknown := requested.keys() - set(names):
            raise TypeError(f"generate got unknown arguments: {', '.join(sorted(unknown))}.")
        chosen = {}
        for name in names:
            values = [requested.get(name), *(getattr(config, name, None) for config in generation_configs)]
            chosen[name] = next((value for value in values if value is not None), None)
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    @property
    def effective_guidance_scale(self) -> float:
        """At most 1 means no guidance, as in diffusers; RAR's original writes it 0."""
        return max(float(self.guidance_scale), 1.0)

    def guidance_scales(self, num_steps: int) -> list[float]:
        """The guidance of each of `num_steps` steps."""
        return constant_guidance(num_steps, self.effective_guidance_scale, self.guidance_interval)

    def filter(self, logits: torch.Tensor) -> torch.Tensor:
        """Temperature, top-k and top-p on `(batch_size, codebook_size)` logits; removed tokens become -inf."""
        logits = logits / self.temperature
        if self.top_k > 0:
            logits = filter_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = filter_top_p(logits, self.top_p)
        return logits


# ---------------------------------------------------------------------------------------------------------------
# The decode loop


def check_ids(name: str, ids: torch.Tensor, num_ids: int, wait_for_device: bool = False) -> None:
    """
    Raise unless `ids` are int64 in 0 to `num_ids - 1`.

    Reading values off an accelerator stalls it, so there the range is checked only with `wait_for_device`.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}: convert with .long().")
    if (ids.is_cpu or wait_for_device) and not torch.compiler.is_compiling() and ids.numel():
        smallest, largest = ids.aminmax()
        if smallest < 0 or largest >= num_ids:
            outlier = int(smallest if smallest < 0 else largest)
            raise ValueError(f"{name} must lie in 0 to {num_ids - 1}, got {outlier}.")


def draw_tokens(
    logits: torch.Tensor,
    step: torch.Tensor,
    scales: torch.Tensor,
    numbers: torch.Tensor,
    settings: SamplingSettings,
    logits_processor: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Guidance, filters and the draw of one step.

    Args:
        logits (`torch.Tensor` of shape `(rows, codebook_size)`): one row an image; two, conditional rows first, to guide.
        step (`torch.LongTensor` of shape `()`): which of the rows of `scales` and `numbers` count.
        scales (`torch.Tensor` of shape `(num_image_tokens,)`): guidance of each step.
        numbers (`torch.Tensor` of shape `(num_image_tokens, batch_size)`): uniform numbers of each step.
        settings (`SamplingSettings`).
        logits_processor (`Callable`, *optional*): called with the guided logits.

    Returns:
        `tuple(torch.Tensor)`: the tokens and the largest logits, both `(batch_size,)`.
    """
    if len(logits) > numbers.shape[1]:
        logits = apply_guidance(logits, scales.index_select(0, step[None]))
    if logits_processor is not None:
        logits = logits_processor(logits)
    if not settings.do_sample:
        return logits.argmax(dim=-1), logits.amax(dim=-1)
    logits = settings.filter(logits)
    return sample_tokens(logits, numbers.index_select(0, step[None])[0]), logits.amax(dim=-1)


def decode_step(
    model: "VFMTokGenerationMixin", tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache
) -> torch.Tensor:
    """A decode step of any model, its logits where `position` is: a device map may have put the head elsewhere."""
    return model.decode_step(tokens, position, cache).to(position.device)


def decode_and_draw(
    model: "VFMTokGenerationMixin",
    tokens: torch.Tensor,
    position: torch.Tensor,
    cache: DecodeCache,
    scales: torch.Tensor,
    numbers: torch.Tensor,
    settings: SamplingSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode step and its draw: all of a step that need not run in Python."""
    step = position - (model.num_condition_tokens - 1)
    return draw_tokens(decode_step(model, tokens, position, cache), step, scales, numbers, settings)


def to_raster(sequence: torch.Tensor, orders: torch.Tensor | None) -> torch.Tensor:
    """Put `(batch_size, length)` entries, of which entry j belongs to raster position `orders[:, j]`, in place."""
    return sequence if orders is None else torch.zeros_like(sequence).scatter(1, orders, sequence)


class CompiledSteps:
    """
    Steps translated by `torch.compile`, and the caches whose memory their CUDA graphs read, one of each number of rows.

    Args:
        options: for `torch.compile`.
    """

    def __init__(self, **options):
        self.options = options
        self.functions: dict[tuple, Callable] = {}
        self.caches: dict[int, DecodeCache] = {}

    def __call__(self, function: FunctionType, *inputs: Any) -> Any:
        """`function(model, tokens, position, cache, ...)`, translated. A last argument of settings is constant in a graph."""
        _, tokens, _, cache, *others = inputs
        key = function, len(cache.condition_embeds), len(tokens), *others[-1:]
        if key not in self.functions:
            # torch.compile allows a code object few graphs. With one of its own a key needs one for each visible length.
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            self.functions[key] = torch.compile(own, fullgraph=True, dynamic=False, **self.options)
        torch.compiler.cudagraph_mark_step_begin()
        return self.functions[key](*inputs)


class VFMTokGenerationMixin(GenerationMixin):
    """
    `generate` for models that predict image tokens from class labels.

    A model's `forward(class_labels, image_tokens, cache=...)` reads the first tokens and returns the logits of the next;
    its `decode_step(tokens, position, cache)` goes on from there, one position at a time.
    """

    config: Any
    output_modalities = ("image",)
    # Positions of the sequence before the first image token.
    num_condition_tokens = 1
    sampling_settings = SamplingSettings
    _compiled_steps: CompiledSteps | None = None

    def decode_step(self, tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """
        Logits of the token that follows `position`, which is read and kept in `cache`. Shapes do not depend on it.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size,)`):
                The token at `position`; the class's positions ignore it.
            position (`torch.LongTensor` of shape `()`): within [condition, image tokens in the order of drawing].
            cache (`DecodeCache`): of a generation that has begun, as by `forward(..., cache=cache)`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, codebook_size)`.

        Raises:
            NotImplementedError: a model has to define it.
        """
        raise NotImplementedError

    def new_cache(self) -> DecodeCache:
        """A cache for one generation."""
        max_length = self.num_condition_tokens + self.config.num_image_tokens - 1
        return DecodeCache(self.config.num_hidden_layers, max_length)

    def prepare_step(self, position: int, cache: DecodeCache) -> None:
        """Called before the decode step at `position` with its `cache`, for what a model computes of several steps at once."""

    def compile_decoding(self, **options) -> None:
        """
        Let `torch.compile` translate decode steps and draws, in place, at the next call of `generate`.

        Each number of rows has a graph for each of a few lengths that the sequence has reached, eight at most in one
        generation. On CUDA they are CUDA graphs. The caches of all numbers of rows stay in memory.

        Args:
            options: for `torch.compile`. On CUDA `mode` is `"reduce-overhead"` by default.
        """
        if self.device.type == "cuda" and not {"mode", "options", "backend"} & options.keys():  # type: ignore[attr-defined]
            options["mode"] = "reduce-overhead"
        self._compiled_steps = CompiledSteps(**options)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        class_labels: torch.Tensor | Sequence[int],
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        callback: Callable[[int, torch.Tensor], bool | torch.Tensor | None] | None = None,
        **sampling,
    ) -> torch.Tensor:
        """
        Sample the image tokens of one image per class label.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, or a list):
                Labels in 0 to `num_classes - 1`; `num_classes` is the null class (no condition).
            generation_config (`GenerationConfig`, *optional*):
                Holds settings of sampling, which take the place of those in the model's own `generation_config`.
            generator (`torch.Generator` or a sequence of one per label, *optional*):
                Source of randomness, on any device. With one per label an image does not depend on its batch.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called as `(tokens so far, guided logits)` before the temperature.
            callback (`Callable`, *optional*):
                Called as `callback(step, image_tokens)` after each token; `image_tokens` is `(batch_size,
                num_image_tokens)` with 0 where nothing is drawn yet, and must not be changed. Returning `False` stops.
                Returning a tensor like it replaces the tokens drawn so far, of which the model has read all but the newest.
            sampling:
                The fields of [`SamplingSettings`]: `guidance_scale`, `guidance_interval`, `temperature`, `top_k`, `top_p`,
                `do_sample`. They override both configurations; None leaves the choice to these.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_image_tokens)`, in raster order. After a stop by the
            callback the tokens not drawn are 0.

        Raises:
            ValueError, TypeError: unusable arguments, before any work; logits that are not finite, at the end.
        """
        settings = self.sampling_settings.resolve(sampling, generation_config, self.generation_config)
        class_labels = self._as_class_labels(class_labels)
        return self._decode_tokens(class_labels, settings, generator, logits_processor, callback)

    def _cache_and_runner(self, num_rows: int) -> tuple[DecodeCache, Callable]:
        """A cache for a generation of `num_rows`, and what calls the functions of its steps."""
        if self._compiled_steps is None:
            return self.new_cache(), lambda function, *inputs: function(*inputs)
        return self._compiled_steps.caches.setdefault(num_rows, self.new_cache()), self._compiled_steps

    def _decode_tokens(
        self,
        class_labels: torch.Tensor,
        settings: SamplingSettings,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        logits_processor: LogitsProcessorList | None,
        callback: Callable[[int, torch.Tensor], bool | torch.Tensor | None] | None,
        orders: torch.Tensor | None = None,
        known_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The loop. `orders` `(batch_size, num_image_tokens)` has the raster position of each token of the sequence (None:
        raster), `known_tokens` `(batch_size, n)` the sequence's first tokens.
        """
        batch_size, device = class_labels.shape[0], class_labels.device
        if isinstance(generator, Sequence) and len(generator) != batch_size:
            raise ValueError(f"Got {len(generator)} generators for {batch_size} class labels: pass one for each.")

        num_tokens = self.config.num_image_tokens
        first_step = 0 if known_tokens is None else known_tokens.shape[1]
        guidance = settings.guidance_scales(num_tokens)
        guided_steps = max((step + 1 for step, scale in enumerate(guidance) if scale != 1), default=0)
        scales = torch.tensor(guidance).to(device)
        numbers = torch.zeros(num_tokens, batch_size, device=device)
        if settings.do_sample:
            drawn_numbers = uniform_numbers(num_tokens - first_step, batch_size, generator, device)
            numbers = F.pad(drawn_numbers, (0, 0, first_step, 0))

        # One row per image and, while guidance lasts, a second one for its unconditional twin.
        labels, passes = class_labels, 1
        if guided_steps > first_step:
            labels, passes = torch.cat([labels, torch.full_like(labels, self.config.num_classes)]), 2
        model_kwargs = {} if orders is None else {"orders": orders.repeat(passes, 1)}
        tokens = class_labels.new_zeros(batch_size, num_tokens)
        if known_tokens is not None:
            tokens[:, :first_step] = known_tokens
        largest_logits = torch.zeros(batch_size, num_tokens, device=device)
        cache, run = self._cache_and_runner(len(labels))
        position = torch.tensor(self.num_condition_tokens - 1 + first_step).to(device)  # the last one read

        for step in range(first_step, num_tokens):
            if step == guided_steps:
                passes = 1
            if step > first_step:
                position += 1
                self.prepare_step(self.num_condition_tokens - 1 + step, cache)
                cache.show(self.num_condition_tokens + step)
                inputs = self, tokens[:, step - 1].repeat(passes).to(position.device), position, cache
            if step > first_step and logits_processor is None:
                drawn, largest = run(decode_and_draw, *inputs, scales, numbers, settings)
            else:
                if step > first_step:
                    logits = run(decode_step, *inputs)
                else:
                    prefix = tokens[:, :step].repeat(passes, 1)
                    logits = self(labels, prefix, cache=cache, **model_kwargs).logits[:, -1]  # type: ignore[operator]
                process = None if logits_processor is None else partial(logits_processor, tokens[:, :step])  # type: ignore[arg-type]
                index = position - (self.num_condition_tokens - 1)
                drawn, largest = draw_tokens(logits, index, scales, numbers, settings, process)
                # An offloaded model computes where its first inputs were moved.
                device = cache.condition_embeds.device
                position, scales, numbers = position.to(device), scales.to(device), numbers.to(device)
            tokens[:, step], largest_logits[:, step] = drawn, largest
            answer = None if callback is None else callback(step, to_raster(tokens, orders))
            if answer is False:
                break
            if isinstance(answer, torch.Tensor):
                self._check_image_tokens(answer, class_labels)
                tokens.copy_(answer if orders is None else answer.take_along_dim(orders, dim=1))

        # NaN survives every operation above, so that one look at the end, the loop's only wait, finds it.
        if not largest_logits.isfinite().all():
            raise ValueError(
                "The logits were not finite: the weights hold NaN, float16 overflows (load the model in float32 or "
                "bfloat16), or a logits processor forbade every token."
            )
        return to_raster(tokens, orders)

    def _as_class_labels(self, class_labels: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Checked labels. Those of a list go where the model is; an offloaded model moves them itself."""
        if not isinstance(class_labels, torch.Tensor):
            try:
                class_labels = torch.as_tensor(class_labels)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"class_labels are class numbers, got {class_labels!r}: VFMTokPipeline takes names."
                ) from error
            if self.device.type != "meta":  # type: ignore[attr-defined]
                class_labels = class_labels.to(self.device)  # type: ignore[attr-defined]
        self._check_class_labels(class_labels, wait_for_device=True)
        return class_labels

    def _tokens_to_score(
        self, image_tokens: torch.Tensor | None, labels: torch.Tensor | None, return_loss: bool | None
    ) -> tuple[torch.Tensor, bool]:
        """The image tokens of `forward`, under either name, and whether their loss is wanted."""
        if image_tokens is None and labels is None:
            raise ValueError("image_tokens are missing: all tokens of one image per label, or labels in their place.")
        wanted = self.training if return_loss is None else return_loss  # type: ignore[attr-defined]
        return labels if image_tokens is None else image_tokens, labels is not None or wanted  # type: ignore[return-value]

    def _check_class_labels(self, class_labels: torch.Tensor, wait_for_device: bool = False) -> None:
        if not isinstance(class_labels, torch.Tensor):
            raise TypeError(f"class_labels must be a tensor, got {type(class_labels).__name__}: use torch.as_tensor.")
        if class_labels.ndim != 1:
            raise ValueError(f"class_labels must have shape (batch_size,), got {tuple(class_labels.shape)}.")
        # The null class, one past the last label, is a valid condition.
        check_ids("class_labels", class_labels, self.config.num_classes + 1, wait_for_device)

    def _check_image_tokens(
        self, image_tokens: torch.Tensor, class_labels: torch.Tensor, wait_for_device: bool = False
    ) -> None:
        shape = (class_labels.shape[0], self.config.num_image_tokens)
        if tuple(image_tokens.shape) != shape:
            raise ValueError(
                f"image_tokens must have shape {shape}, all tokens of one image per label, got {tuple(image_tokens.shape)}."
            )
        check_ids("image_tokens", image_tokens, self.config.codebook_size, wait_for_device)


__all__ = ["SamplingSettings", "VFMTokGenerationMixin", "VFMTokGeneratorOutput"]
