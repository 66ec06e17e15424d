"""Sampling: pure functions against the reference and brute force, and the decode loop on a tiny generator."""

import contextlib
import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from tests.modeling.generators import TINY_SIZES, Recorder, record_forward_rows, tiny_ar, tiny_batch, tiny_rar
from tests.testing import reference_tensors
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.modeling import generation_vfmtok, modeling_vfmtok_rar
from vfmtok_hf.modeling.cache_vfmtok import DecodeCache, LayerCache
from vfmtok_hf.modeling.generation_vfmtok import (
    BLOCK_LENGTH,
    SamplingSettings,
    apply_guidance,
    constant_guidance,
    filter_top_k,
    filter_top_p,
    index_at_share,
    power_cosine_guidance,
    sample_tokens,
    uniform_numbers,
)


LABELS = torch.tensor([0, 1, 4, 2])


@pytest.fixture(params=[tiny_ar, tiny_rar], ids=["ar", "rar"])
def model(request):
    return request.param()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------------------------------------------------
# Filters


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.0001), (0, 0.9), (1, 1.0), (20, 1.0), (50, 0.8), (612, 1.0)], ids=str
)
def test_filters_remove_what_the_original_removes(top_k, top_p):
    reference = reference_tensors("gpt")
    settings = SamplingSettings(top_k=top_k, top_p=top_p)
    filtered = settings.choice.filter(reference["filter.logits"], settings.limits("cpu"))
    assert torch.equal(filtered, reference[f"filter.top_k{top_k}_top_p{top_p}"])


def test_ties_at_the_top_k_boundary_stay_as_in_the_original():
    reference = reference_tensors("gpt")
    assert torch.equal(filter_top_k(reference["filter.ties.logits"], 2), reference["filter.ties.top_k2_top_p1.0"])


def test_temperature_comes_before_the_filters():
    reference = reference_tensors("gpt")
    settings = SamplingSettings(temperature=0.7, top_k=50, top_p=0.8)
    filtered = settings.choice.filter(reference["filter.logits"], settings.limits("cpu"))
    probabilities = filtered.softmax(dim=-1)
    expected = reference["filter.probs_temperature0.7_top_k50_top_p0.8"]
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.75, 0.99])
def test_top_p_keeps_the_smallest_set_above_p(top_p):
    logits = torch.randn(20, 30)
    kept = filter_top_p(logits, top_p).isfinite()
    for row, probabilities in enumerate(logits.softmax(dim=-1)):
        expected, mass = set(), 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if mass <= top_p:
                expected.add(token)
            mass += probabilities[token].item()
        assert set(kept[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("top_k", [1, 3, 30, 100])
def test_top_k_keeps_the_k_largest(top_k):
    logits = torch.randn(20, 30)
    kept = filter_top_k(logits, top_k).isfinite()
    for row in range(20):
        expected = sorted(range(30), key=lambda token: -logits[row, token])[:top_k]
        assert set(kept[row].nonzero().flatten().tolist()) == set(expected)


# ---------------------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize("length", [1, 127, 128, 1000, 16384])
def test_indices_at_shares_are_those_of_cumulative_sums(length):
    weights = torch.randn(64, length).mul(3).exp().masked_fill(torch.rand(64, length) < 0.3, 0)
    weights[:, 0] += 1
    shares = torch.rand(64, dtype=torch.float64)
    sums = weights.double().cumsum(-1)
    expected = torch.searchsorted(sums, shares[:, None] * sums[:, -1:], right=True)[:, 0]
    assert torch.equal(index_at_share(weights, shares), expected)


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, -torch.inf, 2.0])
    numbers = uniform_numbers(1, 100_000, torch.Generator().manual_seed(0), logits.device)[0]
    draws = sample_tokens(logits.expand(100_000, -1), numbers)
    frequencies = draws.bincount(minlength=5) / len(draws)
    # Five standard deviations of a frequency near 1/2 at 100 000 draws are 0.008.
    torch.testing.assert_close(frequencies, logits.softmax(dim=-1), atol=0.008, rtol=0)
    assert frequencies[3] == 0


def test_one_generator_per_row_draws_the_same_in_any_split():
    together = uniform_numbers(5, 3, generators(7, 8, 9), torch.device("cpu"))
    apart = [uniform_numbers(5, 1, *generators(7 + row), torch.device("cpu")) for row in range(3)]
    assert torch.equal(together, torch.cat(apart, dim=1))


