"""Packed weights: equal results, and every use that a plain layer has either works or says what to do."""

import copy
import ctypes
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from tests.modeling.generators import tiny_ar, tiny_batch, tiny_rar
from tests.testing import tiny_images, tiny_model
from vfmtok_hf import VFMTokARForImageGeneration, VFMTokModel
from vfmtok_hf.cpu.attention import BLOCKWISE_ATTENTION
from vfmtok_hf.cpu.packing import PackedLinear, has_product, pack_weights, pretrained_parts, unpack_weights
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARModulation


@pytest.fixture
def linear():
    return nn.Linear(20, 30)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 7, 20), (0, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_computes_the_same(shape, bias):
    linear, inputs = nn.Linear(20, 30, bias=bias), torch.randn(shape)
    torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs))


def test_strided_inputs(linear):
    inputs = torch.randn(20, 5).T
    torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs))


@pytest.mark.skipif(not has_product(torch.bfloat16), reason="oneDNN multiplies no bfloat16 here: it needs AVX-512")
def test_bfloat16(linear):
    inputs = torch.randn(3, 20).bfloat16()
    torch.testing.assert_close(PackedLinear(linear.bfloat16())(inputs), linear(inputs))


def test_copies_and_pickles(linear):
    packed, inputs = PackedLinear(linear), torch.randn(2, 20)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):  # noqa: S301
        assert torch.equal(twin(inputs), packed(inputs))


def test_model_keeps_its_results_and_gives_its_weights_back():
    model, images = tiny_model().eval(), tiny_images()
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(images)
        packed = pack_weights(model)(images)
    assert packed.image_tokens.equal(expected.image_tokens)
    torch.testing.assert_close(packed.reconstruction, expected.reconstruction)
    assert any(isinstance(module, PackedLinear) for module in model.vision_model.modules())
    for state_dict in (model.state_dict(), unpack_weights(model).state_dict()):
        assert state_dict.keys() == weights.keys()
        assert all(tensor.equal(weights[name]) for name, tensor in state_dict.items())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    model(images, return_loss=True).loss.backward()


@pytest.mark.parametrize("tiny_generator", [tiny_ar, tiny_rar])
def test_generators_draw_the_same_tokens(tiny_generator):
    model = tiny_generator().eval()
    class_labels, _ = tiny_batch(model)
    draw = lambda: model.generate(class_labels, generator=torch.Generator().manual_seed(0))  # noqa: E731
    expected = draw()
    pack_weights(model)
    assert draw().equal(expected)


def attentions(model):
    return [part.config._attn_implementation for part in pretrained_parts(model)]


@pytest.mark.parametrize("tiny", [tiny_model, tiny_ar, tiny_rar])
def test_attention_of_bfloat16(tiny):
    """As packing changes nothing else that counts, results stay those of bfloat16."""
    model = tiny()
    pack_weights(model)
    assert set(attentions(model)) == {"sdpa"}
    pack_weights(pack_weights(unpack_weights(model).to(torch.bfloat16)))
    own, *of_vision_models = attentions(model)
    assert own == BLOCKWISE_ATTENTION
    assert set(of_vision_models) <= {"eager"}
    assert set(attentions(unpack_weights(model))) == {"sdpa"}


def test_each_part_gets_its_own_attention_back():
    model = tiny_model().to(torch.bfloat16)
    model.set_attn_implementation({"": "eager", "vision_config": "sdpa"})
    before = attentions(model)
    assert set(before) == {"eager", "sdpa"}
    assert attentions(unpack_weights(pack_weights(model))) == before


def test_packing_without_a_vision_model_warns_of_nothing(tmp_path, caplog):
    tiny_model(save_vision_model=False).save_pretrained(tmp_path)
    model = VFMTokModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vision_model is None
    transformers.logging.enable_propagation()
    unpack_weights(pack_weights(model))
    transformers.logging.disable_propagation()
    assert caplog.records == []


def test_kinds_of_linear_layers():
    """A class that only has a name of its own is packed and comes back; one whose weight others read stays."""
    model = nn.Sequential(VFMTokRARModulation(20, 20), nn.MultiheadAttention(20, 2))
    inputs = torch.randn(3, 1, 20)
    expected = model[1](inputs, inputs, inputs)[0]
    pack_weights(model)
    assert type(model[0]) is PackedLinear
    assert model[1](inputs, inputs, inputs)[0].equal(expected)
    assert type(unpack_weights(model)[0]) is VFMTokRARModulation


def test_save_and_load(tmp_path):
    model = tiny_ar().eval()
    class_labels, image_tokens = tiny_batch(model)
    with torch.no_grad():
        expected = model(class_labels, image_tokens).logits
        pack_weights(model).save_pretrained(tmp_path)
        loaded = VFMTokARForImageGeneration.from_pretrained(tmp_path)
        assert loaded(class_labels, image_tokens).logits.equal(expected)


def test_moving_a_packed_model_says_what_to_do(linear):
    model = pack_weights(nn.Sequential(linear))
    assert model.to("cpu", torch.float32) is model
    for change in (lambda: model.to("meta"), model.double):
        with pytest.raises(RuntimeError, match="unpack_weights"):
            change()


def test_training_a_packed_model_says_what_to_do(linear):
    model = pack_weights(nn.Sequential(nn.Linear(20, 20), linear))
    with pytest.raises(RuntimeError, match="unpack_weights"):
        model(torch.randn(2, 20, requires_grad=True))


def test_other_dtypes_stay_as_they_are(linear):
    model = pack_weights(nn.Sequential(linear.double()))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("tiny_generator", [tiny_ar, tiny_rar])
def test_layers_on_one_input_become_one_product_and_stay_separate_on_disk(tiny_generator):
    model = tiny_generator().eval()
    weights = copy.deepcopy(model.state_dict())
    attention = pack_weights(model).layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    assert len({layer.joint_product for layer in layers}) == 1
    twin = copy.deepcopy(attention)
    others = twin.q_proj, twin.k_proj, twin.v_proj
    assert {layer.joint_product for layer in others}.isdisjoint({layers[0].joint_product})
    inputs = torch.randn(2, 1, 32)
    plain = [layer.to_linear()(inputs) for layer in layers]
    for chosen in (layers, others, layers[::-1]):
        for layer in chosen:
            torch.testing.assert_close(layer(inputs), plain[layer.index])
    # Other inputs in between, as from another thread.
    for layer in layers:
        torch.testing.assert_close(layer(inputs), plain[layer.index])
        others[0].joint_product.output(layer.index, torch.zeros(2, 1, 32))
        layers[0](torch.zeros(2, 1, 32))
    for state_dict in (model.state_dict(), unpack_weights(model).state_dict()):
        assert state_dict.keys() == weights.keys()
        assert all(tensor.equal(weights[name]) for name, tensor in state_dict.items())


# Blocks of 64 and 48 MB, which glibc by itself takes from the system and returns to it.
FRESH_PAGES = """
import resource, torch
from vfmtok_hf.cpu.packing import keep_freed_memory
{call}
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**18), torch.ones(48 * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(page_faults() for _ in range(5)))
"""


@pytest.mark.process
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="runs with glibc, whose settings these are",
)
def test_freed_memory_is_used_again():
    def faults(call: str) -> list[int]:
        command = [sys.executable, "-c", FRESH_PAGES.format(call=call)]
        return list(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))

    kept = faults("keep_freed_memory()")
    assert kept[0] > 1000
    assert kept[-1] < 100
    assert min(faults("")) > 1000
