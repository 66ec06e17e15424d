"""The next-token generator: the original's numbers from its converted checkpoint, and properties of a tiny one."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.modeling.generators import (
    TINY_SIZES,
    Recorder,
    assert_gradient_norms,
    draw_with,
    move_gradients_to_weights,
    record_step_logits,
    tiny_ar,
    tiny_batch,
)
from tests.testing import REFERENCE, REFERENCE_AR_CONFIG, reference_tensors
from vfmtok_hf.conversion import convert_ar, export_original_ar
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.modeling import generation_vfmtok
from vfmtok_hf.modeling.configuration_vfmtok_ar import VFMTokARConfig
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration, apply_rotary, rotary_table


# The reference README's bounds, and why: cached and uncached passes of the original differ by up to 1.2e-5.
LOGITS_BOUND = {"atol": 1e-4, "rtol": 0}
GUIDED_LOGITS_BOUND = {"atol": 5e-4, "rtol": 0}


@pytest.fixture(scope="module")
def reference():
    return reference_tensors("gpt")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Loads the reference checkpoint's `ema` or `model` weights after conversion."""
    folders = {}
    for weights in ("ema", "model"):
        folders[weights] = tmp_path_factory.mktemp("ar") / weights
        convert_ar(REFERENCE / "gpt" / "gpt.pt", folders[weights], weights=weights, config=REFERENCE_AR_CONFIG)
    return lambda weights: VFMTokARForImageGeneration.from_pretrained(folders[weights]).eval()


# ---------------------------------------------------------------------------------------------------------------
# The original's numbers


def test_rotary_table_with_its_zero_class_row(reference):
    table = rotary_table(torch.arange(17), grid_size=4, head_dim=16, theta=10000.0)
    first, second = table.unflatten(-1, (-1, 2)).permute(3, 1, 2, 0)  # factors of the entries of each pair
    torch.testing.assert_close(second, reference["rope_table"], atol=1e-6, rtol=0)
    assert torch.equal(first, second * torch.tensor([1, -1]))
    assert not table[:, 0].any()


def test_rotary_embedding_is_that_of_complex_numbers():
    states, positions = torch.randn(2, 3, 10, 16), torch.arange(10)
    table = rotary_table(positions, grid_size=3, head_dim=16, theta=10000.0)
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)))
    rotations = torch.view_as_complex(table[:, :, 1::2].movedim(0, -1).contiguous())
    torch.testing.assert_close(apply_rotary(states, table), torch.view_as_real(pairs * rotations).flatten(-2))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("weights", ["ema", "model"])
@torch.no_grad()
def test_reference_logits_after_the_class_and_every_token(reference, converted, weights, attention):
    model = converted(weights)
    model.set_attn_implementation(attention)
    hidden_states = model.decode_sequence(reference["labels"], reference["token_ids"])
    expected = reference[f"eval.{weights}.logits"]
    torch.testing.assert_close(model.lm_head(hidden_states), expected, **LOGITS_BOUND)
    logits = model(reference["labels"], reference["token_ids"]).logits
    torch.testing.assert_close(logits, expected[:, :-1], **LOGITS_BOUND)


@torch.no_grad()
def test_reference_training_logits_and_losses(reference, converted):
    model, tokens = converted("model"), reference["token_ids"]
    output = model(reference["labels"], tokens, return_loss=True)
    torch.testing.assert_close(output.logits, reference["train.logits"], **LOGITS_BOUND)
    torch.testing.assert_close(output.loss, reference["train.loss"][0], atol=5e-5, rtol=0)

    losses = F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    valid = reference["train.valid_mask"][:, None].expand_as(losses)
    valid_loss = (losses * valid).sum() / valid.sum()
    torch.testing.assert_close(valid_loss, reference["train.loss_with_valid"][0], atol=5e-5, rtol=0)

    null_output = model(torch.full_like(reference["labels"], model.config.num_classes), tokens, return_loss=True)
    torch.testing.assert_close(null_output.logits, reference["train.logits_null_class"], **LOGITS_BOUND)
    torch.testing.assert_close(null_output.loss, reference["train.loss_null_class"][0], atol=5e-5, rtol=0)


@torch.no_grad()
def test_reference_embedding_of_a_dropped_label(reference, converted):
    model = converted("model")
    labels = reference["labels"].clone()
    labels[0] = model.config.num_classes
    expected = reference["train.label_embedding_forced_drop_first"]
    assert torch.equal(model.class_embedding(labels)[:, None], expected)