def test_numbers_of_all_steps_are_those_of_one_step_after_the_other():
    together, one_by_one = generators(3, 3)
    device = torch.device("cpu")
    steps = [uniform_numbers(1, 4, one_by_one, device) for _ in range(30)]
    assert torch.equal(uniform_numbers(30, 4, together, device), torch.cat(steps))


# ---------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_interpolates_and_at_1_is_exactly_the_condition():
    logits = torch.randn(4, 10)
    conditional, unconditional = logits.chunk(2)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(apply_guidance(logits, 2.5), expected)
    assert torch.equal(apply_guidance(logits, 1.0), conditional)


def test_constant_schedule_counts_its_interval_from_the_second_token():
    assert constant_guidance(6, 3.0) == [3.0] * 6
    assert constant_guidance(6, 3.0, interval=0) == [3.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    assert constant_guidance(6, 3.0, interval=99) == [3.0] * 6


@pytest.mark.parametrize(
    ("scale", "power", "name"),
    [
        (4.0, 1.0, "guidance4.0_pow1.0"),
        (4.0, 2.75, "guidance4.0_pow2.75"),
        (16.0, 2.75, "guidance16.0_pow2.75_temp1.02"),
    ],
)
def test_power_cosine_schedule_is_the_originals(scale, power, name):
    expected = reference_tensors("rar")[f"gen.{name}.cfg_scale"]
    torch.testing.assert_close(torch.tensor(power_cosine_guidance(16, scale, power)), expected, atol=1e-5, rtol=1e-6)


def test_power_cosine_schedule_starts_at_1_and_power_0_is_constant():
    assert power_cosine_guidance(8, 5.0, 1.5)[0] == 1.0
    assert power_cosine_guidance(8, 5.0, 0.0) == constant_guidance(8, 5.0)
    assert power_cosine_guidance(8, 5.0, 1.0, interval=2)[4:] == [1.0] * 4


# ---------------------------------------------------------------------------------------------------------------
# The loop


def test_tokens_have_the_contracted_shape_and_range(model):
    tokens = model.generate(LABELS)
    assert tokens.shape == (4, 9)
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < model.config.codebook_size


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0])
def test_guidance_up_to_1_is_no_guidance(model, scale):
    guided = model.generate(LABELS, guidance_scale=scale, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided, model.generate(LABELS, generator=torch.Generator().manual_seed(0)))


def test_without_guidance_each_step_is_one_pass_over_the_batch(model):
    rows = record_forward_rows(model)
    model.generate(LABELS)
    assert rows == [4] * 9


def test_with_guidance_each_step_is_one_pass_over_twice_the_batch(model):
    rows = record_forward_rows(model)
    model.generate(LABELS, guidance_scale=2.0)
    assert rows == [8] * 9


def test_the_unconditional_half_is_dropped_after_the_interval(model):
    rows = record_forward_rows(model)
    model.generate(LABELS, guidance_scale=2.0, guidance_interval=1)
    assert rows == [8] * 3 + [4] * 6


