"""
The randomized-order generator, in raster order: class -> image tokens (VFMTok, arXiv 2507.08441, after RAR, arXiv 2411.00776).

A request is the class at positions 0 and 1, followed by image tokens. The model replaces the first by its start token; class
and position modulate every layer. The computation is that of vfmtok-hf's `VFMTokRARForImageGeneration`, which follows
https://github.com/CVMI-Lab/VFMTok-RAR.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.sequence import IntermediateTensors

from vfmtok_vllm.generator import ImageTokenGenerator, PaddedAttention


class ClassRegister(nn.Module):
    """
    Tells each token the class of its request.

    A decode step is told the last token and its position, but not the prompt. Here the cache keeps it: an attention head whose
    score is 64 at the prompt's positions and 0 elsewhere, so their weights sum up to 1 within 1e-24, and whose values are the bits
    of the class.

    Args:
        num_classes (`int`): number of labels. The null class is one more.
        vllm_config (`VllmConfig`).
        prefix (`str`): unique name with one integer.
    """

    num_bits = 32  # the smallest head for which vLLM has kernels
    score = 64.0

    def __init__(self, num_classes: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.num_classes = num_classes
        self.attn = Attention(
            1, self.num_bits, scale=1.0, num_kv_heads=1, cache_config=vllm_config.cache_config, prefix=f"{prefix}.attn"
        )
        self.register_buffer("bits", torch.arange(self.num_bits), persistent=False)

    def forward(self, labels: torch.Tensor, is_class: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """
        Args:
            labels (`torch.Tensor` of shape `(tokens,)`): labels where the token is a class, anything elsewhere.
            is_class (`torch.Tensor` of shape `(tokens,)`): where it is one.
            dtype (`torch.dtype`): of the cache.

        Returns:
            `torch.Tensor` of shape `(tokens,)`: the label of each token's request.
        """
        first = (self.bits == 0).to(dtype)
        query = first.expand(len(labels), -1).contiguous()
        key = is_class[:, None] * self.score * first
        value = ((labels[:, None] >> self.bits) & 1).to(dtype)
        read = self.attn(query, key.to(dtype), value).view(-1, self.num_bits)
        labels = ((read > 0.5).long() << self.bits).sum(dim=-1)
        # vLLM warms up without attention, so `read` may be garbage.
        return labels.clamp(min=0, max=self.num_classes)


class VFMTokRARAttention(nn.Module):
    """Causal self-attention whose queries and keys are layer-normalized per head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.width = config.head_width
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.width,
            config.num_attention_heads,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.q_norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps)
        self.k_norm = nn.LayerNorm(self.width, eps=config.layer_norm_eps)
        self.attn = PaddedAttention(self.num_heads, vllm_config, prefix)
        self.o_proj = RowParallelLinear(
            config.hidden_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.view(-1, 3, self.num_heads, self.width).unbind(1)
        return self.o_proj(self.attn(self.q_norm(query), self.k_norm(key), value))[0]


class VFMTokRARMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.fc1 = ColumnParallelLinear(
            config.hidden_size, config.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.fc1"
        )
        self.fc2 = RowParallelLinear(
            config.intermediate_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.fc2"
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)[0]))[0]


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return hidden_states * (1 + scale) + shift


class VFMTokRARDecoderLayer(nn.Module):
    """Attention and MLP, each with a layer norm that the condition modulates, and added to its input through a gate."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VFMTokRARAttention(vllm_config, f"{prefix}.self_attn")
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VFMTokRARMLP(vllm_config, f"{prefix}.mlp")
        self.modulation = ReplicatedLinear(
            config.hidden_size,
            6 * config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.modulation",
        )

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[0].chunk(6, dim=-1)
        hidden_states = hidden_states + gate1 * self.self_attn(modulate(self.norm1(hidden_states), shift1, scale1))
        return hidden_states + gate2 * self.mlp(modulate(self.norm2(hidden_states), shift2, scale2))


@support_torch_compile
class VFMTokRARForImageGeneration(ImageTokenGenerator):
    """The model. A prompt is two ids, both that of the class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, head_bias=True)
        config = self.config
        # Image tokens, an unused mask token that RAR inherited, the classes, the null class.
        self.embed_tokens = nn.Embedding(config.codebook_size + config.num_classes + 2, config.hidden_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        # Rows 0 and 1 are the start token and the class, row 2 + i is image position i.
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_position_embeddings, config.hidden_size))
        self.target_position_embeddings = nn.Parameter(torch.empty_like(self.position_embeddings))
        self.timestep_embeddings = nn.Parameter(torch.empty(1, config.num_timestep_embeddings, config.hidden_size))
        self.layers = nn.ModuleList(
            VFMTokRARDecoderLayer(vllm_config, f"layers.{index}") for index in range(config.num_hidden_layers)
        )
        self.class_register = ClassRegister(config.num_classes, vllm_config, f"layers.{config.num_hidden_layers}")
        self.norm_modulation = ReplicatedLinear(
            config.hidden_size, 2 * config.hidden_size, quant_config=self.quant_config, prefix="norm_modulation"
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(rows, hidden_size)` of token ids `(rows,)`."""
        return self.embed_tokens(input_ids + self.is_class(input_ids))  # past the mask token

    def embed_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Embeddings `(rows, hidden_size)` of the positions `(rows,)` and of the ones to predict, which the start token lacks."""
        targets = (positions + 1).clamp(max=self.config.num_position_embeddings - 1)
        target_embeds = self.target_position_embeddings[0, targets] * (positions > 0)[:, None]
        return self.position_embeddings[0, positions] + target_embeds

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result as of the AR generator. Positions 0 and 1 are the class, 2 + i image token i."""
        dtype, first_class = self.cls_token.dtype, self.config.codebook_size
        is_class = self.is_class(input_ids)
        classes = first_class + self.class_register(input_ids - first_class, is_class, dtype)

        # From here on, rows: tokens, and with guidance their twins without the class.
        classes = self.with_twins(classes, torch.full_like(classes, self.null_class))
        is_class = self.with_twins(is_class, is_class)
        input_ids = self.with_twins(input_ids, input_ids)
        row_positions = self.with_twins(positions, positions)

        hidden_states = self.embed_input_ids(torch.where(is_class, classes, input_ids))
        hidden_states = torch.where(row_positions[:, None] == 0, self.cls_token[0], hidden_states)
        hidden_states = hidden_states + self.embed_positions(row_positions)
        condition = F.silu(self.embed_input_ids(classes) + self.timestep_embeddings[0, row_positions])
        for layer in self.layers:
            hidden_states = layer(hidden_states, condition)
        return self.to_tokens(self.norm_out(hidden_states, condition), positions)

    def norm_out(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The final norm, modulated by the condition."""
        scale, shift = self.norm_modulation(condition)[0].chunk(2, dim=-1)
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.config.layer_norm_eps)
        return modulate(normed, shift, scale)


__all__ = ["VFMTokRARForImageGeneration"]
