"""
The parts of a pipeline that are exported, with only tensors as inputs and outputs, and the comparison of a graph with its
model.

- `encoder`: pixel values -> image tokens,
- `decoder`: image tokens -> image,
- `decode_step`: one token and a key/value cache of fixed size -> logits of the next token and the updated cache.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vfmtok_hf.modeling.cache_vfmtok import DecodeCache
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.pipelines import VFMTokPipeline


PartName = Literal["encoder", "decoder", "decode_step"]
Graph = Callable[..., list[torch.Tensor]]

# Libraries sum in different orders, so the nearest codebook row can change if two are equally near up to rounding.
LEAST_EQUAL_SHARE = 0.999
LARGEST_DIFFERENCE = 1e-3


class ExportPart(nn.Module, ABC):
    """One graph: its tensors by name, example inputs, and its check."""

    name: PartName
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    # Batch dimension of each input; None if it has none.
    batch_dims: tuple[int | None, ...]

    @abstractmethod
    def example(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Inputs to trace the graph with."""

    @abstractmethod
    def check(self, graph: Graph, batch_size: int) -> str:
        """
        Compare a graph with the model on random inputs, and describe the result in a few words.

        Raises:
            ValueError: they differ by more than rounding.
        """


def without(model: VFMTokModel, *names: str) -> VFMTokModel:
    """A shallow copy of the model without some modules, so that its graph does not store their unused weights."""
    partial = copy.copy(model)
    partial._modules = {**model._modules, **dict.fromkeys(names)}
    return partial