@pytest.mark.parametrize("interval", [None, 0, 3])
def test_guided_loop_equals_uncached_forwards_of_both_halves(interval):
    model, recorder = tiny_ar(), Recorder()
    tokens = model.generate(
        LABELS, guidance_scale=3.0, guidance_interval=interval, logits_processor=recorder, do_sample=False
    )
    conditional = model(LABELS, tokens).logits
    unconditional = model(torch.full_like(LABELS, model.config.num_classes), tokens).logits
    scales = torch.tensor(constant_guidance(9, 3.0, interval))[:, None]
    expected = unconditional + scales * (conditional - unconditional)
    torch.testing.assert_close(recorder.step_logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_cached_logits_equal_the_full_forward(model):
    recorder = Recorder()
    tokens = model.generate(LABELS, logits_processor=recorder)
    torch.testing.assert_close(recorder.step_logits, model(LABELS, tokens).logits, atol=1e-4, rtol=0)


def decode_all(model, cache, tokens, first=0):
    """Logits `(batch_size, positions, codebook_size)` of decode steps at all positions from the `first` on."""
    count = model.num_condition_tokens
    steps = []
    for position in range(first, cache.max_length):
        cache.show(position + 1)
        model.prepare_step(torch.tensor(position), cache)
        steps.append(model.decode_step(tokens[:, max(position - count, 0)], torch.tensor(position), cache))
    return torch.stack(steps, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_prefix_enters_the_cache_in_one_call_or_position_by_position(model, length):
    tokens, count = torch.randint(model.config.codebook_size, (4, 9)), model.num_condition_tokens
    at_once, in_steps = model.new_cache(), model.new_cache()
    logits = model(LABELS, tokens[:, :length], cache=at_once).logits
    assert logits.shape == (4, 1, model.config.codebook_size)
    model(LABELS, tokens, cache=in_steps)  # whose keys and values the steps overwrite
    for layer in in_steps.layers:
        layer.keys.fill_(3), layer.values.fill_(3)
    stepwise = decode_all(model, in_steps, tokens)[:, count - 1 :]
    torch.testing.assert_close(logits[:, 0], stepwise[:, length], atol=1e-5, rtol=0)
    rest = decode_all(model, at_once, tokens, first=count + length)
    torch.testing.assert_close(rest, stepwise[:, length + 1 :], atol=1e-5, rtol=0)
    torch.testing.assert_close(stepwise, model(LABELS, tokens).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_step_may_be_at_different_positions(model):
    tokens, count = torch.randint(model.config.codebook_size, (4, 9)), model.num_condition_tokens
    together, apart = model.new_cache(), model.new_cache()
    model(LABELS, tokens[:, :0], cache=together)
    model(LABELS, tokens[:, :0], cache=apart)
    expected = decode_all(model, together, tokens)
    delays = torch.arange(4)
    for step in range(apart.max_length):
        positions = (step - delays).clamp(min=0)
        if step <= delays[-1]:  # a row that has not begun begins again
            model.begin(apart, model.embed_condition(LABELS))
        model.prepare_step(positions, apart)
        read = tokens.gather(1, (positions - count).clamp(min=0)[:, None])[:, 0]
        logits = model.decode_step(read, positions, apart)
        torch.testing.assert_close(logits, expected[torch.arange(4), positions], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_cache_is_float32_at_least_on_cpus(model, dtype, expected):
    model.to(dtype)
    labels, tokens = tiny_batch(model)
    cache = model.new_cache()
    model(labels, tokens[:, :0], cache=cache)
    logits = decode_all(model, cache, tokens, first=model.num_condition_tokens)
    assert {layer.keys.dtype for layer in cache.layers} | {layer.values.dtype for layer in cache.layers} == {expected}
    # bfloat16 has 8 bits: the sums of a few hidden units differ by that much from one order to the other.
    whole = model(labels, tokens).logits[:, 1:]
    torch.testing.assert_close(logits, whole, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("is_number", [True, False])
def test_keys_and_values_keep_their_dtypes(is_number):
    """Under autocast a norm leaves keys in float32, values come from a product in half precision."""
    cache = LayerCache(3)
    keys, values = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 3, 4)
    cache.update(keys[:, :, :1], values[:, :, :1], None, None)
    for position in (1, 2):
        step, mask = slice(position, position + 1), torch.zeros(1, 1, 1, position + 1)
        arguments = (position, None) if is_number else (torch.tensor(position), mask)
        kept = cache.update(keys[:, :, step], values[:, :, step], *arguments)
    assert torch.equal(kept[0], keys)
    assert torch.equal(kept[1], values)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 256, 257])
def test_steps_look_at_a_few_lengths_that_hold_all_positions_so_far(length):
    cache, seen = DecodeCache(1, length, num_lengths=7), []
    for position in range(length):
        cache.show(position + 1)
        assert position < cache.visible_length <= length
        seen.append(cache.visible_length)
    assert seen == sorted(seen)
    assert len(set(seen)) <= 7
    assert seen[-1] == length


def test_only_steps_that_see_unfilled_positions_need_a_mask():
    exact, rounded = DecodeCache(1, 9), DecodeCache(1, 9, num_lengths=3)
    for cache in (exact, rounded):
        cache.layers[0].update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), None, None)
    position = torch.tensor(4)
    exact.show(5, filled=True)
    rounded.show(5, filled=True)
    assert exact.position_and_mask(position) == (4, None)
    cases = [(rounded, position, 8), (exact, torch.tensor([4, 2]), 5)]
    for cache, positions, visible in cases:
        returned, mask = cache.position_and_mask(positions)
        assert returned is positions
        assert torch.equal(mask[:, 0, 0] == 0, torch.arange(visible) <= positions.reshape(-1, 1))


