"""
The randomized-order image generator: class label -> image tokens in any order (arXiv 2507.08441 on RAR, 2411.00776).

[start token, class, image tokens in the given order] -> causal transformer whose layers are modulated by class and
step (adaptive layer norm) -> logits over the image tokenizer's codebook. A second position embedding encodes the image
position to predict next. Training shuffles that order, and sampling can choose it.

The computation follows https://github.com/CVMI-Lab/VFMTok-RAR (modeling/rar.py, Apache-2.0), which is the RAR of
https://github.com/bytedance/1d-tokenizer (Apache-2.0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .attention_vfmtok import causal_mask, eager_attention_forward
from .cache_vfmtok import DecodeCache, LayerCache, at_position
from .class_embeddings_vfmtok import ClassEmbeddingsMixin, check_ids, check_tensor, drop_labels
from .class_names_vfmtok import ClassNames  # noqa: F401 - for the Hub, as CONTRIBUTING.md says
from .configuration_vfmtok_rar import VFMTokRARConfig
from .generation_vfmtok import (
    SamplingSettings,
    VFMTokGenerationMixin,
    VFMTokGeneratorOutput,
    power_cosine_guidance,
)
from .loading_vfmtok import CheckedModelMixin
from .outputs_vfmtok import VFMTokModelOutput  # noqa: F401 - for the Hub


# Rows (images x steps) in one matmul of a modulation while decoding. With this many, the matmul is limited by arithmetic
# and not by reading the weight, and its results, 6 * hidden_size numbers per row and layer, are still small.
ROWS_OF_MODULATIONS = 128


@dataclass(frozen=True)
class VFMTokRARSamplingSettings(SamplingSettings):
    """Sampling options with power-cosine guidance."""

    guidance_scale_pow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.guidance_scale_pow < inf:
            raise ValueError(f"guidance_scale_pow must be 0 (constant) or larger, got {self.guidance_scale_pow}.")

    def guidance_scales(self, num_steps: int) -> list[float]:
        """The guidance scale of each of `num_steps` steps."""
        power, interval = self.guidance_scale_pow, self.guidance_interval
        return power_cosine_guidance(num_steps, self.effective_guidance_scale, power, interval)


def draw_orders(batch_size: int, num_tokens: int, random_ratio: float, device: torch.device) -> torch.Tensor:
    """Orders `(batch_size, num_tokens)`: each row is random with probability `random_ratio`, otherwise raster."""
    shuffled = torch.rand(batch_size, num_tokens, device=device).argsort(dim=-1)
    is_random = torch.rand(batch_size, 1, device=device) < random_ratio
    return torch.where(is_random, shuffled, torch.arange(num_tokens, device=device))


def keep_first(orders: torch.Tensor, keep_mask: torch.Tensor) -> torch.Tensor:
    """Move the positions in `keep_mask` `(num_tokens,)` to the front of each order, and keep the order otherwise."""
    return orders.take_along_dim((~keep_mask)[orders].int().argsort(dim=1, stable=True), dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Transformer


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return hidden_states * (1 + scale) + shift


def modulation_at(index: torch.Tensor, modulations: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Entry `index` `(1,)` of `(positions, rows, size)` modulations, on their device: `(num_rows, 1, size)`."""
    return modulations.index_select(0, index.to(modulations.device))[0, :num_rows, None]


class VFMTokRARModulation(nn.Linear):
    """Shifts, scales and gates from the condition. They are initially zero, which makes every layer the identity."""


class VFMTokRARAttention(nn.Module):
    """Causal self-attention whose queries and keys are layer-normalized per head."""

    is_causal = True

    def __init__(self, config: VFMTokRARConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        position: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        # (batch, length, hidden) -> (batch, heads, length, head_dim)
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, position, attention_mask)
        attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, _ = attention(
            self, query.to(key.dtype), key, value, attention_mask, scaling=self.scaling, dropout=dropout
        )
        return self.dropout(self.o_proj(attended.flatten(-2).to(hidden_states.dtype)))


