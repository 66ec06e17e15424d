"""
Sampling of image tokens: guidance, filters, and the decode loop of both generators.

The order of operations is that of https://github.com/CVMI-Lab/VFMTok (autoregressive/models/generate.py, after
LlamaGen) and of RAR: guidance, then temperature, then top-k, then top-p, then sampling. The loop does not synchronize
with the device, and its steps have a few fixed shapes, as torch.compile and CUDA graphs require.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from numbers import Integral, Real
from threading import RLock
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

from .cache_vfmtok import DecodeCache
from .class_embeddings_vfmtok import check_ids, check_tensor
from .outputs_vfmtok import VFMTokModelOutput


# Visible lengths of the cache in compiled steps. Together with dropping the unconditional rows once, a generation has at
# most 8 shapes.
COMPILED_LENGTHS = 7
# Functions that `compile_decoding` calls with the model. `vfmtok_hf` adds those for the machine; copies of this file in Hub
# repositories have none.
BEFORE_COMPILING: list[Callable[[nn.Module], object]] = []
# torch before 2.15 cannot run a compiled function in one thread while another compiles any.
COMPILER_LOCK = RLock()
# Weights of a block in which `index_at_share` searches.
BLOCK_LENGTH = 128


@dataclass(repr=False)
class VFMTokGeneratorOutput(VFMTokModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, with `return_loss=True`):
            Mean cross-entropy over all image tokens, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, num_image_tokens, codebook_size)`):
            float32 for any dtype of the model; `logits[:, i]` predicts `image_tokens[:, i]`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Guidance


def constant_guidance(num_steps: int, scale: float, interval: int | None = None) -> list[float]:
    """
    One guidance scale per step: `scale`, and with `interval` 1 (off) from token `interval + 2` on.

    The offset is the original's: its interval counts decode steps after the first token, which is always guided.
    """
    guided_steps = num_steps if interval is None else min(interval + 2, num_steps)
    return [float(scale)] * guided_steps + [1.0] * (num_steps - guided_steps)


def power_cosine_guidance(num_steps: int, scale: float, power: float, interval: int | None = None) -> list[float]:
    """
    One guidance scale per step, increasing from 1 to `scale`: (scale - 1) (1 - cos(pi (t / num_steps)^power)) / 2 + 1.

    A larger `power` increases later; 0 is constant guidance. Source: RAR, modeling/rar.py. `interval` as above.
    """
    ramp = [(1 - math.cos(math.pi * (step / num_steps) ** power)) / 2 for step in range(num_steps)]
    limit = constant_guidance(num_steps, scale, interval)
    return [(step_scale - 1) * height + 1 for step_scale, height in zip(limit, ramp, strict=True)]


def apply_guidance(logits: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance u + scale (c - u) of `(2 * batch_size, ...)` logits, conditional rows c first."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


# ---------------------------------------------------------------------------------------------------------------
# Sampling a token


def index_at_share(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    The first index at which the sum of a row's weights exceeds a share of their total.

    The block of weights is found first, then the weight in it, so that no sum runs over a whole row. That reads the
    weights once, and long scans of several rows are more than inductor can compile for CUDA (torch 2.11).

    Args:
        weights (`torch.Tensor` of shape `(rows, length)`): numbers that are not negative.
        shares (`torch.Tensor` of shape `(rows,)`): in [0, 1]. Sums have their dtype.

    Returns:
        `torch.LongTensor` of shape `(rows,)`: indices of weights above 0. With NaN, any index.
    """
    rows, length = weights.shape
    blocks = F.pad(weights, (0, -length % BLOCK_LENGTH)).view(rows, -1, BLOCK_LENGTH)
    ends = blocks.sum(dim=-1, dtype=shares.dtype).cumsum(dim=-1)
    threshold = shares[:, None] * ends[:, -1:]
    block = index_above(ends, threshold)
    start = F.pad(ends, (1, -1)).gather(1, block)
    sums = blocks.take_along_dim(block[..., None], dim=1)[:, 0].cumsum(dim=-1, dtype=shares.dtype)
    return (block * BLOCK_LENGTH + index_above(sums, threshold - start))[:, 0]


