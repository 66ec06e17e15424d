"""
The next-token generator: class -> image tokens in raster order (VFMTok, arXiv 2507.08441).

A request is the class at position 0, followed by image tokens. The computation is that of vfmtok-hf's
`VFMTokARForImageGeneration`, which follows https://github.com/CVMI-Lab/VFMTok and LlamaGen.
"""

import math

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.sequence import IntermediateTensors

from vfmtok_vllm.configuration import VFMTokARConfig
from vfmtok_vllm.generator import ImageTokenGenerator, PaddedAttention


def rotary_table(config: VFMTokARConfig) -> torch.Tensor:
    """
    Cosines and sines of the 2-D rotary embedding: `(2, max_position_embeddings, head width / 2)`.

    The first half of the rotated pairs encodes the token's row, the second its column. At the class, both are zero, as in the
    original, so every token's score with it is 0.
    """
    axis_width = config.head_width // 2
    frequencies = config.rope_theta ** (-torch.arange(0, axis_width, 2, dtype=torch.float32) / axis_width)
    tokens = torch.arange(-1, config.num_image_tokens)
    grid_size = math.isqrt(config.num_image_tokens)
    rows, columns = tokens.div(grid_size, rounding_mode="floor"), tokens.remainder(grid_size)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]) * (tokens >= 0)[:, None]


def rotate(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2j, 2j + 1) of `(rows, heads, width)` states by `(2, rows, width / 2)` cosines and sines, in float32."""
    cosines, sines = rotary[:, :, None]
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return rotated.flatten(-2).to(states.dtype)


class VFMTokARAttention(nn.Module):
    """Causal self-attention with rotary embedding."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.width = config.head_width
        self.num_heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.width,
            config.num_attention_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attn = PaddedAttention(self.num_heads, vllm_config, prefix)
        self.o_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.view(-1, 3, self.num_heads, self.width).unbind(1)
        attended = self.attn(rotate(query, rotary), rotate(key, rotary), value)
        return self.o_proj(attended)[0]


class VFMTokARMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        return self.down_proj(self.activation(gate_up))[0]


class VFMTokARDecoderLayer(nn.Module):
    """Pre-norm: attention, then MLP, each added to its input."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = VFMTokARAttention(vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = VFMTokARMLP(vllm_config, f"{prefix}.mlp")

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), rotary)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@support_torch_compile
class VFMTokARForImageGeneration(ImageTokenGenerator):
    """The model. A prompt is one id, that of the class."""

    stacked_weights = {
        **ImageTokenGenerator.stacked_weights,
        ".gate_proj.": (".gate_up_proj.", 0),
        ".up_proj.": (".gate_up_proj.", 1),
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, head_bias=False)
        config = self.config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.codebook_size, config.hidden_size)
        self.layers = nn.ModuleList(
            VFMTokARDecoderLayer(vllm_config, f"layers.{index}") for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.register_buffer("rotary", rotary_table(config), persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(rows, hidden_size)` of token ids `(rows,)`. The id tells the table, so requests join at any step."""
        tokens = self.embed_tokens(input_ids.clamp(max=self.config.codebook_size - 1))
        classes = self.class_embedding((input_ids - self.config.codebook_size).clamp(min=0))
        return torch.where(self.is_class(input_ids)[:, None], classes, tokens)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(tokens,)`): of all requests of the batch.
            positions (`torch.Tensor` of shape `(tokens,)`): in their sequences; 0 is the class, 1 + i image token i.
            intermediate_tensors, inputs_embeds: of pipeline parallelism and multimodal models; unused.

        Returns:
            `torch.Tensor`: the input of `compute_logits`.
        """
        unconditional = torch.where(self.is_class(input_ids), self.null_class, input_ids)
        hidden_states = self.embed_input_ids(self.with_twins(input_ids, unconditional))
        rotary = self.rotary[:, self.with_twins(positions, positions)]
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotary)
        return self.to_tokens(self.norm(hidden_states), positions)


__all__ = ["VFMTokARForImageGeneration"]
