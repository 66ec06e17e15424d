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
from vfmtok_hf.cpu import packing as cpu_inference
from vfmtok_hf.cpu.packing import (
    AdaptiveThreads,
    PackedLinear,
    pack_weights,
    pretrained_parts,
    unpack_weights,
)
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
    assert set(attentions(model)) == {"eager"}
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
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    assert query.joint_product is key.joint_product is value.joint_product
    twin = copy.deepcopy(attention)
    assert twin.k_proj.joint_product is twin.q_proj.joint_product is not query.joint_product
    inputs = torch.randn(2, 1, 32)
    for one, other in zip(query.joint_product(inputs), (twin.q_proj, twin.k_proj, twin.v_proj), strict=True):
        assert one.equal(other(inputs))
    for state_dict in (model.state_dict(), unpack_weights(model).state_dict()):
        assert state_dict.keys() == weights.keys()
        assert all(tensor.equal(weights[name]) for name, tensor in state_dict.items())


# ---------------------------------------------------------------------------------------------------------------
# Threads


class SimulatedSteps:
    """A clock on which a step lasts as long as `seconds` says for torch's number of threads."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(cpu_inference.time, "perf_counter", lambda: self.now)

    def run(self, threads, steps):
        """Numbers of threads of the steps."""
        used = []
        for _ in range(steps):
            threads()
            used.append(torch.get_num_threads())
            self.now += self.seconds[used[-1]]
        return used


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_threads_follow_what_is_fastest_and_come_back(monkeypatch, four_threads):
    steps = SimulatedSteps(monkeypatch, {4: 1.0, 3: 1.3, 2: 1.9})
    with AdaptiveThreads() as threads:
        one_look = 2 * (threads.timed_steps + 1)  # steps with other numbers of threads
        assert steps.run(threads, 512).count(4) == 512 - one_look
        steps.seconds = {4: 5.0, 3: 1.4, 2: 2.0}  # a core is taken
        steps.run(threads, 24)
        busy = steps.run(threads, 512)
        assert busy.count(3) > 0.8 * 512
        assert busy.count(4) < 0.1 * 512
        steps.seconds = {4: 1.0, 3: 1.3, 2: 1.9}
        steps.run(threads, threads.pauses[1] + 16)
        assert set(steps.run(threads, 512)) == {4}
    assert torch.get_num_threads() == 4


def test_a_slow_step_and_slowly_growing_ones_are_no_reason_to_look(monkeypatch, four_threads):
    steps = SimulatedSteps(monkeypatch, {4: 1.0, 3: 1.3, 2: 1.9})
    with AdaptiveThreads() as threads:
        steps.run(threads, 64)
        for seconds, number in ((5.0, 1), (1.0, 16), (1.1, 16), (1.2, 16)):
            steps.seconds[4] = seconds
            assert set(steps.run(threads, number)) == {4}


def test_threads_serve_as_callback(four_threads):
    model, labels = tiny_ar(), torch.arange(2)
    with AdaptiveThreads() as threads:
        tokens = model.generate(labels, do_sample=False, callback=threads)
    assert tokens.equal(model.generate(labels, do_sample=False))


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