@torch.no_grad()
def test_one_limit_may_serve_several_steps(model):
    tokens = torch.randint(model.config.codebook_size, (4, 9))
    limited, exact = model.new_cache(), model.new_cache()
    for cache in (limited, exact):
        model(LABELS, tokens[:, :1], cache=cache)
    limited.show(limited.max_length - 1)
    for position in range(model.num_condition_tokens + 1, limited.max_length - 1):
        token, position = tokens[:, position - model.num_condition_tokens], torch.tensor(position)
        exact.show(int(position) + 1, filled=True)
        for cache in (limited, exact):
            model.prepare_step(position, cache)
        logits = model.decode_step(token, position, limited)
        torch.testing.assert_close(logits, model.decode_step(token, position, exact), atol=1e-5, rtol=0)


def test_a_seed_gives_the_same_tokens_in_any_batch_split(model):
    together = model.generate(LABELS, guidance_scale=1.5, generator=generators(1, 2, 3, 4))
    halves = [model.generate(LABELS[:2], guidance_scale=1.5, generator=generators(1, 2))]
    halves += [model.generate(LABELS[2:3], guidance_scale=1.5, generator=generators(3)[0])]
    halves += [model.generate(LABELS[3:], guidance_scale=1.5, generator=generators(4))]
    assert torch.equal(together, torch.cat(halves))


def test_without_sampling_the_most_probable_token_is_taken(model):
    tokens = model.generate(LABELS, do_sample=False, temperature=0.1, top_k=3)
    recorder = Recorder()
    assert torch.equal(model.generate(LABELS, top_k=1, logits_processor=recorder), tokens)
    assert torch.equal(recorder.step_logits.argmax(dim=-1), tokens)


def test_a_logits_processor_sees_the_tokens_so_far_and_decides(model):
    recorder = Recorder()
    forbidden = list(range(16, 32))
    processors = LogitsProcessorList([recorder, SuppressTokensLogitsProcessor(forbidden)])
    tokens = model.generate(LABELS, logits_processor=processors, guidance_scale=2.0)
    assert tokens.max() < 16
    assert all(torch.equal(seen, tokens[:, :step]) for step, seen in enumerate(recorder.tokens))


def test_labels_may_be_a_list(model):
    assert torch.equal(model.generate([0, 1, 4, 2], do_sample=False), model.generate(LABELS, do_sample=False))
    with pytest.raises(TypeError, match="class numbers.*VFMTokPipeline takes names"):
        model.generate(["heart"])
    with pytest.raises(TypeError, match="class_labels must be a tensor, got list"):
        model(class_labels=[0], image_tokens=torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_tokens_that_the_callback_returns_take_the_place_of_those_drawn(model, guidance_scale):
    """The next token is the one that follows the returned tokens in a full pass."""

    def replace(step, image_tokens):
        return torch.where(torch.arange(9) == step, 7 * step % 32, image_tokens)

    recorder = Recorder()
    options = {"do_sample": False, "guidance_scale": guidance_scale, "logits_processor": recorder}
    tokens = model.generate(LABELS, callback=replace, **options)
    assert torch.equal(tokens, (7 * torch.arange(9) % 32).expand(4, -1))
    if guidance_scale == 1:
        expected = model(LABELS, tokens).logits
        torch.testing.assert_close(recorder.step_logits, expected, atol=1e-5, rtol=1e-4)


def test_tokens_that_the_callback_returns_stay_as_they_are(model):
    own = torch.zeros(1, 9, dtype=torch.int64).expand(4, -1)
    model.generate(LABELS, callback=lambda step, _: own if step == 3 else None, do_sample=False)
    assert not own.any()


def test_the_callback_sees_each_step_and_may_stop(model):
    seen = []

    def callback(step, image_tokens):
        seen.append((step, image_tokens.clone()))
        return step < 4

    tokens = model.generate(LABELS, callback=callback, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], tokens)
    assert torch.equal(tokens[:, 5:], torch.zeros(4, 4, dtype=torch.int64))
    whole = model.generate(LABELS, guidance_scale=2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens[:, :5], whole[:, :5])


