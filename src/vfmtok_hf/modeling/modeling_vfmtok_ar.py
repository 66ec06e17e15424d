"""
The next-token image generator: class label -> image tokens in raster order (arXiv 2507.08441).

class label -> class embedding at position 0, followed by the image tokens -> causal transformer (RMS norm,
2-D rotary embedding, SwiGLU) -> logits over the image tokenizer's codebook.

The computation follows https://github.com/CVMI-Lab/VFMTok (autoregressive/models/gpt.py, Apache-2.0), which is
LlamaGen's GPT (MIT).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .attention_vfmtok import causal_mask, eager_attention_forward
from .cache_vfmtok import DecodeCache, LayerCache
from .class_embeddings_vfmtok import ClassEmbeddingsMixin, drop_labels
from .class_names_vfmtok import ClassNames  # noqa: F401 - for the Hub, as CONTRIBUTING.md says
from .configuration_vfmtok_ar import VFMTokARConfig
from .generation_vfmtok import VFMTokGenerationMixin, VFMTokGeneratorOutput
from .loading_vfmtok import CheckedModelMixin
from .outputs_vfmtok import VFMTokModelOutput  # noqa: F401 - for the Hub
from .rotary_vfmtok import apply_rotary, rotary_table


# ---------------------------------------------------------------------------------------------------------------
# Attention


class VFMTokARAttention(nn.Module):
    """Causal self-attention with rotary embedding."""

    is_causal = True

    def __init__(self, config: VFMTokARConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        position: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        # (batch, length, hidden) -> (batch, heads, length, head_dim)
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        query, key = apply_rotary(query, position_embeddings), apply_rotary(key, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, position, attention_mask)
        attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, _ = attention(
            self, query.to(key.dtype), key, value, attention_mask, scaling=self.scaling, dropout=dropout
        )
        return self.residual_dropout(self.o_proj(attended.flatten(-2).to(hidden_states.dtype)))


# ---------------------------------------------------------------------------------------------------------------
# Transformer


class VFMTokARMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: VFMTokARConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)))


class VFMTokARDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm: attention, then MLP, each added to its input."""

    def __init__(self, config: VFMTokARConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = VFMTokARAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = VFMTokARMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: LayerCache | None = None,
        position: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, position_embeddings, attention_mask, cache, position)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class VFMTokARForImageGeneration(CheckedModelMixin, PreTrainedModel, VFMTokGenerationMixin, ClassEmbeddingsMixin):  # type: ignore[misc]
    """
    Class-conditional generator of VFMTok image tokens in raster order.

    `forward` computes logits and loss of given tokens; `generate` samples.
    """

    config: VFMTokARConfig
    config_class = VFMTokARConfig
    base_model_prefix = "generator"
    main_input_name = "class_labels"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VFMTokARDecoderLayer"]

    def __init__(self, config: VFMTokARConfig):
        super().__init__(config)
        # The base class derives one from `config` that loses our own settings when it is saved and loaded.
        self.generation_config = GenerationConfig(guidance_interval=None)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.codebook_size, config.hidden_size)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(VFMTokARDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            init.zeros_(module.weight)

    def class_embedding_table(self) -> tuple[nn.Embedding, int]:
        """The table, and the row of class 0."""
        return self.class_embedding, 0

    def embed_condition(self, class_labels: torch.Tensor) -> torch.Tensor:
        """`(batch_size, 1, hidden_size)`: the class of `class_labels` `(batch_size,)`."""
        return self.class_embedding(class_labels)[:, None]

    def begin(self, cache: DecodeCache, condition_embeds: torch.Tensor) -> None:
        """Store `condition_embeds`, the output of `embed_condition`, in `cache` for decode steps."""
        cache.store("condition_embeds", condition_embeds)

    def decode_sequence(
        self, class_labels: torch.Tensor, image_tokens: torch.Tensor, cache: DecodeCache | None = None
    ) -> torch.Tensor:
        """
        Hidden states after the final norm.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch_size,)`): the condition at position 0.
            image_tokens (`torch.LongTensor` of shape `(batch_size, length)`): the first tokens; `length` may be 0.
            cache (`DecodeCache`, *optional*): cache of a generation, which decode steps continue.

        Returns:
            `torch.Tensor` of shape `(batch_size, length + 1, hidden_size)`. The state of a position of [class, image
            tokens] predicts the next token.
        """
        condition_embeds = self.embed_condition(class_labels)
        if cache is not None:
            self.begin(cache, condition_embeds)
        hidden_states = torch.cat([condition_embeds, self.embed_tokens(image_tokens)], dim=1)
        hidden_states = self.token_dropout(hidden_states)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return self._run_layers(hidden_states, positions, causal_mask(self.config, hidden_states), cache)

    def decode_step(self, tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache) -> torch.Tensor:
        """Arguments as in [`VFMTokGenerationMixin.decode_step`]. Position 0 is the class."""
        hidden_states = cache.embeds_at(position, self.embed_tokens(tokens))[:, None]
        layer_position, attention_mask = cache.position_and_mask(position)
        hidden_states = self._run_layers(hidden_states, position.reshape(-1), attention_mask, cache, layer_position)
        return self.lm_head(hidden_states)[:, 0].float()

    def _run_layers(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: DecodeCache | None,
        position: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(batch_size, length, hidden_size)` embeddings to states after the final norm."""
        config = self.config
        position_embeddings = rotary_table(positions, config.grid_size, config.head_dim, config.rope_theta)
        if position is not None:  # positions of rows, not of a sequence
            position_embeddings = position_embeddings[:, :, None, None]
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            hidden_states = layer(hidden_states, position_embeddings, attention_mask, layer_cache, position)
        return self.norm(hidden_states)

    @can_return_tuple
    def forward(
        self,
        class_labels: torch.Tensor,
        image_tokens: torch.Tensor | None = None,
        return_loss: bool | None = None,
        cache: DecodeCache | None = None,
        labels: torch.Tensor | None = None,
    ) -> VFMTokGeneratorOutput:
        """
        Args:
            class_labels (`torch.LongTensor` of shape `(batch_size,)`):
                Labels in 0 to `num_classes - 1`, or `num_classes` for no condition. In training mode, each is replaced with the
                latter with probability `class_dropout`.
            image_tokens (`torch.LongTensor` of shape `(batch_size, num_image_tokens)`):
                Image tokens in raster order. With `cache`, only the first ones, at most `num_image_tokens - 1`.
            return_loss (`bool`, *optional*):
                Whether to compute the cross-entropy of `image_tokens`. Defaults to whether the model is in training mode.
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
            hidden_states = self.decode_sequence(class_labels, image_tokens, cache)[:, -1:]
            return VFMTokGeneratorOutput(logits=self.lm_head(hidden_states).float())

        self._check_class_labels(class_labels)
        self._check_image_tokens(image_tokens, class_labels)
        if self.training:
            class_labels = drop_labels(class_labels, self.config.class_dropout, self.config.num_classes)
        logits = self.lm_head(self.decode_sequence(class_labels, image_tokens[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), image_tokens.flatten()) if return_loss else None
        return VFMTokGeneratorOutput(loss=loss, logits=logits)


__all__ = ["VFMTokARForImageGeneration"]