def index_above(sums: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """`(rows, 1)` index of the first of `(rows, length)` nondecreasing sums above `threshold` `(rows, 1)`."""
    # A threshold can be rounded up to the total, which is past the last weight above 0.
    return ((sums <= threshold) & (sums < sums[:, -1:])).sum(dim=-1, keepdim=True)


def filter_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Set all but the `top_k` largest logits of each row to -inf. Ties with the last one are kept."""
    kth_largest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth_largest, -torch.inf)


def filter_top_p(logits: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Keep the most probable tokens of each row, up to and including the one where their sum exceeds `top_p`."""
    sorted_logits, sorted_tokens = logits.sort(dim=-1, descending=True)
    probabilities = sorted_logits.softmax(dim=-1)
    shares = torch.as_tensor(top_p, dtype=probabilities.dtype, device=logits.device).expand(logits.shape[0])
    last_kept = index_at_share(probabilities, shares)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, sorted_tokens, ranks > last_kept[:, None])
    return logits.masked_fill(removed, -torch.inf)


@lru_cache
def has_float64(device: torch.device) -> bool:
    """Whether a device supports float64. Apple's MPS and some Intel GPUs do not; torch has no query for it."""
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
    Uniform numbers `(num_steps, batch_size)` in [0, 1], sampled on the generator's device, so a CPU seed gives the same
    numbers on any device. With a list, each row uses its own generator and gets the same numbers in any batch. float64 if
    `device` supports it, otherwise float32.
    """
    if isinstance(generator, Sequence):
        return torch.cat([uniform_numbers(num_steps, 1, row_generator, device) for row_generator in generator], dim=1)
    source = device if generator is None else generator.device
    drawn = torch.float64 if has_float64(source) else torch.float32
    numbers = torch.rand(num_steps, batch_size, generator=generator, dtype=drawn, device=source)
    return numbers.to(torch.float64 if has_float64(device) else torch.float32).to(device)


def sample_tokens(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """
    Sample one token per row of `(batch_size, codebook_size)` logits: `(batch_size,)` int64.

    It is the first token at which the sum of the probabilities exceeds a uniform number of `numbers` `(batch_size,)`. That
    takes one random number per row; `torch.multinomial` uses one per token and takes longer than a layer of the model. It
    does not synchronize with the device. Sums have the precision of the numbers: float64 keeps the probability of the
    rarest token, and float32 rounds probabilities below 1e-7.
    """
    return index_at_share(logits.softmax(dim=-1), numbers)


class SamplingChoice(NamedTuple):
    """The part of [`SamplingSettings`] that is constant in a graph of compiled steps."""

    do_sample: bool
    top_k: int
    has_top_p: bool

    def filter(self, logits: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
        """
        Apply temperature, top-k and top-p to `(batch_size, codebook_size)` logits; removed tokens become -inf. `limits` are
        temperature and top-p, `(2,)`.
        """
        temperature, top_p = limits
        logits = logits / temperature
        if self.top_k > 0:
            logits = filter_top_k(logits, self.top_k)
        return filter_top_p(logits, top_p) if self.has_top_p else logits


@dataclass(frozen=True)
class SamplingSettings:
    """The validated sampling options of one `generate` call. The defaults use no guidance and no filters."""

    guidance_scale: float = 1.0
    guidance_interval: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True

    def __post_init__(self):
        for field in fields(self):
            value, wanted = getattr(self, field.name), Integral if field.type in (int, int | None) else Real
            if field.type is bool and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, got {value!r}.")
            is_switch = isinstance(value, bool) and field.type is not bool
            if value is not None and (is_switch or not isinstance(value, wanted)):
                raise TypeError(
                    f"{field.name} must be {'an integer' if wanted is Integral else 'a number'}, got {value!r}."
                )
            if value is not None and field.type is not bool:
                # torch.compile would take numpy's numbers for tensors.
                object.__setattr__(self, field.name, int(value) if wanted is Integral else float(value))
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be 1 (off) or larger, got {self.guidance_scale}.")
        if self.guidance_interval is not None and self.guidance_interval < 0:
            raise ValueError(
                f"guidance_interval must be None (all steps) or at least 0, got {self.guidance_interval}."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}. For greedy decoding, use do_sample=False."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or larger, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], where 1 is off, got {self.top_p}.")

    @classmethod
    def resolve(cls, requested: dict[str, Any], *generation_configs: GenerationConfig | None) -> "SamplingSettings":
        """
        Take each option from `requested`, otherwise from the first configuration that sets it, otherwise the default above.

        transformers' own defaults (`top_k=50`, greedy) are not used: unset fields of its configuration are None.

        Raises:
            TypeError: `requested` contains an unknown option, or a configuration is not a `GenerationConfig`.
        """
        names = [field.name for field in fields(cls)]
        if unknown := requested.keys() - set(names):
            raise TypeError(
                f"generate got unknown arguments: {', '.join(sorted(unknown))}. Settings of sampling are {', '.join(names)}."
            )
        for config in generation_configs:
            if config is not None and not isinstance(config, GenerationConfig):
                raise TypeError(
                    f"generation_config must be a GenerationConfig, got {type(config).__name__}: pass its entries as "
                    "arguments."
                )
        chosen = {}
        for name in names:
            values = [requested.get(name), *(getattr(config, name, None) for config in generation_configs)]
            chosen[name] = next((value for value in values if value is not None), None)
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    @property
    def effective_guidance_scale(self) -> float:
        """The guidance scale, at least 1 (off): smaller ones turn guidance off, as in diffusers. The original RAR uses 0."""
        return max(float(self.guidance_scale), 1.0)

    def guidance_scales(self, num_steps: int) -> list[float]:
        """The guidance scale of each of `num_steps` steps."""
        return constant_guidance(num_steps, self.effective_guidance_scale, self.guidance_interval)

    @property
    def choice(self) -> SamplingChoice:
        """What is constant in compiled steps. Greedy decoding ignores filters."""
        sampled = self.do_sample
        return SamplingChoice(sampled, self.top_k if sampled else 0, sampled and self.top_p < 1)

    def limits(self, device: torch.device) -> torch.Tensor:
        """Temperature and top-p, `(2,)` float32 on `device`: inputs of compiled steps."""
        return torch.tensor([self.temperature, self.top_p], dtype=torch.float32).to(device)


# ---------------------------------------------------------------------------------------------------------------
# The decode loop


def draw_tokens(
    logits: torch.Tensor,
    step: torch.Tensor,
    scales: torch.Tensor,
    numbers: torch.Tensor,
    limits: torch.Tensor,
    choice: SamplingChoice,
    logits_processor: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Guidance, filters and sampling of one step.

    Args:
        logits (`torch.Tensor` of shape `(rows, codebook_size)`): one row per image, or with guidance two, conditional
            rows first.
        step (`torch.LongTensor` of shape `()`): row of `scales` and `numbers` to use.
        scales (`torch.Tensor` of shape `(num_image_tokens,)`): guidance of each step.
        numbers (`torch.Tensor` of shape `(num_image_tokens, batch_size)`): uniform numbers of each step.
        limits (`torch.Tensor` of shape `(2,)`): temperature and top-p.
        choice (`SamplingChoice`).
        logits_processor (`Callable`, *optional*): called with the guided logits.

    Returns:
        `tuple(torch.Tensor)`: the tokens and the largest logits, both `(batch_size,)`.
    """
    if len(logits) > numbers.shape[1]:
        logits = apply_guidance(logits, scales.index_select(0, step[None]))
    if logits_processor is not None:
        logits = logits_processor(logits)
    if not choice.do_sample:
        return logits.argmax(dim=-1), logits.amax(dim=-1)
    logits = choice.filter(logits, limits)
    return sample_tokens(logits, numbers.index_select(0, step[None])[0]), logits.amax(dim=-1)


