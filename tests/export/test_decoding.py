"""Eager, compiled and exported decode steps generate the same tokens."""

import copy

import pytest
import torch

from tests.modeling.generators import tiny_ar, tiny_rar
from vfmtok_hf.export.parts import DecodeStep, RARDecodeStep
from vfmtok_hf.export.pipeline import export_program
from vfmtok_hf.modeling import generation_vfmtok


LABELS = torch.tensor([0, 3, 4])
ORDERS = torch.stack([torch.arange(9).roll(shift) for shift in (2, 4, 5)])
TOKENS = torch.arange(27).view(3, 9)
GUIDED = {"guidance_scale": 3.0, "guidance_interval": 3}
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampled": {"top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "guided": {"guidance_scale": 3.0},
    "guided-in-an-interval": GUIDED,
}
RAR_SETTINGS = SETTINGS | {
    "in-any-order": {"orders": ORDERS, **GUIDED},
    "inpainting": {"image_tokens": TOKENS, "keep_mask": TOKENS[0] % 3 > 0},
    "guided-inpainting": {"image_tokens": TOKENS, "keep_mask": TOKENS[0] < 2, "orders": ORDERS, **GUIDED},
}


def generate(model, settings):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return model.generate(LABELS, generator=generators, **settings)


def use_program(model, program):
    """Let `model` take its decode steps from an exported `program`, which is told the condition in every step."""
    forward, condition = model.forward, {}

    def begin(class_labels, image_tokens, cache, **orders):
        raster = torch.arange(model.config.num_image_tokens).expand(len(class_labels), -1)
        condition.update(labels=class_labels, orders=orders.get("orders", raster))
        return forward(class_labels, image_tokens, cache=cache, **orders)

    def decode_step(tokens, position, cache):
        rows = len(tokens)
        states = [torch.stack([getattr(layer, name)[:rows] for layer in cache.layers]) for name in ("keys", "values")]
        orders = [condition["orders"][:rows]] if model.num_condition_tokens == 2 else []
        logits, keys, values = program(condition["labels"][:rows], tokens, position, *states, *orders)
        for layer, layer_keys, layer_values in zip(cache.layers, keys, values, strict=True):
            layer.keys[:rows], layer.values[:rows] = layer_keys, layer_values
        return logits

    model.forward, model.decode_step = begin, decode_step


@pytest.fixture(scope="module")
def generators():
    """Each tiny generator as it is, compiled, and with an exported decode step for any batch."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    families = {}
    for name, model, part in (("ar", tiny_ar(), DecodeStep), ("rar", tiny_rar(), RARDecodeStep)):
        compiled, exported = copy.deepcopy(model), copy.deepcopy(model)
        compiled.compile_decoding(backend="aot_eager")
        use_program(exported, export_program(part(model), None).module())
        families[name] = model, compiled, exported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_vfmtok, "COMPILED_LENGTHS", 2)
        yield families


@pytest.mark.parametrize(
    ("family", "settings"),
    [("ar", name) for name in SETTINGS] + [("rar", name) for name in RAR_SETTINGS],
)
def test_eager_compiled_and_exported_steps_generate_the_same_tokens(family, settings, generators):
    expected, compiled, exported = (generate(model, RAR_SETTINGS[settings]) for model in generators[family])
    assert torch.equal(compiled, expected)
    assert torch.equal(exported, expected)