class RefuseWaits(TorchDispatchMode):
    """
    Refuses what would make Python wait for the device, or what a CUDA graph cannot hold: reads of tensor values, results
    whose shape depends on values, and copies to another device.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        device = (kwargs or {}).get("device")
        assert not tags, func
        assert func is not torch.ops.aten._to_copy.default or device is None or device.type == args[0].device.type, (
            func
        )
        return func(*args, **(kwargs or {}))


class RefuseSynchronizations:
    """The same on a GPU, by torch's own account."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")


class Watch(contextlib.ExitStack):
    """A callback that refuses waits from the first token drawn to the last of 9."""

    def __init__(self, mode_class=RefuseWaits):
        super().__init__()
        self.mode, self.watches = mode_class(), False

    def __call__(self, step, image_tokens):
        if not self.watches:
            self.watches = True
            self.enter_context(self.mode)
        if step == 8:
            self.close()


WATCHED = {"guidance_scale": 2.0, "guidance_interval": 2, "top_k": 10, "top_p": 0.9, "temperature": 0.8}


@pytest.mark.parametrize("do_sample", [True, False])
def test_no_step_waits_for_the_device_or_has_shapes_from_values(model, do_sample):
    with Watch() as watch:
        model.generate(LABELS, **WATCHED, do_sample=do_sample, generator=torch.Generator(), callback=watch)
    assert watch.watches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiles", [False, True])
def test_no_step_waits_for_a_gpu(model, compiles):
    model.cuda()
    if compiles:
        model.compile_decoding()
        for _ in range(3):  # inductor warms CUDA graphs up, then records them
            model.generate(LABELS.cuda(), **WATCHED)
    with Watch(RefuseSynchronizations) as watch:
        model.generate(LABELS.cuda(), **WATCHED, callback=watch)


def test_no_step_of_an_edit_waits_for_the_device(monkeypatch):
    """Nor the products of a RAR's modulations, of which each step has its own here."""
    monkeypatch.setattr(modeling_vfmtok_rar, "ROWS_OF_MODULATIONS", 1)
    edit = {"image_tokens": torch.arange(36).view(4, 9) % 32, "keep_mask": torch.arange(9) % 4 == 0}
    with Watch() as watch:
        tiny_rar().generate(LABELS, **WATCHED | {"guidance_interval": 5}, **edit, callback=watch)
    assert watch.watches


# ---------------------------------------------------------------------------------------------------------------
# Defaults


def test_generation_config_sets_the_defaults_and_is_saved(model, tmp_path):
    settings = {"guidance_scale": 2.0, "guidance_interval": 3, "top_k": 4, "do_sample": True}
    expected = model.generate(LABELS, **settings, generator=torch.Generator().manual_seed(0))
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(LABELS, generator=torch.Generator().manual_seed(0)), expected)
    rows = record_forward_rows(loaded)
    loaded.generate(LABELS, guidance_scale=1.0)
    assert rows == [4] * 9


def test_unset_generation_config_means_the_whole_codebook():
    settings = SamplingSettings.resolve({"top_k": None}, None, tiny_ar().generation_config)
    assert settings == SamplingSettings(top_k=0, do_sample=True, temperature=1.0)


def test_a_generation_config_of_the_call_overrides_the_models_and_keywords_override_both(model):
    model.generation_config.update(top_k=1, temperature=3.0, guidance_scale=2.0)
    config = GenerationConfig(top_k=4, guidance_scale=3.0, guidance_interval=5)
    settings = model.sampling_settings.resolve({"guidance_scale": 1.0}, config, model.generation_config)
    assert settings == model.sampling_settings(1.0, 5, temperature=3.0, top_k=4)
    drawn = [
        model.generate(LABELS, config, generator=torch.Generator().manual_seed(0), guidance_scale=1.0),
        model.generate(
            LABELS,
            generator=torch.Generator().manual_seed(0),
            guidance_scale=1.0,
            guidance_interval=5,
            temperature=3.0,
            top_k=4,
        ),
    ]
    assert torch.equal(*drawn)


def test_unknown_arguments_are_refused(model):
    with pytest.raises(TypeError, match="unknown arguments: seed, top_q"):
        model.generate(LABELS, top_q=0.5, seed=3, top_k=1)


