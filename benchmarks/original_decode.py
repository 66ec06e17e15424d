"""
The original's decode loop, for comparison: autoregressive/models/{gpt,generate}.py of CVMI-Lab/VFMTok, restated.

One fused query/key/value product, a cache rounded up to a multiple of 8 that attention always reads whole under a
boolean mask, sampling through sort-based filters and `multinomial`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_ar import rotary_table


def rms_norm(states: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    wide = states.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).type_as(states) * norm.weight


def rotate(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    pairs = states.float().reshape(*states.shape[:-1], -1, 2)
    cosines, sines = table[0][None, :, None], table[1][None, :, None]
    rotated = torch.stack(
        [pairs[..., 0] * cosines - pairs[..., 1] * sines, pairs[..., 1] * cosines + pairs[..., 0] * sines], dim=-1
    )
    return rotated.flatten(3).type_as(states)


class OriginalDecoder:
    """Decodes with the weights of one of our models."""

    def __init__(self, model: VFMTokARForImageGeneration):
        self.model, self.config = model, model.config
        self.fused = [
            torch.cat([layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight])
            for layer in model.layers
        ]

    def set_up(self, batch_size: int, dtype: torch.dtype) -> None:
        config = self.config
        self.length = (config.num_image_tokens + 1 + 7) // 8 * 8
        shape = (batch_size, config.num_attention_heads, self.length, config.head_dim)
        self.caches = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in self.model.layers]
        self.mask = torch.tril(torch.ones(self.length, self.length, dtype=torch.bool)).expand(batch_size, -1, -1)
        positions = torch.arange(config.num_image_tokens + 1)
        self.table = rotary_table(positions, config.grid_size, config.head_dim, config.rope_theta)

    def step(self, states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        config = self.config
        table, mask = self.table[:, position], self.mask[:, None, position]
        for layer, fused, (keys, values) in zip(self.model.layers, self.fused, self.caches, strict=True):
            query, key, value = F.linear(rms_norm(states, layer.input_layernorm), fused).chunk(3, dim=-1)
            heads = (*states.shape[:2], config.num_attention_heads, config.head_dim)
            query, key = rotate(query.view(heads), table), rotate(key.view(heads), table)
            keys[:, :, position] = key.transpose(1, 2)
            values[:, :, position] = value.view(heads).transpose(1, 2)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
            states = states + layer.self_attn.o_proj(attended.transpose(1, 2).reshape(states.shape))
            normed = rms_norm(states, layer.post_attention_layernorm)
            gated = F.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            states = states + layer.mlp.down_proj(gated)
        return self.model.lm_head(rms_norm(states, self.model.norm)).float()[:, -1]

    def draw(self, logits: torch.Tensor, scale: float) -> torch.Tensor:
        if scale > 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * scale
        # Temperature 1, top-k 0, top-p 1, as the released commands have it.
        return torch.multinomial(F.softmax(logits / 1.0, dim=-1), num_samples=1)

    @torch.no_grad()
    def generate(self, class_labels: torch.Tensor, steps: int, scale: float = 1.0) -> torch.Tensor:
        passes = 2 if scale > 1 else 1
        labels = class_labels
        if passes == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        self.set_up(len(labels), self.fused[0].dtype)
        states = self.model.class_embedding(labels)[:, None]
        drawn = []
        position = torch.zeros(1, dtype=torch.long)
        for _ in range(steps):
            drawn.append(self.draw(self.step(states, position), scale))
            states = self.model.embed_tokens(drawn[-1].repeat(passes, 1))
            position += 1
        return torch.cat(drawn, dim=1)