class Encoder(ExportPart):
    """`pixel_values` `(batch, 3, image_size, image_size)` in [-1, 1] to `image_tokens` `(batch, num_anchors)`, int64."""

    name = "encoder"
    input_names = ("pixel_values",)
    output_names = ("image_tokens",)
    batch_dims = (0,)

    def __init__(self, model: VFMTokModel):
        super().__init__()
        self.model = without(model, "post_quant_proj", "vit_decoder", "pixel_decoder")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode(pixel_values).image_tokens

    def example(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        side = self.model.config.image_size
        return (smooth_images(batch_size, side),)

    def check(self, graph: Graph, batch_size: int) -> str:
        (pixel_values,) = self.example(batch_size)
        (image_tokens,) = graph(pixel_values)
        return compare_tokens(image_tokens, self(pixel_values))


class Decoder(ExportPart):
    """`image_tokens` `(batch, num_anchors)` to `reconstruction` `(batch, 3, image_size, image_size)`, about [-1, 1]."""

    name = "decoder"
    input_names = ("image_tokens",)
    output_names = ("reconstruction",)
    batch_dims = (0,)

    def __init__(self, model: VFMTokModel):
        super().__init__()
        self.model = without(model, "vision_model", "anchor_encoder", "quant_proj")

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        return self.model.decode(image_tokens=image_tokens).reconstruction

    def example(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        config = self.model.config
        return (torch.randint(config.codebook_size, (batch_size, config.num_anchors)),)

    def check(self, graph: Graph, batch_size: int) -> str:
        (image_tokens,) = self.example(batch_size)
        (reconstruction,) = graph(image_tokens)
        return compare_floats("pixels", reconstruction, self(image_tokens))


class DecodeStep(ExportPart):
    """
    `decode_step` of a generator. Call it with `position` 0, 1, ... and feed `keys` and `values` back; they start as zeros.

    Inputs: `class_labels` and `image_tokens`, both `(batch,)` int64; `position`, a scalar int64; `keys` and `values`,
    `(layers, batch, heads, positions, head_dim)`. The first `condition_positions` positions ignore `image_tokens`; the
    position `condition_positions + i` takes token i of the sequence. Outputs: `logits` `(batch, codebook_size)` of the
    token that follows, and the new `keys` and `values`.
    """

    name = "decode_step"
    input_names: tuple[str, ...] = ("class_labels", "image_tokens", "position", "keys", "values")
    output_names = ("logits", "keys_out", "values_out")
    batch_dims: tuple[int | None, ...] = (0, 0, None, 1, 1)

    def __init__(self, model: VFMTokARForImageGeneration | VFMTokRARForImageGeneration):
        super().__init__()
        self.model = model

    @property
    def condition_positions(self) -> int:
        """Positions before the first image token; the logits of the last of them are the first token's."""
        return self.model.num_condition_tokens

    @property
    def num_positions(self) -> int:
        """Steps per image: the last token is sampled but not fed back."""
        return self.model.new_cache().max_length

    def forward(
        self,
        class_labels: torch.Tensor,
        image_tokens: torch.Tensor,
        position: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cache = self.filled_cache(keys, values)
        self.model.begin(cache, self.model.embed_condition(class_labels))
        return self.step(image_tokens, position, cache)

    def filled_cache(self, keys: torch.Tensor, values: torch.Tensor) -> DecodeCache:
        """The model's cache with copies of given keys and values."""
        cache = self.model.new_cache()
        for layer, *layer_inputs in zip(cache.layers, keys.unbind(), values.unbind(), strict=True):
            layer.keys, layer.values = (states.clone() for states in layer_inputs)
        return cache

    def step(
        self, image_tokens: torch.Tensor, position: torch.Tensor, cache: DecodeCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = self.model.decode_step(image_tokens, position, cache)
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        return logits, torch.stack(keys), torch.stack(values)

    def example(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        config = self.model.config
        shape = (config.num_hidden_layers, batch_size, config.num_attention_heads, self.num_positions, config.head_dim)
        return (
            torch.randint(config.num_classes, (batch_size,)),
            torch.randint(config.codebook_size, (batch_size,)),
            torch.tensor(0),
            torch.zeros(shape),
            torch.zeros(shape),
        )

    def check(self, graph: Graph, batch_size: int) -> str:
        config = self.model.config
        class_labels, _, _, keys, values, *orders = self.example(batch_size)
        image_tokens = torch.randint(config.codebook_size, (batch_size, config.num_image_tokens))
        sequence = image_tokens.take_along_dim(orders[0], dim=1) if orders else image_tokens
        expected = self.model(class_labels, image_tokens, **({"orders": orders[0]} if orders else {})).logits
        expected = expected.take_along_dim(orders[0][..., None], dim=1) if orders else expected
        logits = []
        for position in range(self.num_positions):
            token = sequence[:, max(position - self.condition_positions, 0)]
            step, keys, values = graph(class_labels, token, torch.tensor(position), keys, values, *orders)
            logits.append(step)
        steps = torch.stack(logits[self.condition_positions - 1 :], dim=1)
        choices = compare_tokens(steps.argmax(-1), expected.argmax(-1))
        return f"greedy {choices}, {compare_floats('logits', steps, expected)}"


class RARDecodeStep(DecodeStep):
    """
    [`DecodeStep`] of a randomized-order generator: position 0 is the start token, 1 the class. One more input,
    `orders` `(batch, num_image_tokens)` int64: the raster position of each token of the sequence.
    """

    input_names = (*DecodeStep.input_names, "orders")
    batch_dims = (*DecodeStep.batch_dims, 0)

    def forward(
        self,
        class_labels: torch.Tensor,
        image_tokens: torch.Tensor,
        position: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        orders: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cache = self.filled_cache(keys, values)
        self.model.begin(cache, self.model.embed_condition(class_labels), orders)
        self.model.modulate_positions(cache, position, size=1)
        return self.step(image_tokens, position, cache)

    def example(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        orders = torch.rand(batch_size, self.model.config.num_image_tokens).argsort(dim=1)
        return *super().example(batch_size), orders


def pipeline_parts(pipe: VFMTokPipeline) -> dict[str, ExportPart]:
    """The parts of a pipeline: no decode step without a generator, no encoder without vision weights."""
    model, generator = pipe.vq_model, pipe.transformer
    parts: list[ExportPart] = [Decoder(model)]
    if model.vision_model is not None:
        parts.insert(0, Encoder(model))
    if isinstance(generator, VFMTokRARForImageGeneration):
        parts.append(RARDecodeStep(generator))
    elif generator is not None:
        parts.append(DecodeStep(generator))
    return {part.name: part for part in parts}


# ---------------------------------------------------------------------------------------------------------------
# Checks


def smooth_images(batch_size: int, side: int) -> torch.Tensor:
    """Random `(batch_size, 3, side, side)` images in [-1, 1] with large shapes, unlike noise."""
    coarse = torch.rand(batch_size, 3, 5, 5) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


def compare_tokens(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Count equal tokens. Raises ValueError if more differ than numerical ties can explain."""
    equal = int((actual == expected).sum())
    if equal < LEAST_EQUAL_SHARE * expected.numel():
        raise ValueError(
            f"The exported graph and the model return different tokens: {equal} of {expected.numel()} are equal. "
            "Nothing was written."
        )
    return f"{equal} of {expected.numel()} tokens equal"


def compare_floats(what: str, actual: torch.Tensor, expected: torch.Tensor) -> str:
    """The largest difference. Raises ValueError if it exceeds rounding, relative to the largest value if that is > 1."""
    difference = (actual - expected).abs().max().item()
    if not difference <= LARGEST_DIFFERENCE * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"The exported graph differs from the model by up to {difference:.1e} in {what}. Nothing was written."
        )
    return f"{what} differ by at most {difference:.1e}"
