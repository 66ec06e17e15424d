"""
Sampling image tokens: guidance, filters, the key/value cache and the decode loop that both generators share.

The order of operations is that of https://github.com/CVMI-Lab/VFMTok (autoregressive/models/generate.py, after
LlamaGen) and of RAR: guidance, then temperature, then top-k, then top-p, then one draw. Nothing in the loop waits for
the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList


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


def apply_guidance(logits: torch.Tensor, scale: float) -> torch.Tensor:
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


def uniform_numbers(
    num_rows: int, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> torch.Tensor:
    """
    `(num_rows, 1)` float64 numbers in [0, 1), drawn where the generator lives, so that a CPU seed means the same on any
    device. With a list each row draws from its own generator, hence the same number in any split of the batch.
    """
    if isinstance(generator, Sequence):
        return torch.cat([uniform_numbers(1, row_generator, device) for row_generator in generator])
    source = device if generator is None else generator.device
    return torch.rand(num_rows, 1, generator=generator, dtype=torch.float64, device=source).to(device)


def sample_tokens(
    logits: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """
    Draw one token per row of `(batch_size, codebook_size)` logits: `(batch_size,)` int64.

    The first token at which the sum of the probabilities exceeds a uniform number: one random number a row, where
    `torch.multinomial` draws one a token and takes longer than a layer of the model. It never waits for the device.
    The sums are float64, so that the rarest token keeps its probability.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    thresholds = uniform_numbers(len(logits), generator, logits.device) * cumulative[:, -1:]
    # Where NaN compares with nothing the result lies past the end; the decode loop reports it after its last step.
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class SamplingSettings:
    """What one call of `generate` asks for, checked as a whole. The defaults sample without guidance or filters."""

    guidance_scale: float = 1.0
    guidance_interval: int | None = None
    guidance_scale_pow: float = 1.0
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
        if not 0 <= self.guidance_scale_pow < math.inf:
            raise ValueError(f"guidance_scale_pow must be 0 (constant) or larger, got {self.guidance_scale_pow}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}. For greedy use do_sample=False.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or larger, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], where 1 is off, got {self.top_p}.")

    @classmethod
    def resolve(cls, generation_config: GenerationConfig, **requested) -> "SamplingSettings":
        """
        Each setting from the call, else from generation_config.json, else the default above.

        transformers' own fallbacks (`top_k=50`, greedy) are never consulted: an unset field of its config is None.
        """
        chosen = {
            name: getattr(generation_config, name, None) if value is None else value
            for name, value in requested.items()
        }
        return cls(**{name: value for name, value in chosen.items() if value is not None})

    @property
    def effective_guidance_scale(self) -> float:
        """At most 1 means no guidance, as in diffusers; RAR's original writes it 0."""
        return max(float(self.guidance_scale), 1.0)

    def filter(self, logits: torch.Tensor) -> torch.Tensor:
        """Temperature, top-k and top-p on `(batch_size, codebook_size)` logits; removed tokens become -inf."""
        logits = logits / self.temperature
        if self.top_k > 0:
            logits = filter_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = filter_top_p(logits, self.top_p)
        return logits


# ---------------------------------------------------------------------------------------------------------------
# Key/value cache


class LayerCache:
    """
    Keys and values of one attention layer in memory that is allocated once.

    The allocation waits for the first keys and takes batch, heads, dtype and device from them, so that autocast and
    offloading need no word here. On CPUs it is float32 at least: of half precision torch's products want dense operands
    there, and copy the filled part of the cache in every step.
    """

    keys: torch.Tensor
    values: torch.Tensor
    # What is stored is what a new position may see. A cache that returns more than that says here what to leave out.
    attention_mask: torch.Tensor | None = None

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `(batch_size, heads, new_length, head_dim)` keys and values; returns views of all so far, in its own dtype."""
        if self.length == 0:
            batch_size, num_heads, _, head_dim = keys.shape
            dtype = torch.promote_types(keys.dtype, torch.float32) if keys.is_cpu else keys.dtype
            self.keys = keys.new_empty(batch_size, num_heads, self.max_length, head_dim, dtype=dtype)
            self.values = torch.empty_like(self.keys)
        start, self.length = self.length, self.length + keys.shape[2]
        if start > 0 and keys.shape[2] > 1:
            raise ValueError("A cache that holds a prefix takes one position at a time: its attention has no mask.")
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep_rows(self, batch_size: int) -> None:
        """Forget all rows but the first `batch_size`."""
        self.keys, self.values = self.keys[:batch_size], self.values[:batch_size]


class KeyValueCache:
    """One [`LayerCache`] per layer, for sequences of at most `max_length`."""

    def __init__(self, num_layers: int, max_length: int):
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions stored."""
        return self.layers[0].length

    def keep_rows(self, batch_size: int) -> None:
        """Forget all rows but the first `batch_size`."""
        for layer in self.layers:
            layer.keep_rows(batch_size)