# ---------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be"),
        ({"guidance_scale": math.nan}, "guidance_scale must be"),
        ({"guidance_interval": -1}, "guidance_interval must be"),
        ({"temperature": 0.0}, "do_sample=False"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p must be in"),
        ({"generator": generators(0)}, "Got 1 generators for 4 class labels"),
    ],
    # Not the values: a generator shows its address, and test processes must agree on names.
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_unusable_settings_are_refused_before_any_work(model, arguments, message):
    rows = record_forward_rows(model)
    with pytest.raises(ValueError, match=message):
        model.generate(LABELS, **arguments)
    assert rows == []


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 6]), ValueError, "class_labels must lie in 0 to 5, got 6"),
        (torch.tensor([-1, 0]), ValueError, "class_labels must lie in 0 to 5, got -1"),
        (torch.tensor([0.0, 1.0]), TypeError, r"int64, got torch.float32: convert with .long\(\)"),
        (torch.tensor([[0], [1]]), ValueError, r"shape \(batch_size,\), got \(2, 1\)"),
    ],
    ids=["above", "below", "float", "shape"],
)
def test_unusable_labels_are_refused_before_any_work(model, labels, error, message):
    rows = record_forward_rows(model)
    with pytest.raises(error, match=message):
        model.generate(labels)
    with pytest.raises(error, match=message):
        model(labels, torch.zeros(2, TINY_SIZES["num_image_tokens"], dtype=torch.int64))
    assert rows == [2]


@pytest.mark.parametrize("labels", [[], torch.tensor([], dtype=torch.int64)], ids=["list", "tensor"])
def test_no_labels_are_refused(model, labels):
    with pytest.raises(ValueError, match="no class labels: pass at least one"):
        model.generate(labels)


@pytest.mark.parametrize("name", ["guidance_scale", "guidance_interval", "temperature", "top_k", "top_p"])
def test_a_switch_is_no_number(model, name):
    with pytest.raises(TypeError, match=f"{name} must be .* got True"):
        model.generate(LABELS, **{name: True})


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_nan_in_the_weights_is_an_error(model, do_sample, guidance_scale):
    model.layers[1].self_attn.o_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights contain NaN"):
        model.generate(LABELS, do_sample=do_sample, guidance_scale=guidance_scale, top_k=5, top_p=0.9)


def test_a_processor_that_forbids_every_token_is_an_error(model):
    with pytest.raises(ValueError, match="forbade every token"):
        model.generate(LABELS, logits_processor=lambda tokens, logits: torch.full_like(logits, -torch.inf))


# ---------------------------------------------------------------------------------------------------------------
# Compiled


def compiled_with_counter(model) -> CompileCounter:
    counter = CompileCounter()
    torch._dynamo.reset()
    model.compile_decoding(backend=counter)
    return counter


# 6 x 6 tokens, which steps see in five lengths.
LONGER = {"num_image_tokens": 36, "num_position_embeddings": 38, "num_timestep_embeddings": 38}


def longer(kind):
    return tiny_ar(num_image_tokens=36) if kind == "ar" else tiny_rar(**LONGER)


@pytest.mark.parametrize("settings", [{}, {"guidance_interval": 3, "do_sample": False}], ids=["guided", "partly"])
@pytest.mark.parametrize("kind", ["ar", "rar"])
def test_a_generation_has_eight_graphs_at_most_and_its_repetition_none(kind, settings):
    model = longer(kind)
    labels = LABELS[:3]

    def draw(seed=0):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(labels, generator=generator, guidance_scale=3.0, top_p=0.9, **settings)

    plain = draw()
    counter = compiled_with_counter(model)
    assert torch.equal(draw(), plain)
    count = counter.frame_count
    assert 5 <= count <= 8
    draw(seed=1)
    assert counter.frame_count == count


def test_an_edit_has_eight_graphs_at_most():
    model = tiny_rar(**LONGER)
    counter = compiled_with_counter(model)
    edit = {"image_tokens": torch.arange(4 * 36).view(4, 36) % 32, "keep_mask": torch.arange(36) < 1}
    model.generate(LABELS, guidance_scale=3.0, guidance_interval=4, **edit)
    assert 5 <= counter.frame_count <= 8


@pytest.mark.parametrize("codebook_size", [1000, 16384])
def test_no_compiled_scan_is_long(codebook_size, monkeypatch):
    """Inductor cannot generate code for scans over a codebook in several rows on CUDA (torch 2.11)."""
    scans = []

    def backend(graph, inputs):
        scans.extend(node for node in graph.graph.nodes if node.target in ("cumsum", torch.cumsum))
        return graph.forward

    monkeypatch.setattr(generation_vfmtok, "COMPILED_LENGTHS", 1)  # graphs of other lengths draw alike
    model = tiny_ar(codebook_size=codebook_size)
    torch._dynamo.reset()
    model.compile_decoding(backend=backend)
    model.generate(LABELS, top_k=100, top_p=0.9)
    assert len(scans) > 2
    assert max(node.meta["example_value"].shape[-1] for node in scans) <= BLOCK_LENGTH


