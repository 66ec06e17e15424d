"""
The original's decode loops, reimplemented for comparison.

The next-token generator (autoregressive/models/{gpt,generate}.py of CVMI-Lab/VFMTok): one fused query/key/value
projection, a cache rounded up to a multiple of 8 that attention always reads whole under a boolean mask, and `multinomial`.

The randomized-order generator (modeling/rar.py of CVMI-Lab/VFMTok-RAR): each step recomputes embeddings,
positions and conditions of the whole prefix and uses the last; caches grow by concatenation.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf import VFMTokARForImageGeneration, VFMTokRARForImageGeneration
from vfmtok_hf.modeling.generation_vfmtok import power_cosine_guidance
from vfmtok_hf.modeling.rotary_vfmtok import rotary_table


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


def guide(logits: torch.Tensor, scale: float | None) -> torch.Tensor:
    if scale is None:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + (conditional - unconditional) * scale


def draw(logits: torch.Tensor) -> torch.Tensor:
    # Temperature 1, top-k 0, top-p 1, as in the released commands.
    return torch.multinomial(F.softmax(logits / 1.0, dim=-1), num_samples=1)


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
        with self.model.device:
            self.caches = [
                (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in self.model.layers
            ]
            self.mask = torch.ones(self.length, self.length, dtype=torch.bool).tril().expand(batch_size, -1, -1)
            positions = torch.arange(config.num_image_tokens + 1)
            # One cosine and one sine a pair.
            self.table = rotary_table(positions, config.grid_size, config.head_dim, config.rope_theta)[..., 1::2]

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

    @torch.no_grad()
    def generate(self, class_labels: torch.Tensor, steps: int, scale: float = 1.0) -> torch.Tensor:
        passes = 2 if scale > 1 else 1
        labels = class_labels
        if passes == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        self.set_up(len(labels), self.fused[0].dtype)
        states = self.model.class_embedding(labels)[:, None]
        drawn = []
        position = torch.zeros(1, dtype=torch.long, device=labels.device)
        for _ in range(steps):
            drawn.append(draw(guide(self.step(states, position), scale if passes == 2 else None)))
            states = self.model.embed_tokens(drawn[-1].repeat(passes, 1))
            position += 1
        return torch.cat(drawn, dim=1)


class OriginalRARDecoder:
    """Decodes with the weights of one of our randomized-order models, in raster order."""

    def __init__(self, model: VFMTokRARForImageGeneration):
        self.model, self.config = model, model.config
        self.fused = []
        for layer in model.layers:
            projections = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
            weight, bias = (torch.cat([getattr(part, name) for part in projections]) for name in ("weight", "bias"))
            self.fused.append((weight, bias))

    def step(self, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        model, batch_size, length = self.model, len(labels), tokens.shape[1] + 2
        condition = model.embed_tokens(labels + self.config.codebook_size + 1)[:, None]
        states = torch.cat([model.cls_token.expand(batch_size, -1, -1), condition, model.embed_tokens(tokens)], dim=1)
        states = states + model.position_embeddings.repeat(batch_size, 1, 1)[:, :length]
        targets = model.target_position_embeddings.repeat(batch_size, 1, 1)[:, 2 : length + 1]
        states = states + torch.cat([torch.zeros_like(targets[:, :1]), targets], dim=1)
        condition = condition + model.timestep_embeddings.repeat(batch_size, 1, 1)[:, :length]
        if self.caches[0] is not None:
            states, condition = states[:, -1:], condition[:, -1:]
        for index in range(len(model.layers)):
            states = self.layer(index, states, condition)
        scale, shift = model.norm_modulation(F.silu(condition)).chunk(2, dim=-1)
        states = F.layer_norm(states, states.shape[-1:], eps=self.config.layer_norm_eps) * (1 + scale) + shift
        return model.lm_head(states)[:, -1].float()

    def layer(self, index: int, states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        layer, (weight, bias) = self.model.layers[index], self.fused[index]
        shift1, scale1, gate1, shift2, scale2, gate2 = layer.modulation(F.silu(condition)).chunk(6, dim=-1)
        fused = F.linear(layer.norm1(states) * (1 + scale1) + shift1, weight, bias)
        query, key, value = fused.unflatten(-1, (3, self.config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = layer.self_attn.q_norm(query), layer.self_attn.k_norm(key)
        is_first = self.caches[index] is None
        if not is_first:
            keys, values = self.caches[index]
            key, value = torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)
        self.caches[index] = key, value
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=is_first)
        states = states + gate1 * layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return states + gate2 * layer.mlp(layer.norm2(states) * (1 + scale2) + shift2)

    @torch.no_grad()
    def generate(self, class_labels: torch.Tensor, steps: int, scale: float = 1.0) -> torch.Tensor:
        labels, passes = class_labels, 2 if scale > 1 else 1
        if passes == 2:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        scales = power_cosine_guidance(self.config.num_image_tokens, scale, power=1.0)
        self.caches: list = [None] * len(self.model.layers)
        tokens = class_labels.new_zeros(len(class_labels), 0)
        for step in range(steps):
            logits = self.step(labels, tokens.repeat(passes, 1))
            tokens = torch.cat([tokens, draw(guide(logits, scales[step] if passes == 2 else None))], dim=1)
        return tokens