# ---------------------------------------------------------------------------------------------------------------
# The decode loop


def apply_jointly(layers: Sequence[nn.Module], hidden_states: torch.Tensor) -> Sequence[torch.Tensor]:
    """The output of each layer. Layers that were packed together for inference compute theirs in one product."""
    product = getattr(layers[0], "joint_product", None)
    return [layer(hidden_states) for layer in layers] if product is None else product(hidden_states)


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


def to_raster(sequence: torch.Tensor, orders: torch.Tensor | None) -> torch.Tensor:
    """Put `(batch_size, length)` entries, of which entry j belongs to raster position `orders[:, j]`, in place."""
    return sequence if orders is None else torch.zeros_like(sequence).scatter(1, orders, sequence)


def call_layer(layer: nn.Module, *inputs: Any) -> torch.Tensor:
    """What a layer of a decode step computes, unless `compile_decoding` put its translation in this function's place."""
    return layer(*inputs)


class RowProducts(TorchFunctionMode):
    """
    Linear layers of a single row as sums over products, in float32. torch.compile makes of that one pass over the weight
    that reads it faster than the libraries' matrix products do (docs/performance.md).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].is_cpu and args[0].shape[:-1].numel() == 1:
            states, weight, bias = args
            product = (states[..., None, :].float() * weight.float()).sum(-1).to(states.dtype)
            return product if bias is None else product + bias
        return function(*args, **(kwargs or {}))


class VFMTokGenerationMixin(GenerationMixin):
    """
    `generate` for models that predict image tokens from class labels.

    The model's `forward(class_labels, image_tokens, cache=...)` returns the logits of the token that follows
    `image_tokens`, computing only what the cache does not hold yet.
    """

    config: Any
    output_modalities = ("image",)
    # Positions of the sequence before the first image token.
    num_condition_tokens = 1
    cache_class: type[KeyValueCache] = KeyValueCache
    _decode_layer = staticmethod(call_layer)

    def compile_decoding(self, **options) -> None:
        """
        Let `torch.compile` translate the decode steps, in place, at the next call of `generate`.

        A layer is translated once for all layers, steps, batch sizes and guidance, and once more for a single row, which
        torch always treats apart; so is the output head. The first steps, whose sizes torch would translate apart too,
        stay as they are.

        Args:
            options: for `torch.compile`, such as `backend` or `mode`.

        Raises:
            ValueError: the weights are packed, which torch.compile cannot read.
        """
        if any(hasattr(module, "joint_product") for module in self.modules()):  # type: ignore[attr-defined]
            raise ValueError("torch.compile cannot read packed weights: call unpack_weights(model) first.")

        def decode_layer(layer: nn.Module, *inputs: Any) -> torch.Tensor:
            with RowProducts():
                return layer.forward(*inputs)

        compiled = torch.compile(decode_layer, dynamic=True, fullgraph=True, **options)

        def run(layer: nn.Module, *inputs: Any) -> torch.Tensor:
            # Sizes that happen to be equal, of the batch and of the first step translated, are not to stay equal.
            with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return compiled(layer, *inputs)

        self._decode_layer = run

    def _layer_function(self, cache: KeyValueCache | None) -> Callable[..., torch.Tensor]:
        """Calls a layer: the translation of `compile_decoding` once a cache holds the condition and a token."""
        is_decode_step = cache is not None and cache.length > self.num_condition_tokens
        return self._decode_layer if is_decode_step else call_layer

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        class_labels: torch.Tensor | Sequence[int],
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        callback: Callable[[int, torch.Tensor], bool | torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """
        Sample the image tokens of one image per class label.

        Settings left at None come from the model's `generation_config`, else from the default named here.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, or a list):
                Labels in 0 to `num_classes - 1`; `num_classes` is the null class (no condition).
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance. Up to 1 there is none, and each step is a single pass over the batch.
            guidance_interval (`int`, *optional*):
                Guide only the first `guidance_interval + 2` tokens. Later steps skip the unconditional half.
            temperature (`float`, defaults to 1.0), top_k (`int`, defaults to 0: off), top_p (`float`, defaults to 1.0):
                Applied in this order after guidance.
            do_sample (`bool`, defaults to `True`):
                `False` takes the most probable token.
            generator (`torch.Generator` or a sequence of one per label, *optional*):
                Source of randomness, on any device. With one per label an image does not depend on its batch.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called as `(tokens so far, guided logits)` before the temperature.
            callback (`Callable`, *optional*):
                Called as `callback(step, image_tokens)` after each token; `image_tokens` is `(batch_size,
                num_image_tokens)` with 0 where nothing is drawn yet, and must not be changed. Returning `False` stops.
                Returning a tensor like it replaces the tokens drawn so far, of which the model has read all but the newest.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_image_tokens)`, in raster order. After a stop by the
            callback the tokens not drawn are 0.

        Raises:
            ValueError, TypeError: unusable arguments, before any work; logits that are not finite, at the end.
        """
        settings = SamplingSettings.resolve(
            self.generation_config,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
        )
        class_labels = self._as_class_labels(class_labels)
        scales = constant_guidance(
            self.config.num_image_tokens, settings.effective_guidance_scale, settings.guidance_interval
        )
        return self._decode_tokens(class_labels, scales, settings, generator, logits_processor, callback)

    def _decode_tokens(
        self,
        class_labels: torch.Tensor,
        scales: list[float],
        settings: SamplingSettings,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        logits_processor: LogitsProcessorList | None,
        callback: Callable[[int, torch.Tensor], bool | torch.Tensor | None] | None,
        orders: torch.Tensor | None = None,
        known_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The loop. `scales` has a guidance scale per step, `orders` `(batch_size, num_image_tokens)` the raster position
        of each token of the sequence (None: raster), `known_tokens` `(batch_size, n)` the sequence's first tokens.
        """
        batch_size = class_labels.shape[0]
        if isinstance(generator, Sequence) and len(generator) != batch_size:
            raise ValueError(f"Got {len(generator)} generators for {batch_size} class labels: pass one for each.")

        num_tokens = self.config.num_image_tokens
        first_step = 0 if known_tokens is None else known_tokens.shape[1]
        guided_steps = max((step + 1 for step, scale in enumerate(scales) if scale != 1), default=0)

        # One row per image and, while guidance lasts, a second one for its unconditional twin.
        labels, num_passes = class_labels, 1
        if guided_steps > first_step:
            labels, num_passes = torch.cat([labels, torch.full_like(labels, self.config.num_classes)]), 2
        tokens = labels.new_zeros(len(labels), num_tokens)
        if known_tokens is not None:
            tokens[:, :first_step] = known_tokens.repeat(num_passes, 1)
        model_kwargs = {} if orders is None else {"orders": orders.repeat(num_passes, 1)}
        cache = self.cache_class(self.config.num_hidden_layers, self.num_condition_tokens + num_tokens - 1)
        largest_logits = torch.zeros(batch_size, num_tokens, device=labels.device)

        for step in range(first_step, num_tokens):
            if step == guided_steps and num_passes == 2:
                num_passes, labels, tokens = 1, labels[:batch_size], tokens[:batch_size]
                model_kwargs = {name: rows[:batch_size] for name, rows in model_kwargs.items()}
                cache.keep_rows(batch_size)
            logits = self(labels, tokens[:, :step], cache=cache, **model_kwargs).logits[:, -1]  # type: ignore[operator]
            if num_passes == 2:
                logits = apply_guidance(logits, scales[step])
            if logits_processor is not None:
                logits = logits_processor(tokens[:batch_size, :step], logits)  # type: ignore[arg-type]
            if settings.do_sample:
                logits = settings.filter(logits)
                drawn = sample_tokens(logits, generator)
            else:
                drawn = logits.argmax(dim=-1)
            largest_logits[:, step] = logits.amax(dim=-1)
            tokens[:, step] = drawn.repeat(num_passes)
            answer = None if callback is None else callback(step, to_raster(tokens[:batch_size], orders))
            if answer is False:
                break
            if isinstance(answer, torch.Tensor):
                self._check_image_tokens(answer, class_labels)
                changed = answer if orders is None else answer.take_along_dim(orders, dim=1)
                tokens = changed.to(tokens.device).repeat(num_passes, 1)

        # NaN survives every operation above, so that one look at the end, the loop's only wait, finds it.
        if not largest_logits.isfinite().all():
            raise ValueError(
                "The logits were not finite: the weights hold NaN, float16 overflows (load the model in float32 or "
                "bfloat16), or a logits processor forbade every token."
            )
        return to_raster(tokens[:batch_size], orders)

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