def decode_step(
    model: "VFMTokGenerationMixin", tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache
) -> torch.Tensor:
    """A decode step of any model. Its logits are moved to the device of `position`, for models with a device map."""
    return model.decode_step(tokens, position, cache).to(position.device)


def decode_and_draw(
    model: "VFMTokGenerationMixin",
    tokens: torch.Tensor,
    position: torch.Tensor,
    cache: DecodeCache,
    scales: torch.Tensor,
    numbers: torch.Tensor,
    limits: torch.Tensor,
    choice: SamplingChoice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode step and the sampling of its token: everything in a step that does not need Python."""
    step = position - (model.num_condition_tokens - 1)
    return draw_tokens(decode_step(model, tokens, position, cache), step, scales, numbers, limits, choice)


def to_raster(sequence: torch.Tensor, orders: torch.Tensor | None) -> torch.Tensor:
    """Reorder `(batch_size, length)` entries, where entry j belongs to raster position `orders[:, j]`."""
    return sequence if orders is None else torch.zeros_like(sequence).scatter(1, orders, sequence)


class CompiledSteps:
    """
    Compiled decode steps, and the caches that their CUDA graphs read. Copies and pickles keep only the options.

    Args:
        options: options of `torch.compile`.
    """

    def __init__(self, **options):
        self.options = options
        self.functions: dict[tuple, Callable] = {}
        self.unused_caches: dict[tuple[int, bool], list[DecodeCache]] = {}
        self.compile(decode_step)  # raises for invalid options

    def __reduce__(self) -> tuple:
        return partial(CompiledSteps, **self.options), ()

    def compile(self, function: Callable) -> Callable:
        """Compile a function of fixed shapes, at its first call."""
        return torch.compile(function, fullgraph=True, dynamic=False, **self.options)

    def __call__(self, function: FunctionType, *inputs: Any) -> Any:
        """Run `function(model, tokens, position, cache, ...)` compiled. A [`SamplingChoice`] at the end is constant in a graph."""
        _, tokens, _, cache, *others = inputs
        key = function, len(cache.condition_embeds), len(tokens), cache.visible_length, *others[-1:]
        with COMPILER_LOCK:
            if key not in self.functions:
                # torch.compile limits the graphs of a code object. With its own, a key has one graph per state of the model,
                # such as its adapter or autocast.
                own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
                self.functions[key] = self.compile(own)
            torch.compiler.cudagraph_mark_step_begin()
            outputs = self.functions[key](*inputs)
            # CUDA graphs reuse the memory of their outputs, in any thread.
            return (
                outputs.clone() if isinstance(outputs, torch.Tensor) else tuple(output.clone() for output in outputs)
            )

    @contextmanager
    def cache(self, num_rows: int, new_cache: Callable[[int], DecodeCache]) -> Iterator[DecodeCache]:
        """Reserve a cache for `num_rows`. Generations in other threads or in callbacks use other ones."""
        # In inference mode, a cache needs other tensors.
        unused = self.unused_caches.setdefault((num_rows, torch.is_inference_mode_enabled()), [])
        try:
            cache = unused.pop()
        except IndexError:
            cache = new_cache(COMPILED_LENGTHS)
        try:
            yield cache
        finally:
            unused.append(cache)


class VFMTokGenerationMixin(GenerationMixin):
    """
    `generate` for models that predict image tokens from class labels.

    A model's `forward(class_labels, image_tokens, cache=...)` reads the first tokens and returns the logits of the next one;
    `decode_step(tokens, position, cache)` continues one position at a time.
    """

    config: Any
    output_modalities = ("image",)
    # Number of positions before the first image token.
    num_condition_tokens = 1
    sampling_settings = SamplingSettings
    _compiled_steps: CompiledSteps | None = None

    def decode_step(self, tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """
        Read the token at `position` into `cache` and return the logits of the next token. All shapes are fixed.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size,)`):
                The token at `position`; positions of the condition ignore it.
            position (`torch.LongTensor` of shape `()` or `(batch_size,)`):
                Position in [condition, image tokens in sampling order], one for all rows or one per row.
            cache (`DecodeCache`): cache of a started generation, as by `forward(..., cache=cache)`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, codebook_size)`.

        Raises:
            NotImplementedError: models must define it.
        """
        raise NotImplementedError

    def new_cache(self, num_lengths: int | None = None) -> DecodeCache:
        """Create the cache of one generation, whose steps see at most `num_lengths` lengths; by default any length."""
        max_length = self.num_condition_tokens + self.config.num_image_tokens - 1
        return DecodeCache(self.config.num_hidden_layers, max_length, num_lengths)

    def prepare_step(self, position: torch.Tensor, cache: DecodeCache) -> None:
        """Called before each decode step at `position`, for models that precompute parts of several steps in `cache`."""

    def compile_decoding(self, **options) -> None:
        """
        Compile decode steps and sampling, in place, at the next call of `generate`.

        There is one graph per number of rows and visible length, at most eight in one generation. Other guidance, temperatures
        and `top_p` use the same graphs. Turning `top_p` on or off, another `top_k`, greedy decoding and a logits processor need
        their own, as do changes of the model, such as another adapter or dtype. After more than eight changes, torch raises
        `FailOnRecompileLimitHit` until this is called again. Existing graphs ignore forward hooks that are added later.

        On CUDA, they are CUDA graphs, so call this when the model is on its device. Caches and their graphs stay in memory, one
        per number of rows and concurrent generation. torch before 2.13 records CUDA graphs only in the main thread.

        Args:
            options: options of `torch.compile`. On CUDA, `mode` is `"reduce-overhead"` by default. `disable=True` turns
                compilation off.

        Raises:
            TypeError, RuntimeError: `torch.compile` does not know the options, or they are `fullgraph` or `dynamic`, which are
                fixed.
        """
        if self.device.type == "cuda" and not {"mode", "options", "backend"} & options.keys():  # type: ignore[attr-defined]
            options["mode"] = "reduce-overhead"
        for prepare in BEFORE_COMPILING:
            prepare(self)  # type: ignore[arg-type]
        self._compiled_steps = None if options.get("disable") else CompiledSteps(**options)

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
                Sampling options that replace those in the model's own `generation_config`.
            generator (`torch.Generator` or a sequence of one per label, *optional*):
                Random generators, on any device. With one per label, an image does not depend on its batch, in float32.
            logits_processor (`LogitsProcessorList` or a list of processors, *optional*):
                Called as `(tokens so far, guided logits)` before the temperature.
            callback (`Callable`, *optional*):
                Called as `callback(step, image_tokens)` after each token. `image_tokens` is `(batch_size,
                num_image_tokens)`, with 0 for tokens that are not sampled yet, and must not be modified. Return `False` to
                stop. Return a tensor of the same shape to replace the tokens sampled so far; the model has already read
                all except the newest.
            sampling:
                The fields of [`SamplingSettings`]: `guidance_scale`, `guidance_interval`, `temperature`, `top_k`, `top_p`,
                `do_sample`. They override both configurations; None uses the configurations.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_image_tokens)`, in raster order. If the callback stopped,
            tokens that were not sampled are 0.

        Raises:
            ValueError, TypeError: arguments are invalid (checked first), or logits are not finite (checked at the end).
        """
        settings = self.sampling_settings.resolve(sampling, generation_config, self.generation_config)
        class_labels = self._as_class_labels(class_labels)
        return self._decode_tokens(class_labels, settings, generator, logits_processor, callback)

    @contextmanager
    def _cache_and_runner(self, num_rows: int) -> Iterator[tuple[DecodeCache, Callable]]:
        """The cache of a generation with `num_rows`, and the function that calls its steps."""
        compiled = self._compiled_steps
        if compiled is None:
            # No fixed lengths: reading unfilled positions slows down large batches on CPUs by up to 10 %.
            yield self.new_cache(), lambda function, *inputs: function(*inputs)
        else:
            with compiled.cache(num_rows, self.new_cache) as cache:
                yield cache, compiled

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
        The decode loop. `orders` `(batch_size, num_image_tokens)` are the raster positions of the sequence's tokens (None:
        raster order), and `known_tokens` `(batch_size, n)` its first tokens.
        """
        if type(logits_processor) is list:
            logits_processor = LogitsProcessorList(logits_processor)
        batch_size, device = class_labels.shape[0], class_labels.device
        generators = generator if isinstance(generator, Sequence) else [generator]
        if not all(isinstance(item, (torch.Generator, NoneType)) for item in generators):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, Sequence) and len(generator) != batch_size:
            raise ValueError(f"Got {len(generator)} generators for {batch_size} class labels: pass one for each.")

        num_tokens = self.config.num_image_tokens
        first_step = 0 if known_tokens is None else known_tokens.shape[1]
        guidance = settings.guidance_scales(num_tokens)
        guided_steps = max((step + 1 for step, scale in enumerate(guidance) if scale != 1), default=0)
        scales = torch.tensor(guidance, dtype=torch.float32).to(device)
        limits, choice = settings.limits(device), settings.choice
        numbers = torch.zeros(num_tokens, batch_size, device=device)
        if settings.do_sample:
            drawn_numbers = uniform_numbers(num_tokens - first_step, batch_size, generator, device)
            numbers = F.pad(drawn_numbers, (0, 0, first_step, 0))

        # One row per image and, with guidance, a second one without the class.
        labels, passes = class_labels, 1
        if guided_steps > first_step:
            labels, passes = torch.cat([labels, torch.full_like(labels, self.config.num_classes)]), 2
        model_kwargs = {} if orders is None else {"orders": orders.repeat(passes, 1)}
        tokens = class_labels.new_zeros(batch_size, num_tokens)
        if known_tokens is not None:
            tokens[:, :first_step] = known_tokens
        largest_logits = torch.zeros(batch_size, num_tokens, device=device)
        # The last position that was read.
        position = torch.tensor(self.num_condition_tokens - 1 + first_step).to(device)
        with self._cache_and_runner(len(labels)) as (cache, run):
            for step in range(first_step, num_tokens):
                if step == guided_steps:
                    passes = 1
                if step > first_step:
                    position += 1
                    self.prepare_step(position, cache)
                    cache.show(self.num_condition_tokens + step, filled=True)
                    inputs = self, tokens[:, step - 1].repeat(passes).to(position.device), position, cache
                if step > first_step and logits_processor is None:
                    drawn, largest = run(decode_and_draw, *inputs, scales, numbers, limits, choice)
                else:
                    if step > first_step:
                        logits = run(decode_step, *inputs)
                    else:
                        prefix = tokens[:, :step].repeat(passes, 1)
                        logits = self(labels, prefix, cache=cache, **model_kwargs).logits[:, -1]  # type: ignore[operator]
                    process = None if logits_processor is None else partial(logits_processor, tokens[:, :step])  # type: ignore[arg-type]
                    index = position - (self.num_condition_tokens - 1)
                    drawn, largest = draw_tokens(logits, index, scales, numbers, limits, choice, process)
                    # An offloaded model computes on the device to which its first inputs were moved.
                    device = cache.condition_embeds.device
                    position, limits = position.to(device), limits.to(device)
                    scales, numbers = scales.to(device), numbers.to(device)
                tokens[:, step], largest_logits[:, step] = drawn, largest
                answer = None if callback is None else callback(step, to_raster(tokens, orders))
                if answer is False:
                    break
                if not (answer is None or answer is True):
                    self._check_image_tokens(answer, class_labels)
                    tokens.copy_(answer if orders is None else answer.take_along_dim(orders, dim=1))

            # NaN survives every operation above, so one check at the end, the loop's only synchronization, finds it.
            if not largest_logits.isfinite().all():
                raise ValueError(
                    "The logits are not finite: the weights contain NaN, float16 overflows (load the model in float32 or "
                    "bfloat16), or a logits processor forbade every token."
                )
        return to_raster(tokens, orders)

    def _as_class_labels(self, class_labels: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Validate labels. A list is moved to the model's device; an offloaded model moves its inputs itself."""
        if not isinstance(class_labels, torch.Tensor):
            try:
                class_labels = torch.as_tensor(class_labels)
            except (RuntimeError, TypeError, ValueError) as error:
                raise TypeError(
                    f"class_labels are class numbers, got {class_labels!r}: VFMTokPipeline takes names."
                ) from error
            if self.device.type != "meta":  # type: ignore[attr-defined]
                class_labels = class_labels.to(self.device)  # type: ignore[attr-defined]
        if not class_labels.numel():
            raise ValueError("There are no class labels: pass at least one.")
        self._check_class_labels(class_labels, wait_for_device=True)
        return class_labels

    def _tokens_to_score(
        self, image_tokens: torch.Tensor | None, labels: torch.Tensor | None, return_loss: bool | None
    ) -> tuple[torch.Tensor, bool]:
        """The image tokens of `forward`, under either name, and whether to compute their loss."""
        if image_tokens is None and labels is None:
            raise ValueError(
                "image_tokens are missing: pass all tokens of one image per label, or the same as labels."
            )
        wanted = self.training if return_loss is None else return_loss  # type: ignore[attr-defined]
        return labels if image_tokens is None else image_tokens, labels is not None or wanted  # type: ignore[return-value]

    def _check_class_labels(self, class_labels: torch.Tensor, wait_for_device: bool = False) -> None:
        check_tensor("class_labels", class_labels)
        if class_labels.ndim != 1:
            raise ValueError(f"class_labels must have shape (batch_size,), got {tuple(class_labels.shape)}.")
        # The null class, one past the last label, is a valid condition.
        check_ids("class_labels", class_labels, self.config.num_classes + 1, wait_for_device)

    def _check_image_tokens(
        self, image_tokens: torch.Tensor, class_labels: torch.Tensor, wait_for_device: bool = False
    ) -> None:
        check_tensor("image_tokens", image_tokens)
        shape = (class_labels.shape[0], self.config.num_image_tokens)
        if tuple(image_tokens.shape) != shape:
            raise ValueError(
                f"image_tokens must have shape {shape}, all tokens of one image per label, got {tuple(image_tokens.shape)}."
            )
        check_ids("image_tokens", image_tokens, self.config.codebook_size, wait_for_device)


__all__ = ["SamplingSettings", "VFMTokGenerationMixin", "VFMTokGeneratorOutput"]
