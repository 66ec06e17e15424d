"""Tiny generators of the real classes, and what their tests share."""

import math

import torch

from vfmtok_hf.modeling.configuration_vfmtok_ar import VFMTokARConfig
from vfmtok_hf.modeling.configuration_vfmtok_dit import VFMTokDiTConfig
from vfmtok_hf.modeling.configuration_vfmtok_rar import VFMTokRARConfig
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_dit import VFMTokDiTForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration


TINY_SIZES = {
    "codebook_size": 32,
    "num_classes": 5,
    "num_image_tokens": 9,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def tiny_ar(**overrides) -> VFMTokARForImageGeneration:
    """A next-token generator of 3 x 3 image tokens, in evaluation mode. No weight is trivial, its head included."""
    return _randomized(VFMTokARForImageGeneration(VFMTokARConfig(**{**TINY_SIZES, **overrides})))


def tiny_rar(**overrides) -> VFMTokRARForImageGeneration:
    """The same in randomized order."""
    sizes = {**TINY_SIZES, "num_position_embeddings": 11, "num_timestep_embeddings": 11, **overrides}
    return _randomized(VFMTokRARForImageGeneration(VFMTokRARConfig(**sizes)))


TINY_DIT_SIZES = {
    "latent_channels": 4,
    "sample_size": 3,
    "num_classes": 5,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "head_hidden_size": 24,
    "head_num_hidden_layers": 1,
    "head_num_attention_heads": 2,
    "head_intermediate_size": 28,
    "time_embedding_size": 6,
}


def tiny_dit(**overrides) -> VFMTokDiTForImageGeneration:
    """A diffusion transformer on 3 x 3 latents of 4 channels, in evaluation mode. No weight is trivial."""
    return _randomized(VFMTokDiTForImageGeneration(VFMTokDiTConfig(**{**TINY_DIT_SIZES, **overrides})))


@torch.no_grad()
def _randomized(model):
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    return model.eval()


def tiny_batch(model, batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Class labels and image tokens."""
    config = model.config
    labels = torch.randint(config.num_classes, (batch_size,))
    return labels, torch.randint(config.codebook_size, (batch_size, config.num_image_tokens))


class Recorder:
    """A logits processor that keeps what it sees."""

    def __init__(self):
        self.tokens = []
        self.logits = []

    def __call__(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self.tokens.append(tokens.clone())
        self.logits.append(logits.clone())
        return logits

    @property
    def step_logits(self) -> torch.Tensor:
        """`(batch_size, steps, codebook_size)`."""
        return torch.stack(self.logits, dim=1)


def record_forward_rows(model) -> list[int]:
    """A list that grows by the batch size of every forward call and decode step."""
    rows, decode_step = [], model.decode_step
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def recorded(tokens, position, cache):
        rows.append(len(tokens))
        return decode_step(tokens, position, cache)

    model.decode_step = recorded
    return rows


def record_step_logits(model) -> list[torch.Tensor]:
    """A list that grows by the `(rows, codebook_size)` logits of every step, guidance not applied."""
    logits, decode_step = [], model.decode_step
    model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1]))

    def recorded(tokens, position, cache):
        logits.append(decode_step(tokens, position, cache))
        return logits[-1]

    model.decode_step = recorded
    return logits


def draw_with(uniform: torch.Tensor):
    """A stand-in for `uniform_numbers` that returns `(steps, batch_size)` recorded ones."""
    return lambda num_steps, batch_size, generator, device: uniform[:num_steps, :batch_size]


def assert_gradient_norms(gradients: dict[str, torch.Tensor], expected: dict[str, float]) -> None:
    """Relative 1e-3, as the reference README says; norms that are zero but for rounding are not compared."""
    assert gradients.keys() == expected.keys()
    threshold = 1e-5 * max(expected.values())
    for name, norm in expected.items():
        if norm > threshold:
            assert math.isclose(gradients[name].norm(), norm, rel_tol=1e-3), name


@torch.no_grad()
def move_gradients_to_weights(model) -> None:
    """Turn a model into its gradient, so that what exports weights exports gradients."""
    for parameter in model.parameters():
        parameter.copy_(parameter.grad)