class VFMTokRARMLP(nn.Module):
    def __init__(self, config: VFMTokRARConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(hidden_states)))))


class VFMTokRARDecoderLayer(GradientCheckpointingLayer):
    """
    Attention and MLP, each with a modulated layer norm, and added to its input through a gate.

    The layer computes the modulation from the condition `(batch_size, length, hidden_size)`, so gradient checkpointing does
    not store it; it is 6 times as large. A decode step passes a precomputed modulation instead.
    """

    def __init__(self, config: VFMTokRARConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VFMTokRARAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VFMTokRARMLP(config)
        self.modulation = VFMTokRARModulation(config.hidden_size, 6 * config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None,
        modulation: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        position: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        modulation = self.modulation(condition) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        normed = modulate(self.norm1(hidden_states), shift1, scale1)
        hidden_states = hidden_states + gate1 * self.self_attn(normed, attention_mask, cache, position)
        return hidden_states + gate2 * self.mlp(modulate(self.norm2(hidden_states), shift2, scale2))


class VFMTokRARForImageGeneration(CheckedModelMixin, PreTrainedModel, VFMTokGenerationMixin, ClassEmbeddingsMixin):  # type: ignore[misc]
    """
    Class-conditional generator of VFMTok image tokens in any order.

    `forward` computes logits and loss of given tokens; `generate` samples, in raster order by default, and can repaint a
    part of an image.
    """

    config: VFMTokRARConfig
    config_class = VFMTokRARConfig
    base_model_prefix = "generator"
    main_input_name = "class_labels"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Including the modulation, which decode steps call from outside of its layer.
    _no_split_modules = ["VFMTokRARDecoderLayer", "VFMTokRARModulation"]
    num_condition_tokens = 2
    sampling_settings = VFMTokRARSamplingSettings

    def __init__(self, config: VFMTokRARConfig):
        super().__init__(config)
        # The base class derives one from `config` that loses our own settings when it is saved and loaded.
        self.generation_config = GenerationConfig(guidance_interval=None, guidance_scale_pow=None)
        # Image tokens, an unused mask token that RAR inherited, the classes, the null class.
        self.embed_tokens = nn.Embedding(config.codebook_size + config.num_classes + 2, config.hidden_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        # Rows 0 and 1 are the start token and the class, row 2 + i is image position i.
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_position_embeddings, config.hidden_size))
        self.target_position_embeddings = nn.Parameter(torch.empty_like(self.position_embeddings))
        self.timestep_embeddings = nn.Parameter(torch.empty(1, config.num_timestep_embeddings, config.hidden_size))
        self.layers = nn.ModuleList(VFMTokRARDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm_modulation = VFMTokRARModulation(config.hidden_size, 2 * config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.codebook_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VFMTokRARModulation):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.trunc_normal_(module.weight, std=std)
        elif module is self:
            init.trunc_normal_(self.cls_token, std=std)
            init.trunc_normal_(self.position_embeddings, std=std)
            init.trunc_normal_(self.target_position_embeddings, std=std)
            init.trunc_normal_(self.timestep_embeddings, std=std)

    def class_embedding_table(self) -> tuple[nn.Embedding, int]:
        """The table, and the row of class 0."""
        return self.embed_tokens, self.config.codebook_size + 1

    def embed_positions(self, orders: torch.Tensor | None, length: int) -> torch.Tensor:
        """
        Position embeddings of [start token, class, image tokens in the given order], which are added to the token embeddings:
        of the position itself and of the next position, which is predicted.

        Args:
            orders (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*): raster order if unset.
            length (`int`): number of positions.

        Returns:
            `torch.Tensor` of shape `(batch_size, length, hidden_size)`, or `(1, length, hidden_size)` without `orders`.
        """
        rows = torch.arange(self.config.num_image_tokens + 2, device=self.position_embeddings.device)[None]
        if orders is not None:
            rows = torch.cat([rows[:, :2].expand(orders.shape[0], -1), orders + 2], dim=1)
        # The start token predicts nothing, and the last token of an image has no next position.
        targets = F.embedding(rows[:, 2 : length + 1], self.target_position_embeddings[0])
        targets = F.pad(targets, (0, 0, 1, length - 1 - targets.shape[1]))
        return F.embedding(rows[:, :length], self.position_embeddings[0]) + targets

    def embed_condition(self, class_labels: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 2, hidden_size)`: start token and class of `class_labels` `(batch_size,)`."""
        class_embeds = self.embed_tokens(class_labels + self.config.codebook_size + 1)[:, None]
        return torch.cat([self.cls_token.expand(class_labels.shape[0], -1, -1), class_embeds], dim=1)

    def begin(self, cache: DecodeCache, condition_embeds: torch.Tensor, orders: torch.Tensor | None = None) -> None:
        """Store `condition_embeds`, the output of `embed_condition`, and `orders`, as in `forward`, in `cache` for decode steps."""
        cache.store("condition_embeds", condition_embeds)
        position_embeds = self.embed_positions(orders, cache.max_length)
        if cache.length_step > 1:  # compiled steps, which need the same shape with and without orders
            position_embeds = position_embeds.expand(condition_embeds.shape[0], -1, -1).contiguous()
        cache.store("position_embeds", position_embeds)
        timesteps = self.timestep_embeddings[0, : cache.max_length, None]
        cache.store("conditions", F.silu(condition_embeds[:, 1] + timesteps))
        cache.modulated_steps = 0

    def prepare_step(self, position: torch.Tensor, cache: DecodeCache) -> None:
        """Refill the precomputed modulations in `cache` from `position` on, if they are used up."""
        if cache.modulated_steps == 0:
            num_positions, num_rows = cache.conditions.shape[:2]
            size = min(max(ROWS_OF_MODULATIONS // num_rows, 1), num_positions - self.num_condition_tokens)
            self.modulate_positions(cache, position.to(cache.conditions.device), size)
            cache.modulated_steps = size
        cache.modulated_steps -= 1

    def modulate_positions(self, cache: DecodeCache, start: torch.Tensor, size: int) -> None:
        """
        Precompute the modulations of `size` positions from `start` `()` or `(rows,)` in `cache`. They depend only on class
        and position, so one matmul computes many steps. Positions come first, so those of a step are contiguous.
        """
        last = len(cache.conditions) - 1
        if start.ndim == 0:
            positions = start + torch.arange(size, device=start.device)
            conditions = cache.conditions.index_select(0, positions.clamp(max=last))
        else:
            positions = start + torch.arange(size, device=start.device)[:, None]
            conditions = cache.conditions.take_along_dim(positions.clamp(max=last)[..., None], dim=0)
        cache.store("first_modulated", start.clone())
        cache.store("norm_modulations", self.norm_modulation(conditions))
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            # A device map may place a layer on another device, which is that of its keys.
            layer_cache.store("modulations", layer.modulation(conditions.to(layer_cache.keys.device)))  # type: ignore[operator, arg-type]

    def decode_sequence(
        self,
        class_labels: torch.Tensor,
        sequence: torch.Tensor,
        orders: torch.Tensor | None = None,
        cache: DecodeCache | None = None,
    ) -> torch.Tensor:
        """
        Hidden states after the final norm.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch_size,)`): the condition.
            sequence (`torch.LongTensor` of shape `(batch_size, length)`): the first tokens in the given order; `length` may
                be 0.
            orders (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*): raster position of every
                token of the sequence, including future ones. Defaults to raster order.
            cache (`DecodeCache`, *optional*): cache of a generation, which decode steps continue.

        Returns:
            `torch.Tensor` of shape `(batch_size, length + 1, hidden_size)`. The state of a position of [class, sequence]
            predicts the next token of the order.
        """
        condition_embeds = self.embed_condition(class_labels)
        if cache is not None:
            self.begin(cache, condition_embeds, orders)
        hidden_states = torch.cat([condition_embeds, self.embed_tokens(sequence)], dim=1)
        length = hidden_states.shape[1]
        hidden_states = hidden_states + self.embed_positions(orders, length)
        condition = F.silu(condition_embeds[:, 1:] + self.timestep_embeddings[:, :length])
        attention_mask = causal_mask(self.config, hidden_states)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            hidden_states = layer(hidden_states, condition, None, attention_mask, layer_cache)
        return self.norm_out(hidden_states, self.norm_modulation(condition))[:, 1:]

    def decode_step(self, tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """Arguments as in [`VFMTokGenerationMixin.decode_step`]. Position 0 is the start token, 1 the class."""
        # Rows at different positions started their modulations equally many steps ago.
        num_rows, index = tokens.shape[0], (position - cache.first_modulated).reshape(-1)[:1]
        hidden_states = cache.embeds_at(position, self.embed_tokens(tokens))[:, None]
        hidden_states = hidden_states + at_position(cache.position_embeds[:num_rows], position)
        layer_position, attention_mask = cache.position_and_mask(position)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            modulation = modulation_at(index, layer_cache.modulations, num_rows)  # type: ignore[arg-type]
            hidden_states = layer(hidden_states, None, modulation, attention_mask, layer_cache, layer_position)
        modulation = modulation_at(index, cache.norm_modulations, num_rows)
        return self.lm_head(self.norm_out(hidden_states, modulation))[:, 0].float()

    def norm_out(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """The final norm of `hidden_states`, with shift and scale from `modulation`."""
        scale, shift = modulation.chunk(2, dim=-1)
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.config.layer_norm_eps)
        return modulate(normed, shift, scale)

    @can_return_tuple
    def forward(
        self,
        class_labels: torch.Tensor,
        image_tokens: torch.Tensor | None = None,
        return_loss: bool | None = None,
        orders: torch.Tensor | None = None,
        random_ratio: float = 0.0,
        cache: DecodeCache | None = None,
        labels: torch.Tensor | None = None,
    ) -> VFMTokGeneratorOutput:
        """
        Args:
            class_labels (`torch.LongTensor` of shape `(batch_size,)`):
                Labels in 0 to `num_classes - 1`, or `num_classes` for no condition. In training mode, each is replaced with the
                latter with probability `class_dropout`.
            image_tokens (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`):
                Image tokens, always in raster order, like the logits: `logits[:, i]` predicts `image_tokens[:, i]`. With
                `cache`, only the first ones of the order, at most `num_image_tokens - 1`.
            return_loss (`bool`, *optional*):
                Whether to compute the cross-entropy of `image_tokens`. Defaults to whether the model is in training mode.
            orders (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*):
                Permutations: entry j is the raster position predicted at step j.
            random_ratio (`float`, defaults to 0.0):
                Without `orders`: probability of a random instead of raster order, per image. RAR's training starts at 1 and
                decreases it to 0.
            cache (`DecodeCache`, *optional*):
                Starts a generation with a cache from `new_cache()`. The output then has a single position, which predicts the
                token after `image_tokens`, and `decode_step` continues.
            labels (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*):
                The `image_tokens` under the name that transformers' `Trainer` uses, with their loss.

        Raises:
            ValueError: `image_tokens` and `labels` are both missing, or their shape or range is wrong.
        """
        image_tokens, return_loss = self._tokens_to_score(image_tokens, labels, return_loss)
        if cache is not None:
            hidden_states = self.decode_sequence(class_labels, image_tokens, orders, cache)[:, -1:]
            return VFMTokGeneratorOutput(logits=self.lm_head(hidden_states).float())

        self._check_class_labels(class_labels)
        self._check_image_tokens(image_tokens, class_labels)
        if self.training:
            class_labels = drop_labels(class_labels, self.config.class_dropout, self.config.num_classes)
        if orders is not None:
            self._check_orders(orders, len(class_labels))
        elif random_ratio > 0:
            orders = draw_orders(len(image_tokens), image_tokens.shape[1], random_ratio, image_tokens.device)
        sequence = image_tokens if orders is None else image_tokens.take_along_dim(orders, dim=1)
        hidden_states = self.decode_sequence(class_labels, sequence[:, :-1], orders)
        if orders is not None:
            hidden_states = hidden_states.take_along_dim(orders.argsort(dim=1)[..., None], dim=1)
        logits = self.lm_head(hidden_states).float()
        loss = F.cross_entropy(logits.flatten(0, 1), image_tokens.flatten()) if return_loss else None
        return VFMTokGeneratorOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        class_labels: torch.Tensor | Sequence[int],
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        callback: Callable[[int, torch.Tensor], bool | torch.Tensor | None] | None = None,
        orders: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        **sampling,
    ) -> torch.Tensor:
        """
        Sample the image tokens of one image per class label, or repaint a part of given images.

        Arguments, result and errors as in [`VFMTokGenerationMixin.generate`], with two differences: guidance increases
        along the power-cosine schedule from 1 to `guidance_scale`, and a logits processor gets the tokens so far in
        sampling order.

        Args:
            orders (`torch.LongTensor` of shape `(batch_size, num_image_tokens)` or `(num_image_tokens,)`, *optional*):
                Permutations: entry j is the raster position sampled at step j. Defaults to raster order.
            image_tokens (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`, *optional*):
                Tokens of images to edit, in raster order. Needs `keep_mask`.
            keep_mask (`torch.BoolTensor` of shape `(num_image_tokens,)`, *optional*):
                True for `image_tokens` to keep. They always come first in the order, so every sampled token attends to all of
                them; the model reads them in one pass.
            sampling:
                Also `guidance_scale_pow` (`float`, defaults to 1.0), the power of the schedule. A larger power increases later; 0
                is constant guidance.
        """
        settings = self.sampling_settings.resolve(sampling, generation_config, self.generation_config)
        class_labels = self._as_class_labels(class_labels)
        if orders is not None:
            if isinstance(orders, torch.Tensor) and orders.shape[:-1] in ((), (1,)):
                orders = orders.expand(len(class_labels), -1)
            self._check_orders(orders, len(class_labels), wait_for_device=True)
        known_tokens = None
        if image_tokens is not None and keep_mask is not None:
            self._check_image_tokens(image_tokens, class_labels, wait_for_device=True)
            self._check_keep_mask(keep_mask)
            if orders is None:
                orders = torch.arange(len(keep_mask), device=image_tokens.device).expand_as(image_tokens)
            orders = keep_first(orders, keep_mask)
            known_tokens = image_tokens.take_along_dim(orders[:, : int(keep_mask.sum())], dim=1)
        elif image_tokens is not None or keep_mask is not None:
            raise ValueError(
                "Pass image_tokens and keep_mask together: the tokens to edit, and which of them to keep."
            )
        return self._decode_tokens(class_labels, settings, generator, logits_processor, callback, orders, known_tokens)

    def _check_orders(self, orders: torch.Tensor, batch_size: int, wait_for_device: bool = False) -> None:
        check_tensor("orders", orders)
        num_tokens = self.config.num_image_tokens
        if tuple(orders.shape) != (batch_size, num_tokens):
            raise ValueError(f"orders must have shape {(batch_size, num_tokens)}, got {tuple(orders.shape)}.")
        check_ids("orders", orders, num_tokens, wait_for_device)
        if (orders.is_cpu or wait_for_device) and not torch.compiler.is_compiling():
            if (orders.sort(dim=1).values != torch.arange(num_tokens, device=orders.device)).any():
                raise ValueError(f"Each row of orders must contain every position from 0 to {num_tokens - 1} once.")

    def _check_keep_mask(self, keep_mask: torch.Tensor) -> None:
        check_tensor("keep_mask", keep_mask)
        if keep_mask.dtype != torch.bool or tuple(keep_mask.shape) != (self.config.num_image_tokens,):
            raise ValueError(
                f"keep_mask must be bool of shape ({self.config.num_image_tokens},), one mask for the whole batch, got "
                f"{keep_mask.dtype} of shape {tuple(keep_mask.shape)}."
            )


__all__ = ["VFMTokRARForImageGeneration", "VFMTokRARSamplingSettings"]