def test_what_compiled_steps_write_has_a_fixed_address(model):
    """inductor skips CUDA graphs that write to other inputs, and records them anew for each address."""
    written = []

    def backend(graph, inputs):
        names = [node for node in graph.graph.nodes if node.op == "placeholder"]

        def run(*arguments):
            before = [argument._version for argument in arguments]
            result = graph.forward(*arguments)
            written.extend(
                node
                for node, argument, version in zip(names, arguments, before, strict=True)
                if argument._version > version
            )
            return result

        return run

    torch._dynamo.reset()
    model.compile_decoding(backend=backend)
    addresses = []
    for guidance_scale in (3.0, 2.0):
        model.generate(LABELS, guidance_scale=guidance_scale, guidance_interval=3)
        ((cache,),) = model._compiled_steps.unused_caches.values()
        addresses.append({name: buffer.data_ptr() for name, buffer in cache.named_buffers()})
    assert addresses[0] == addresses[1]
    assert len(written) >= 2 * 8 * 2 * model.config.num_hidden_layers  # keys and values of all layers and steps
    assert all("_dynamo_static_input_type" in node.meta["tensor_dict"] for node in written)


def test_many_numbers_of_rows_are_compiled():
    """Past the graphs that torch.compile allows a code object, beyond which it would refuse."""
    model = tiny_ar(num_image_tokens=36)
    counter = compiled_with_counter(model)
    for rows in (1, 2, 3):
        model.generate(LABELS[:rows])
    assert counter.frame_count > 8


def test_other_guidance_temperature_and_top_p_need_no_other_graphs(model):
    settings = {"guidance_scale": 3.0, "temperature": 0.9, "top_p": 0.9}
    changes = [{"guidance_scale": 2.0}, {"temperature": 0.5}, {"top_p": 0.3}, {"guidance_scale": np.float32(2)}]
    plain = [model.generate(LABELS, generator=generators(1, 2, 3, 4), **settings | change) for change in changes]
    counter = compiled_with_counter(model)
    model.generate(LABELS, **settings)
    count = counter.frame_count
    for change, expected in zip(changes, plain, strict=True):
        drawn = model.generate(LABELS, generator=generators(1, 2, 3, 4), **settings | change)
        assert torch.equal(drawn, expected), change
    assert counter.frame_count == count
    model.generate(LABELS, **settings, top_k=np.int64(5))
    assert counter.frame_count > count