def test_reference_gradient_norms(reference, converted):
    model = converted("model")
    model(reference["labels"], reference["token_ids"], return_loss=True).loss.backward()
    move_gradients_to_weights(model)
    expected = json.loads((REFERENCE / "gpt" / "train_grad_norms.json").read_text())
    assert_gradient_norms(export_original_ar(model), expected)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("cfg1.0", {}),
        ("cfg1.5", {"guidance_scale": 1.5}),
        ("cfg4.0", {"guidance_scale": 4.0}),
        ("cfg4.0_interval5", {"guidance_scale": 4.0, "guidance_interval": 5}),
    ],
)
@pytest.mark.parametrize("prepare", [nn.Identity(), pack_weights], ids=["plain", "packed"])
def test_reference_greedy_tokens_and_step_logits(reference, converted, name, guidance, prepare):
    recorder = Recorder()
    tokens = prepare(converted("ema")).generate(
        reference["labels"], do_sample=False, logits_processor=recorder, **guidance
    )
    assert torch.equal(tokens, reference[f"gen.{name}.tokens"])
    torch.testing.assert_close(recorder.step_logits, reference[f"gen.{name}.step_logits"], **GUIDED_LOGITS_BOUND)


@pytest.mark.timeout(1500)  # inductor compiles for minutes on a busy machine
def test_reference_greedy_tokens_of_compiled_steps(reference, converted, monkeypatch):
    """Of several rows with a logits processor, and of a single one with sums over products and the draw in the graph."""
    monkeypatch.setattr(generation_vfmtok, "COMPILED_LENGTHS", 2)
    labels, expected, recorder = reference["labels"], reference["gen.cfg1.0.tokens"], Recorder()
    compiled = converted("ema")
    torch._dynamo.reset()
    compiled.compile_decoding()
    assert torch.equal(compiled.generate(labels, do_sample=False, logits_processor=recorder), expected)
    torch.testing.assert_close(recorder.step_logits, reference["gen.cfg1.0.step_logits"], **LOGITS_BOUND)
    assert torch.equal(compiled.generate(labels[:1], do_sample=False), expected[:1])


def test_reference_logits_of_both_halves_before_guidance(reference, converted):
    model = converted("ema")
    raw_logits = record_step_logits(model)
    model.generate(reference["labels"], do_sample=False, guidance_scale=1.5)
    expected = reference["gen.cfg1.5.raw_step_logits.first4"]
    torch.testing.assert_close(torch.stack(raw_logits[:4], dim=1), expected, **LOGITS_BOUND)


def test_reference_sampling_from_recorded_uniform_numbers(reference, converted, monkeypatch):
    monkeypatch.setattr(generation_vfmtok, "uniform_numbers", draw_with(reference["gen.uniform_driven.u"]))
    recorder = Recorder()
    tokens = converted("ema").generate(
        reference["labels"], guidance_scale=1.5, temperature=0.9, top_k=40, top_p=0.95, logits_processor=recorder
    )
    assert torch.equal(tokens, reference["gen.uniform_driven.tokens"])
    torch.testing.assert_close(
        recorder.step_logits, reference["gen.uniform_driven.step_logits"], **GUIDED_LOGITS_BOUND
    )


# ---------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize("variant", ["B", "L", "XL", "XXL", "2B", "3B"])
def test_variants_have_the_originals_parameter_counts(variant):
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())
    with torch.device("meta"):
        model = VFMTokARForImageGeneration(VFMTokARConfig.from_variant(variant))
    assert model.num_parameters() == counts[f"GPT-{variant}"]["total"]


def test_overrides_win_over_the_variant():
    config = VFMTokARConfig.from_variant("B", num_classes=7, hidden_size=96)
    assert (config.num_hidden_layers, config.hidden_size, config.num_classes) == (12, 96, 7)


def test_unknown_variant_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'XS'. Use one of B, L, XL, XXL, 2B, 3B"):
        VFMTokARConfig.from_variant("XS")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_image_tokens": 15}, "num_image_tokens must be a square"),
        ({"num_attention_heads": 5}, "divisible by num_attention_heads"),
        ({"hidden_size": 36, "num_attention_heads": 2}, "multiple of 4"),
        ({"id2label": {0: "cat", 1: "dog"}}, "name each class from 0 to 4 once"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
    ids=str,
)
def test_configurations_that_cannot_work_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        VFMTokARConfig(**{**TINY_SIZES, **fields})


def test_classes_without_names_are_not_two_dummy_labels(tmp_path):
    config = VFMTokARConfig(**TINY_SIZES)
    assert config.id2label is None
    assert config.num_labels == config.num_classes == 5
    config.save_pretrained(tmp_path)
    loaded = VFMTokARConfig.from_pretrained(tmp_path)
    assert (loaded.id2label, loaded.num_classes) == (None, 5)


def test_class_names_survive_saving(tmp_path):
    names = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    VFMTokARConfig(**TINY_SIZES, id2label=names).save_pretrained(tmp_path)
    assert VFMTokARConfig.from_pretrained(tmp_path).id2label == names


# ---------------------------------------------------------------------------------------------------------------
# The model


