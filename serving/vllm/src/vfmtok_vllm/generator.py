"""
What both generators share: token ids, guidance, attention with heads of any width, and the head over image tokens.

With guidance, every token has two rows: one with the class, and after it its twin without. The twins of a request live in the
same request, as further heads of its attention layers, so vLLM schedules nothing in pairs.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vfmtok_vllm.configuration import GeneratorConfig


class PaddedAttention(nn.Module):
    """
    Causal attention over the cache of a request.

    vLLM's kernels exist for a few widths of heads. Queries, keys and values are padded with zeros to the next one, which
    changes neither the scores nor the true part of the values.

    Args:
        num_heads (`int`): heads of one row in this process.
        vllm_config (`VllmConfig`).
        prefix (`str`): unique name with one integer.
    """

    def __init__(self, num_heads: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.width, self.padding = config.head_width, config.head_dim - config.head_width
        self.num_heads = config.num_streams * num_heads
        self.attn = Attention(
            self.num_heads,
            config.head_dim,
            scale=config.head_width**-0.5,
            num_kv_heads=self.num_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`(rows, heads, width)` each, to `(rows, heads * width)`."""
        attended = self.attn(*(self._by_token(states) for states in (query, key, value)))
        attended = attended.view(-1, self.num_heads, self.width + self.padding)[..., : self.width]
        return attended.reshape(query.shape[0], -1)

    def _by_token(self, states: torch.Tensor) -> torch.Tensor:
        """Twin rows become heads of one token: `(tokens, streams * heads * padded width)`."""
        return F.pad(states, (0, self.padding)).reshape(-1, self.num_heads * (self.width + self.padding))


class ImageTokenGenerator(nn.Module):
    """
    The base class of the models.

    Token ids are image tokens from 0 on, then classes, then the null class.

    Args:
        vllm_config (`VllmConfig`).
        head_bias (`bool`): whether the head has a bias.
    """

    # Weights of the checkpoint that are one weight here.
    stacked_weights: dict[str, tuple[str, str | int]] = {
        ".q_proj.": (".qkv_proj.", "q"),
        ".k_proj.": (".qkv_proj.", "k"),
        ".v_proj.": (".qkv_proj.", "v"),
    }

    def __init__(self, vllm_config: VllmConfig, head_bias: bool):
        super().__init__()
        self.config: GeneratorConfig = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.lm_head = ParallelLMHead(
            self.config.codebook_size,
            self.config.hidden_size,
            bias=head_bias,
            quant_config=self.quant_config,
            prefix="lm_head",
        )
        self.logits_processor = LogitsProcessor(self.config.codebook_size)
        self.register_buffer("guidance_scales", torch.tensor(self.config.guidance_scales), persistent=False)

    @property
    def null_class(self) -> int:
        """Token id of the null class."""
        return self.config.codebook_size + self.config.num_classes

    def is_class(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which ids are classes."""
        return input_ids >= self.config.codebook_size

    def with_twins(self, states: torch.Tensor, twins: torch.Tensor) -> torch.Tensor:
        """Entries `(tokens,)` of tokens to those of rows `(rows,)`: with guidance, each is followed by its twin's."""
        return states if self.config.num_streams == 1 else torch.stack([states, twins], dim=1).flatten()

    def to_tokens(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """
        Convert final hidden states `(rows, hidden_size)` to the input of `compute_logits`: `(tokens, hidden_size)`, or with
        guidance `(tokens, 2 * hidden_size + 1)`. The last column is the guidance scale, because vLLM does not pass positions
        to `compute_logits`.
        """
        if self.config.num_streams == 1:
            return rows
        scales = self.guidance_scales[positions].to(rows.dtype)
        return torch.cat([rows.view(len(positions), -1), scales[:, None]], dim=1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """
        Logits over the whole vocabulary, -inf for classes.

        Args:
            hidden_states (`torch.Tensor`): of the tokens that predict one, as `forward` returns them.

        Returns:
            `torch.Tensor` of shape `(tokens, vocab_size)`, float32. None where vLLM gathers them in another process.
        """
        num_states = self.config.num_streams * self.config.hidden_size
        rows, scales = hidden_states[:, :num_states], hidden_states[:, num_states:]
        logits = self.logits_processor(self.lm_head, rows.reshape(-1, self.config.hidden_size), self.lm_head.bias)
        if logits is None:
            return None
        logits = logits.float()
        if self.config.num_streams == 2:
            conditional, unconditional = logits[::2], logits[1::2]
            logits = torch.lerp(unconditional, conditional, scales.float())
        return F.pad(logits, (0, self.config.vocab_size - self.config.codebook_size), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's weights, and return the names of those loaded."""
        return AutoWeightsLoader(self).load_weights(
            weights, mapper=WeightsMapper(orig_to_new_stacked=self.stacked_weights)
        )


__all__ = ["ImageTokenGenerator", "PaddedAttention"]