CHANGES = {
    "attention": lambda model: model.set_attn_implementation("eager"),
    "dtype": lambda model: model.to(torch.float64),
    "frozen weights": lambda model: model.requires_grad_(False),
    "adapter": lambda model: inject_adapter_in_model(
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model
    ),
    "edited weight": lambda model: model.lm_head.weight.data.neg_(),
    "another layer": lambda model: model.layers[0].self_attn.register_module(
        "o_proj", torch.nn.Linear(*reversed(model.layers[0].self_attn.o_proj.weight.shape))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["ar", "rar"])
def test_compiled_steps_follow_changes_of_the_model(kind, change):
    """A longer model, whose lengths alone nearly fill the graphs that torch.compile allows a function."""
    model = longer(kind)
    compiled_with_counter(model)
    model.generate(LABELS, do_sample=False)
    change(model)
    drawn = model.generate(LABELS, do_sample=False)
    model.compile_decoding(disable=True)
    assert torch.equal(drawn, model.generate(LABELS, do_sample=False))


@pytest.mark.parametrize("kind", ["ar", "rar"])
def test_compiled_steps_follow_their_context(kind):
    model = longer(kind)
    expected = model.generate(LABELS, do_sample=False)
    counter = compiled_with_counter(model)
    counts, addresses = [], []
    for _ in range(2):
        for context in (contextlib.nullcontext(), torch.inference_mode(), torch.autocast("cpu", enabled=False)):
            with context:
                assert torch.equal(model.generate(LABELS, do_sample=False), expected)
        counts.append(counter.frame_count)
        addresses.append(
            {cache.layers[0].keys.data_ptr() for (cache,) in model._compiled_steps.unused_caches.values()}
        )
    assert counts[0] == counts[1]
    assert addresses[0] == addresses[1]


def test_orders_and_editing_need_no_other_graphs():
    model = longer("rar")
    orders, tokens = torch.randperm(36), torch.arange(4 * 36).view(4, 36) % 32
    edit = {"image_tokens": tokens, "keep_mask": torch.arange(36) < 1}
    plain = [model.generate(LABELS, do_sample=False, **options) for options in ({}, {"orders": orders}, edit)]
    counter = compiled_with_counter(model)
    assert torch.equal(model.generate(LABELS, do_sample=False), plain[0])
    count = counter.frame_count
    assert torch.equal(model.generate(LABELS, do_sample=False, orders=orders), plain[1])
    assert torch.equal(model.generate(LABELS, do_sample=False, **edit), plain[2])
    assert counter.frame_count == count


def test_generations_of_a_compiled_model_may_run_inside_each_other(model):
    def generate_inside(step, tokens):
        if step == 4:
            model.generate(LABELS.flip(0))

    def draw(callback):
        return model.generate(LABELS, generator=generators(1, 2, 3, 4), callback=callback)

    expected = draw(None)
    counter = compiled_with_counter(model)
    assert torch.equal(draw(generate_inside), expected)
    count = counter.frame_count
    assert torch.equal(draw(generate_inside), expected)
    assert counter.frame_count == count


def test_threads_may_share_a_compiled_model(model):
    """Also while one of them compiles, which torch before 2.15 forbids the others."""
    seed, warm = torch.Generator(), LABELS[:1]
    numbers_of_rows = range(2, 5)
    expected = [model.generate(LABELS[:rows], generator=generators(1, 2, 3, 4)[:rows]) for rows in numbers_of_rows]
    expected_warm = model.generate(warm, generator=seed.manual_seed(1))
    torch._dynamo.reset()
    model.compile_decoding(backend="aot_eager")
    model.generate(warm)
    with ThreadPoolExecutor(1) as pool:
        compiling = [
            pool.submit(model.generate, LABELS[:rows], generator=generators(1, 2, 3, 4)[:rows])
            for rows in numbers_of_rows
        ]
        while not all(future.done() for future in compiling):
            assert torch.equal(model.generate(warm, generator=seed.manual_seed(1)), expected_warm)
    assert all(torch.equal(future.result(), tokens) for future, tokens in zip(compiling, expected, strict=True))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_of_a_compiled_model_compile_their_own_steps(model, copy_of):
    model.compile_decoding(backend="eager")
    expected = model.generate(LABELS, do_sample=False)
    copied = copy_of(model)
    assert not copied._compiled_steps.functions
    assert torch.equal(copied.generate(LABELS, do_sample=False), expected)
    assert copied._compiled_steps.functions


INVALID_OPTIONS = {"fullgraph": False, "dynamic": True, "mode": "unheard-of", "backend": "unheard-of"}


@pytest.mark.parametrize("name", INVALID_OPTIONS)
def test_invalid_options_are_refused_before_generation(model, name):
    expected = "multiple values" if name in ("fullgraph", "dynamic") else "unheard-of"
    with pytest.raises((TypeError, RuntimeError), match=expected):
        model.compile_decoding(**{name: INVALID_OPTIONS[name]})


@pytest.mark.parametrize("value", [0.5, 1, "yes"])
def test_do_sample_is_a_switch(model, value):
    with pytest.raises(TypeError, match="do_sample must be True or False"):
        model.generate(LABELS, do_sample=value)


def test_compiled_steps_serve_a_logits_processor_and_editing():
    model, recorder = tiny_rar(), Recorder()
    labels, tokens = tiny_batch(model)
    settings = {"orders": torch.randperm(9), "image_tokens": tokens, "keep_mask": torch.arange(9) < 4}
    settings |= {"guidance_scale": 3.0, "guidance_interval": 4, "do_sample": False}
    plain = model.generate(labels, **settings)
    compiled_with_counter(model)
    assert torch.equal(model.generate(labels, **settings), plain)
    assert torch.equal(model.generate(labels, **settings, logits_processor=recorder), plain)
    assert len(recorder.tokens) == 5


def test_packed_weights_cannot_be_compiled_and_say_so(model):
    pack_weights(model).compile_decoding()
    with pytest.raises(Exception, match="unpack_weights"):
        model.generate(LABELS)