@torch.no_grad()
def test_a_token_changes_only_later_predictions():
    model = tiny_ar()
    labels, tokens = tiny_batch(model)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % model.config.codebook_size
    before, after = model(labels, tokens).logits, model(labels, changed).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(dim=-1).any()


def test_query_and_key_of_the_class_position_vanish():
    states = torch.randn(2, 2, 3, 16)
    rotated = apply_rotary(states, rotary_table(torch.arange(3), grid_size=3, head_dim=16, theta=10000.0))
    assert not rotated[:, :, 0].any()
    torch.testing.assert_close(rotated[:, :, 1:].norm(dim=-1), states[:, :, 1:].norm(dim=-1))


@torch.no_grad()
def test_attention_implementations_agree():
    model = tiny_ar()
    labels, tokens = tiny_batch(model)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(labels, tokens).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)


def test_training_drops_labels_and_evaluation_does_not():
    dropouts = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
    model = tiny_ar(class_dropout=1.0, **dropouts)
    labels, tokens = tiny_batch(model)
    null_logits = model(torch.full_like(labels, model.config.num_classes), tokens).logits
    assert not torch.allclose(model(labels, tokens).logits, null_logits)
    assert torch.equal(model.train()(labels, tokens).logits, null_logits)


@pytest.mark.parametrize("name", ["token_dropout", "residual_dropout", "ffn_dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_only(name):
    others = dict.fromkeys(("token_dropout", "residual_dropout", "ffn_dropout", "class_dropout"), 0.0)
    model = tiny_ar(**{**others, name: 0.5})
    labels, tokens = tiny_batch(model)
    evaluated = model(labels, tokens).logits
    assert torch.equal(model(labels, tokens).logits, evaluated)
    assert not torch.allclose(model.train()(labels, tokens).logits, evaluated)


def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient():
    model = tiny_ar(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0, class_dropout=0.0).train()
    batch, calls = tiny_batch(model), []
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    model(*batch, return_loss=True).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(*batch, return_loss=True).loss.backward()
    assert len(calls) == 1 + 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_fresh_model_predicts_every_token_alike():
    model = VFMTokARForImageGeneration(VFMTokARConfig(**TINY_SIZES)).eval()
    loss = model(*tiny_batch(model), return_loss=True).loss
    assert math.isclose(loss.item(), math.log(model.config.codebook_size), rel_tol=1e-6)
    assert math.isclose(model.embed_tokens.weight.std().item(), 0.02, rel_tol=0.2)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision_stays_close_and_returns_float32(dtype, mantissa_bits):
    model = tiny_ar()
    batch = tiny_batch(model)
    expected = model(*batch).logits
    logits = model.to(dtype)(*batch).logits
    assert logits.dtype == torch.float32
    # The last bit of the largest logit, times a few for the roundings of two layers.
    assert (logits - expected).abs().max() < 5 * 2**-mantissa_bits * expected.abs().max()
    assert model.generate(batch[0], guidance_scale=2.0).shape == batch[1].shape


@torch.no_grad()
def test_the_rotary_table_is_float32_whatever_the_model_was_cast_to():
    table = rotary_table(torch.arange(10), 3, 16, 10000.0)
    model = tiny_ar().to(torch.bfloat16)
    seen = []
    model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(*tiny_batch(model))
    assert torch.equal(seen[0], table[:, :9])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_models_compute_the_same(tmp_path, dtype):
    model = tiny_ar().to(dtype)
    batch = tiny_batch(model)
    model.save_pretrained(tmp_path)
    loaded = VFMTokARForImageGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.dtype == dtype
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)


def test_output_can_be_a_tuple():
    model = tiny_ar()
    labels, tokens = tiny_batch(model)
    (logits,) = model(labels, tokens, return_dict=False)
    loss, same_logits = model(labels, tokens, return_loss=True, return_dict=False)
    assert loss.ndim == 0
    assert torch.equal(logits, same_logits)


@pytest.mark.parametrize(
    ("make_tokens", "error", "message"),
    [
        (lambda tokens: tokens[:, :-1], ValueError, r"image_tokens must have shape \(3, 9\).*got \(3, 8\)"),
        (lambda tokens: tokens[:2], ValueError, r"got \(2, 9\)"),
        (lambda tokens: tokens.float(), TypeError, "image_tokens must be int64"),
        (lambda tokens: tokens + 32, ValueError, "image_tokens must lie in 0 to 31"),
    ],
    ids=["count", "batch", "dtype", "range"],
)
def test_unusable_image_tokens_are_refused(make_tokens, error, message):
    model = tiny_ar()
    labels, tokens = tiny_batch(model)
    with pytest.raises(error, match=message):
        model(labels, make_tokens(tokens))


def test_transformer_layers_are_what_device_maps_keep_whole():
    model = tiny_ar()
    assert {type(layer).__name__ for layer in model.layers} == set(model._no_split_modules)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
