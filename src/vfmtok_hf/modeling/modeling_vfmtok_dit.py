"""
The diffusion transformer of VFMTok2: noisy latents of VFMAE, a time and a class label -> velocity.

latents -> encoder (28 layers, modulated by time and class) -> condition of each token -> head (2 wide layers on the same
latents, modulated by that condition) -> velocity.

The computation follows https://github.com/CVMI-Lab/VFMTok2 (`denoise/models/DDT.py`, Apache-2.0), which is RAE's DiTDH
(https://github.com/bytetriper/RAE, MIT).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .attention_vfmtok import eager_attention_forward
from .class_embeddings_vfmtok import ClassEmbeddingsMixin, check_ids, drop_labels
from .class_names_vfmtok import ClassNames  # noqa: F401 - for the Hub, as CONTRIBUTING.md says
from .configuration_vfmtok_dit import VFMTokDiTConfig
from .loading_vfmtok import CheckedModelMixin
from .outputs_vfmtok import VFMTokModelOutput
from .rotary_vfmtok import apply_rotary, rotary_table


@dataclass(repr=False)
class VFMTokDiTOutput(VFMTokModelOutput):
    """
    Args:
        velocity (`torch.FloatTensor` of shape `(batch_size, latent_channels, sample_size, sample_size)`):
            Prediction of noise - data, the derivative of the latents by the time.
    """

    velocity: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Embeddings


def position_table(grid_size: int, width: int, theta: float) -> torch.Tensor:
    """
    Sines and cosines `(1, grid_size ** 2, width)` of positions in raster order: the first half of the channels encodes the
    column, the second the row (the rotary embedding has them the other way round).
    """
    # In float64, which not every device has.
    frequencies = theta ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    positions = torch.arange(grid_size, dtype=torch.float64, device="cpu")
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    angles = torch.stack([columns.flatten(), rows.flatten()])[..., None] * frequencies
    # axis, position, frequency -> position, (axis, sine or cosine, frequency)
    table = torch.stack([angles.sin(), angles.cos()], dim=2).permute(1, 0, 2, 3)
    return table.flatten(1).float()[None]


class VFMTokDiTTimeEmbedding(nn.Module):
    """Random Fourier features of the time and an MLP. It stays in float32: half precision would round the time."""

    def __init__(self, config: VFMTokDiTConfig):
        super().__init__()
        # Loaded, as are the positions: averaging over training has moved them a little.
        self.register_buffer("frequencies", torch.empty(config.time_embedding_size))
        self.fc1 = nn.Linear(2 * config.time_embedding_size, config.hidden_size)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`(batch_size,)` times -> `(batch_size, hidden_size)`."""
        angles = timesteps.float()[:, None] * self.frequencies.float() * (2 * math.pi)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


# ---------------------------------------------------------------------------------------------------------------
# Transformer


class VFMTokDiTAttention(nn.Module):
    """Bidirectional self-attention with rotary embedding."""

    is_causal = False

    def __init__(self, config: VFMTokDiTConfig, width: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = width // num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        # (batch, length, width) -> (batch, heads, length, head_dim)
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(head_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attention(
            self, apply_rotary(query, rotary), apply_rotary(key, rotary), value, None, scaling=self.head_dim**-0.5
        )
        return self.o_proj(attended.flatten(-2))


class VFMTokDiTMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate_size)
        self.up_proj = nn.Linear(width, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return hidden_states * (1 + scale) + shift


class VFMTokDiTLayer(GradientCheckpointingLayer):
    """Attention and MLP, whose inputs are shifted and scaled and whose outputs are gated by a condition."""

    def __init__(self, config: VFMTokDiTConfig, width: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.self_attn = VFMTokDiTAttention(config, width, num_heads)
        self.norm2 = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = VFMTokDiTMLP(width, intermediate_size)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, width)`).
            condition (`torch.Tensor` of shape `(batch_size, 1, width)` or that of `hidden_states`).
            rotary (`torch.Tensor` of shape `(2, length, head_dim)`): as from [`rotary_table`].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        attended = self.self_attn(modulate(self.norm1(hidden_states), shift1, scale1), rotary)
        hidden_states = hidden_states + gate1 * attended
        return hidden_states + gate2 * self.mlp(modulate(self.norm2(hidden_states), shift2, scale2))


class VFMTokDiTForImageGeneration(CheckedModelMixin, PreTrainedModel, ClassEmbeddingsMixin):
    """
    Denoiser of VFMAE's normalized latents, for a class label.

    It is trained by flow matching: of latents `z`, noise `e` and times `t` in [0, 1) it sees `(1 - t) * z + t * e` and
    predicts `e - z`, with a mean squared error. [`VFMTokDiTPipeline`] samples.
    """

    config: VFMTokDiTConfig
    config_class = VFMTokDiTConfig
    base_model_prefix = "transformer"
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VFMTokDiTLayer"]
    _keep_in_fp32_modules_strict = ["time_embedding", "position_embeddings"]

    def __init__(self, config: VFMTokDiTConfig):
        super().__init__(config)
        width, head_width = config.hidden_size, config.head_hidden_size
        self.register_buffer("position_embeddings", torch.empty(1, config.sample_size**2, width))
        # Its first parameter tells a model's dtype, which the time embedding's does not.
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.time_embedding = VFMTokDiTTimeEmbedding(config)
        self.encoder_embed = nn.Conv2d(config.latent_channels, width, 1)
        self.encoder_layers = nn.ModuleList(
            VFMTokDiTLayer(config, width, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.condition_proj = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.head_embed = nn.Conv2d(config.latent_channels, head_width, 1)
        self.head_layers = nn.ModuleList(
            VFMTokDiTLayer(config, head_width, config.head_num_attention_heads, config.head_intermediate_size)
            for _ in range(config.head_num_hidden_layers)
        )
        self.norm = nn.RMSNorm(head_width, eps=config.rms_norm_eps)
        self.norm_modulation = nn.Linear(head_width, 2 * head_width)
        self.velocity_proj = nn.Linear(head_width, config.latent_channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the original initializes: modulations and the output are zero, so that every layer starts as the identity."""
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Conv2d):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, VFMTokDiTTimeEmbedding):
            init.normal_(module.frequencies)
            init.normal_(module.fc1.weight, std=0.02)
            init.normal_(module.fc2.weight, std=0.02)
        elif isinstance(module, VFMTokDiTLayer):
            self._init_zeros(module.modulation)
        elif module is self:
            config = self.config
            table = position_table(config.sample_size, config.hidden_size, config.rope_theta)
            init.copy_(self.position_embeddings, table.to(self.position_embeddings.device))
            self._init_zeros(self.norm_modulation)
            self._init_zeros(self.velocity_proj)

    @staticmethod
    def _init_zeros(linear: nn.Linear) -> None:
        init.zeros_(linear.weight)
        init.zeros_(linear.bias)

    def class_embedding_table(self) -> tuple[nn.Embedding, int]:
        """The table, and the row of class 0."""
        return self.class_embedding, 0

    @can_return_tuple
    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> VFMTokDiTOutput:
        """
        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, latent_channels, sample_size, sample_size)`):
                Normalized latents with noise.
            timesteps (`torch.FloatTensor` of shape `(batch_size,)`):
                Fraction of noise, from 0 (data) to 1 (noise).
            class_labels (`torch.LongTensor` of shape `(batch_size,)`):
                Labels in 0 to `num_classes - 1`, or `num_classes` for no condition. In training mode each is replaced
                by the latter with probability `class_dropout`.

        Raises:
            TypeError, ValueError: the shape of an input is wrong, or labels are not int64 or out of range.
        """
        self._check_inputs(latents, timesteps, class_labels)
        if self.training:
            class_labels = drop_labels(class_labels, self.config.class_dropout, self.config.num_classes)
        dtype = self.encoder_embed.weight.dtype
        latents = latents.to(dtype)
        time = self.time_embedding(timesteps).to(dtype)

        # Device maps may spread the layers over several devices.
        condition = F.silu(time + self.class_embedding(class_labels).to(time.device))[:, None]
        hidden_states = self._tokens(self.encoder_embed, latents)
        hidden_states = hidden_states + self.position_embeddings.to(hidden_states.device, dtype)
        rotary = self._rotary_table(self.encoder_layers, hidden_states)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, condition, rotary)
        condition = self.condition_proj(F.silu(time[:, None].to(hidden_states.device) + hidden_states))

        hidden_states = self._tokens(self.head_embed, latents)
        rotary = self._rotary_table(self.head_layers, hidden_states)
        for layer in self.head_layers:
            hidden_states = layer(hidden_states, condition, rotary)
        shift, scale = self.norm_modulation(F.silu(condition)).chunk(2, dim=-1)
        velocity = self.velocity_proj(modulate(self.norm(hidden_states).to(shift.device), shift, scale))
        # batch_size, tokens, channels -> batch_size, channels, sample_size, sample_size
        return VFMTokDiTOutput(velocity=velocity.transpose(1, 2).reshape(latents.shape))

    def _rotary_table(self, layers: nn.ModuleList, hidden_states: torch.Tensor) -> torch.Tensor:
        """The rotary embedding of one part's layers."""
        # Position 0 of the table is a class token, which these sequences do not have.
        positions = 1 + torch.arange(hidden_states.shape[1], device=hidden_states.device)
        head_dim = layers[0].self_attn.head_dim
        return rotary_table(positions, self.config.sample_size, head_dim, self.config.rope_theta)

    @staticmethod
    def _tokens(embed: nn.Conv2d, latents: torch.Tensor) -> torch.Tensor:
        """`(batch_size, channels, height, width)` -> `(batch_size, height * width, width of the layers)`."""
        return embed(latents).flatten(2).transpose(1, 2)

    def _check_inputs(self, latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> None:
        if latents.shape[1:] != self.config.latent_shape:
            raise ValueError(
                f"latents must have shape (batch_size, {', '.join(map(str, self.config.latent_shape))}), got "
                f"{tuple(latents.shape)}."
            )
        for name, values in (("timesteps", timesteps), ("class_labels", class_labels)):
            if values.shape != latents.shape[:1]:
                raise ValueError(f"{name} must have shape ({latents.shape[0]},), got {tuple(values.shape)}.")
        # The null class, one past the last label, is a valid condition.
        check_ids("class_labels", class_labels, self.config.num_classes + 1)


__all__ = ["VFMTokDiTForImageGeneration"]
