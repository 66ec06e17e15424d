"""The randomized-order generator: the original's numbers from its converted checkpoint, and properties of a tiny one."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.modeling.generators import (
    TINY_SIZES,
    Recorder,
    assert_gradient_norms,
    draw_with,
    move_gradients_to_weights,
    record_forward_rows,
    record_step_logits,
    tiny_batch,
    tiny_rar,
)
from tests.testing import REFERENCE, reference_tensors
from vfmtok_hf.conversion import convert_rar, export_original_rar
from vfmtok_hf.cpu.packing import pack_weights
from vfmtok_hf.modeling import generation_vfmtok, modeling_vfmtok_rar
from vfmtok_hf.modeling.configuration_vfmtok_rar import VFMTokRARConfig
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration, draw_orders, keep_first


# The reference README's bounds, and why: cached and uncached passes of the original differ by up to 4.7e-5 at the
# strongest guidance.
LOGITS_BOUND = {"atol": 1e-4, "rtol": 0}
GUIDED_LOGITS_BOUND = {"atol": 5e-4, "rtol": 0}
LOSS_BOUND = {"atol": 5e-5, "rtol": 0}


@pytest.fixture(scope="module")
def reference():
    return reference_tensors("rar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rar") / "converted"
    convert_rar(REFERENCE / "rar" / "model.safetensors", folder)
    return folder


@pytest.fixture
def model(folder):
    return VFMTokRARForImageGeneration.from_pretrained(folder).eval()


def random_orders(batch_size: int, num_tokens: int = 9) -> torch.Tensor:
    return torch.stack([torch.randperm(num_tokens) for _ in range(batch_size)])


# ---------------------------------------------------------------------------------------------------------------
# The original's numbers


def test_reference_class_vocabulary(reference, model):
    config = model.config
    assert torch.equal(reference["labels"] + config.codebook_size + 1, reference["condition_ids"])
    assert (reference["none_condition_ids"] == config.codebook_size + 1 + config.num_classes).all()


@torch.no_grad()
def test_reference_raster_logits_and_loss(reference, model):
    tokens = reference["token_ids"]
    logits = model.lm_head(model.decode_sequence(reference["labels"], tokens))
    torch.testing.assert_close(logits, reference["train.raster.logits"], **LOGITS_BOUND)
    output = model(reference["labels"], tokens, return_loss=True)
    torch.testing.assert_close(output.logits, reference["train.raster.logits"][:, :-1], **LOGITS_BOUND)
    torch.testing.assert_close(output.loss, reference["train.raster.loss"][0], **LOSS_BOUND)
    assert torch.equal(tokens, reference["train.raster.labels"])
    correct = (output.logits.argmax(dim=-1) == tokens).float().mean()
    torch.testing.assert_close(correct, reference["train.raster.correct_tokens"][0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_reference_permuted_logits_and_loss(reference, model, attention):
    model.set_attn_implementation(attention)
    labels, tokens, orders = reference["labels"], reference["token_ids"], reference["orders"]
    sequence = tokens.take_along_dim(orders, dim=1)
    assert torch.equal(sequence, reference["train.permuted.labels"])
    logits = model.lm_head(model.decode_sequence(labels, sequence, orders))
    torch.testing.assert_close(logits, reference["train.permuted.logits"], **LOGITS_BOUND)
    # The recorded logits are in the order's sequence, those of `forward` in raster order.
    output = model(labels, tokens, orders=orders, return_loss=True)
    in_sequence = output.logits.take_along_dim(orders[..., None], dim=1)
    torch.testing.assert_close(in_sequence, reference["train.permuted.logits"][:, :-1], **LOGITS_BOUND)
    torch.testing.assert_close(output.loss, reference["train.permuted.loss"][0], **LOSS_BOUND)


@torch.no_grad()
def test_reference_permuted_logits_of_the_null_class(reference, model):
    null_class = torch.full_like(reference["labels"], model.config.num_classes)
    hidden_states = model.decode_sequence(null_class, reference["train.permuted.labels"], reference["orders"])
    expected = reference["train.permuted.logits_none_condition"]
    torch.testing.assert_close(model.lm_head(hidden_states), expected, **LOGITS_BOUND)


@torch.no_grad()
def test_reference_modulation_and_hidden_states(reference, model):
    outputs = {}
    for name, module in {"modulation": model.layers[0].modulation, "layer": model.layers[0]}.items():
        module.register_forward_hook(lambda module, args, output, name=name: outputs.__setitem__(name, output))
    final = model.decode_sequence(reference["labels"], reference["train.permuted.labels"], reference["orders"])
    bound = {"atol": 5e-5, "rtol": 0}
    torch.testing.assert_close(outputs["modulation"], reference["permuted.block0.adaln_modulation"], **bound)
    torch.testing.assert_close(outputs["layer"], reference["permuted.block0.output"], **bound)
    torch.testing.assert_close(final, reference["permuted.adaln_before_head.output"], **bound)


@torch.no_grad()
def test_reference_logits_in_float64(reference, model):
    model = model.double()
    hidden_states = model.decode_sequence(reference["labels"], reference["train.permuted.labels"], reference["orders"])
    torch.testing.assert_close(model.lm_head(hidden_states), reference["f64.permuted.logits"], atol=1e-10, rtol=0)


def test_reference_gradient_norms(reference, model):
    model(reference["labels"], reference["token_ids"], orders=reference["orders"], return_loss=True).loss.backward()
    move_gradients_to_weights(model)
    expected = json.loads((REFERENCE / "rar" / "train_grad_norms.json").read_text())
    assert_gradient_norms(export_original_rar(model), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("guidance0", {"guidance_scale": 0}),
        ("guidance4.0_pow1.0", {"guidance_scale": 4.0}),
        ("guidance4.0_pow2.75", {"guidance_scale": 4.0, "guidance_scale_pow": 2.75}),
        (
            "guidance16.0_pow2.75_temp1.02",
            {"guidance_scale": 16.0, "guidance_scale_pow": 2.75, "temperature": 1.02},
        ),
    ],
)
@pytest.mark.parametrize("prepare", [nn.Identity(), pack_weights], ids=["plain", "packed"])
def test_reference_greedy_tokens_and_step_logits(reference, model, name, settings, prepare):
    recorder = Recorder()
    tokens = prepare(model).generate(reference["labels"], do_sample=False, logits_processor=recorder, **settings)
    assert torch.equal(tokens, reference[f"gen.{name}.tokens"])
    # A processor sees the logits before the temperature, the original recorded them after it.
    step_logits = recorder.step_logits / settings.get("temperature", 1.0)
    torch.testing.assert_close(step_logits, reference[f"gen.{name}.step_logits"], **GUIDED_LOGITS_BOUND)


@pytest.mark.timeout(1500)  # inductor compiles for minutes on a busy machine
def test_reference_greedy_tokens_of_compiled_steps(reference, model, monkeypatch):
    """Of several rows with a logits processor, and of a single one with sums over products and the draw in the graph."""
    monkeypatch.setattr(generation_vfmtok, "COMPILED_LENGTHS", 2)
    labels, expected, recorder = reference["labels"], reference["gen.guidance0.tokens"], Recorder()
    torch._dynamo.reset()
    model.compile_decoding()
    assert torch.equal(model.generate(labels, do_sample=False, logits_processor=recorder), expected)
    torch.testing.assert_close(recorder.step_logits, reference["gen.guidance0.step_logits"], **LOGITS_BOUND)
    assert torch.equal(model.generate(labels[:1], do_sample=False), expected[:1])


def test_reference_logits_of_both_halves_before_guidance(reference, model):
    raw_logits = record_step_logits(model)
    model.generate(reference["labels"], do_sample=False, guidance_scale=4.0, guidance_scale_pow=2.75)
    expected = reference["gen.guidance4.0_pow2.75.raw_step_logits.first4"]
    torch.testing.assert_close(torch.stack(raw_logits[:4], dim=1), expected, **LOGITS_BOUND)


def test_reference_sampling_from_recorded_uniform_numbers(reference, model, monkeypatch):
    monkeypatch.setattr(generation_vfmtok, "uniform_numbers", draw_with(reference["gen.uniform_driven.u"]))
    recorder = Recorder()
    tokens = model.generate(
        reference["labels"], guidance_scale=4.0, guidance_scale_pow=1.0, temperature=0.9, logits_processor=recorder
    )
    assert torch.equal(tokens, reference["gen.uniform_driven.tokens"])
    expected = reference["gen.uniform_driven.step_logits"]
    torch.testing.assert_close(recorder.step_logits / 0.9, expected, **GUIDED_LOGITS_BOUND)


# ---------------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize("variant", ["L", "XL", "XXL"])
def test_variants_have_the_originals_parameter_counts(variant):
    counts = json.loads((REFERENCE / "manifests" / "parameter_counts.json").read_text())
    with torch.device("meta"):
        model = VFMTokRARForImageGeneration(VFMTokRARConfig.from_variant(variant))
    assert model.num_parameters() == counts[f"RAR-{variant}"]["total"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 5}, "divisible by num_attention_heads"),
        ({"num_timestep_embeddings": 10}, r"num_timestep_embeddings must be at least num_image_tokens \+ 2 = 11"),
        ({"id2label": {0: "cat", 1: "dog"}}, "name each class from 0 to 4 once"),
        ({"dropout": "0.1"}, "dropout"),
    ],
    ids=str,
)
def test_configurations_that_cannot_work_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        VFMTokRARConfig(**{**TINY_SIZES, **fields})


def test_unknown_variant_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'B'. Use one of L, XL, XXL"):
        VFMTokRARConfig.from_variant("B")


# ---------------------------------------------------------------------------------------------------------------
# Orders


@torch.no_grad()
def test_raster_order_is_the_default():
    model = tiny_rar()
    labels, tokens = tiny_batch(model)
    raster = torch.arange(9).expand(3, -1)
    assert torch.equal(model(labels, tokens).logits, model(labels, tokens, orders=raster).logits)
    sampled = model.generate(labels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.generate(labels, orders=raster, generator=torch.Generator().manual_seed(0)), sampled)
    assert torch.equal(model.generate(labels, orders=raster[0], generator=torch.Generator().manual_seed(0)), sampled)


@torch.no_grad()
def test_permuting_the_image_with_a_fixed_order_only_permutes_the_losses():
    # With the position tables permuted alike, the network cannot tell an image read in an order from the image that
    # order produces, read in raster order.
    model = tiny_rar()
    labels, tokens = tiny_batch(model)
    order = torch.randperm(9)
    orders = order.expand(3, -1)
    logits = model(labels, tokens, orders=orders).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    rows = torch.cat([torch.arange(2), order + 2])
    model.position_embeddings.copy_(model.position_embeddings[:, rows])
    model.target_position_embeddings.copy_(model.target_position_embeddings[:, rows])
    permuted = tokens[:, order]
    logits = model(labels, permuted).logits
    permuted_losses = F.cross_entropy(logits.flatten(0, 1), permuted.flatten(), reduction="none").view_as(tokens)
    torch.testing.assert_close(permuted_losses, losses[:, order])


@torch.no_grad()
def test_a_token_changes_only_predictions_later_in_the_order():
    model = tiny_rar()
    labels, tokens = tiny_batch(model, 1)
    orders = random_orders(1)
    changed = tokens.clone()
    changed[0, orders[0, 4]] = (changed[0, orders[0, 4]] + 1) % model.config.codebook_size
    before, after = (model(labels, image, orders=orders).logits[0, orders[0]] for image in (tokens, changed))
    assert torch.equal(before[:5], after[:5])
    assert not torch.isclose(before[5:], after[5:]).all(dim=-1).any()


@torch.no_grad()
def test_cached_decoding_in_any_order_equals_the_full_forward():
    model, recorder = tiny_rar(), Recorder()
    labels, _ = tiny_batch(model)
    orders = random_orders(3)
    tokens = model.generate(labels, orders=orders, logits_processor=recorder, generator=torch.Generator())
    expected = model(labels, tokens, orders=orders).logits.take_along_dim(orders[..., None], dim=1)
    torch.testing.assert_close(recorder.step_logits, expected, atol=1e-4, rtol=0)


def test_the_callback_sees_tokens_at_their_raster_positions():
    model = tiny_rar(codebook_size=32)
    labels, _ = tiny_batch(model)
    orders, seen = random_orders(3), []
    tokens = model.generate(labels, orders=orders, callback=lambda step, drawn: seen.append(drawn.clone()))
    for step, drawn in enumerate(seen):
        so_far = orders[:, : step + 1]
        expected = torch.zeros_like(tokens).scatter(1, so_far, tokens.take_along_dim(so_far, dim=1))
        assert torch.equal(drawn, expected)


def test_drawn_orders_are_permutations_with_the_asked_share_random():
    orders = draw_orders(2000, 9, 0.3, torch.device("cpu"))
    raster = torch.arange(9)
    assert torch.equal(orders.sort(dim=1).values, raster.expand(2000, -1))
    share = (orders != raster).any(dim=1).float().mean()
    # Five standard deviations of a share of 0.3 in 2000 draws.
    assert abs(share - 0.3) < 0.051
    assert torch.equal(draw_orders(50, 9, 0.0, torch.device("cpu")), raster.expand(50, -1))


def test_random_ratio_draws_orders_for_the_loss():
    model = tiny_rar()
    labels, tokens = tiny_batch(model)
    raster = model(labels, tokens, return_loss=True).loss
    assert torch.equal(model(labels, tokens, return_loss=True, random_ratio=0.0).loss, raster)
    torch.manual_seed(1)
    random = model(labels, tokens, return_loss=True, random_ratio=1.0)
    torch.manual_seed(1)
    orders = draw_orders(3, 9, 1.0, torch.device("cpu"))
    assert torch.equal(random.loss, model(labels, tokens, return_loss=True, orders=orders).loss)
    assert not torch.allclose(random.loss, raster)


@pytest.mark.parametrize(
    ("orders", "error", "message"),
    [
        (torch.arange(8).expand(3, -1), ValueError, r"orders must have shape \(3, 9\), got \(3, 8\)"),
        (torch.zeros(3, 9, dtype=torch.int64), ValueError, "contain every position from 0 to 8 once"),
        (torch.arange(1, 10).expand(3, -1), ValueError, "orders must lie in 0 to 8, got 9"),
        (torch.arange(9.0).expand(3, -1), TypeError, "orders must be int64"),
        (torch.arange(9).expand(2, -1), ValueError, r"orders must have shape \(3, 9\), got \(2, 9\)"),
        (torch.arange(9).expand(1, 3, -1), ValueError, r"orders must have shape \(3, 9\), got \(1, 3, 9\)"),
        ([list(range(9))] * 3, TypeError, "orders must be a tensor, got list"),
    ],
    ids=["length", "repeated", "range", "dtype", "rows", "dimensions", "list"],
)
def test_orders_that_are_no_permutations_are_refused(orders, error, message):
    model = tiny_rar()
    labels, tokens = tiny_batch(model)
    with pytest.raises(error, match=message):
        model(labels, tokens, orders=orders)
    with pytest.raises(error, match=message):
        model.generate(labels, orders=orders)


# ---------------------------------------------------------------------------------------------------------------
# Modulations of steps to come


@pytest.mark.parametrize(
    ("max_rows", "interval", "blocks"),
    [
        (128, None, [(8, 6)]),
        (24, None, [(4, 6), (4, 6)]),
        (18, None, [(3, 6)] * 3),
        (5, None, [(1, 6)] * 8),
        (12, 0, [(2, 6)] * 4),  # shapes stay those of both halves
    ],
)
def test_modulation_weights_are_read_once_per_block_of_steps(monkeypatch, max_rows, interval, blocks):
    monkeypatch.setattr(modeling_vfmtok_rar, "ROWS_OF_MODULATIONS", max_rows)
    model, sizes = tiny_rar(), {}
    for name, module in model.named_modules():
        if name.endswith("modulation"):
            sizes[name] = []
            module.register_forward_hook(lambda module, args, output, name=name: sizes[name].append(output.shape[:2]))
    model.generate(tiny_batch(model)[0], guidance_scale=2.0, guidance_interval=interval)
    # The first pass has start token and class, 8 steps follow.
    assert sizes == dict.fromkeys(("layers.0.modulation", "layers.1.modulation", "norm_modulation"), [(6, 2), *blocks])


@pytest.mark.parametrize("max_rows", [1, 12, 18, 128])
@pytest.mark.parametrize("interval", [None, 0, 3])
@torch.no_grad()
def test_guided_steps_of_any_block_equal_uncached_forwards_of_both_halves(monkeypatch, max_rows, interval):
    monkeypatch.setattr(modeling_vfmtok_rar, "ROWS_OF_MODULATIONS", max_rows)
    model, recorder, orders = tiny_rar(), Recorder(), random_orders(3)
    labels, _ = tiny_batch(model)
    settings = {"guidance_scale": 3.0, "guidance_interval": interval, "do_sample": False}
    tokens = model.generate(labels, orders=orders, logits_processor=recorder, **settings)
    null_class = torch.full_like(labels, model.config.num_classes)
    conditional, unconditional = (model(classes, tokens, orders=orders).logits for classes in (labels, null_class))
    scales = torch.tensor(generation_vfmtok.power_cosine_guidance(9, 3.0, 1.0, interval))
    expected = unconditional.lerp(conditional, scales[orders.argsort(dim=1)][..., None])
    in_sequence = expected.take_along_dim(orders[..., None], dim=1)
    torch.testing.assert_close(recorder.step_logits, in_sequence, atol=1e-4, rtol=0)
    assert torch.equal(tokens, expected.argmax(dim=-1))


def test_blocks_share_their_graphs(monkeypatch):
    model, counts = tiny_rar(), []
    labels, _ = tiny_batch(model)
    for max_rows in (128, 12):
        monkeypatch.setattr(modeling_vfmtok_rar, "ROWS_OF_MODULATIONS", max_rows)
        counter = CompileCounter()
        torch._dynamo.reset()
        model.compile_decoding(backend=counter)
        model.generate(labels, guidance_scale=3.0, guidance_interval=0)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] <= 8


# ---------------------------------------------------------------------------------------------------------------
# Editing


KEEP = torch.tensor([True, False, True, True, False, True, False, False, True])


def test_editing_keeps_the_marked_tokens_and_draws_the_rest():
    model = tiny_rar()
    labels, tokens = tiny_batch(model)
    rows = record_forward_rows(model)
    edited = model.generate(labels, image_tokens=tokens, keep_mask=KEEP)
    assert torch.equal(edited[:, KEEP], tokens[:, KEEP])
    assert not torch.equal(edited[:, ~KEEP], tokens[:, ~KEEP])
    assert len(rows) == 4


@torch.no_grad()
def test_edited_tokens_see_all_kept_ones():
    model, recorder = tiny_rar(), Recorder()
    labels, tokens = tiny_batch(model)
    edited = model.generate(labels, image_tokens=tokens, keep_mask=KEEP, logits_processor=recorder, guidance_scale=2.0)
    order = torch.tensor([0, 2, 3, 5, 8, 1, 4, 6, 7]).expand(3, -1)
    assert torch.equal(recorder.tokens[0], tokens[:, KEEP])
    conditional = model(labels, edited, orders=order).logits
    unconditional = model(torch.full_like(labels, 5), edited, orders=order).logits
    scales = generation_vfmtok.power_cosine_guidance(9, 2.0, 1.0)
    for step, logits in zip(range(5, 9), recorder.logits, strict=True):
        position = order[0, step]
        expected = unconditional[:, position].lerp(conditional[:, position], scales[step])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_kept_positions_move_to_the_front_of_any_order():
    orders = torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 7, 6, 8]])
    expected = torch.tensor([[8, 5, 3, 2, 0, 7, 6, 4, 1], [0, 3, 2, 5, 8, 1, 4, 7, 6]])
    assert torch.equal(keep_first(orders, KEEP), expected)


def test_keeping_everything_or_nothing_is_allowed():
    model = tiny_rar()
    labels, tokens = tiny_batch(model)
    assert torch.equal(model.generate(labels, image_tokens=tokens, keep_mask=torch.ones(9, dtype=torch.bool)), tokens)
    from_nothing = model.generate(
        labels,
        image_tokens=tokens,
        keep_mask=torch.zeros(9, dtype=torch.bool),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(from_nothing, model.generate(labels, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_mask": KEEP}, ValueError, "together"),
        ({"image_tokens": torch.zeros(3, 9, dtype=torch.int64)}, ValueError, "together"),
        (
            {"image_tokens": torch.zeros(3, 9, dtype=torch.int64), "keep_mask": KEEP[:8]},
            ValueError,
            r"keep_mask must be bool of shape \(9,\)",
        ),
        (
            {"image_tokens": torch.zeros(3, 9, dtype=torch.int64), "keep_mask": KEEP.tolist()},
            TypeError,
            "keep_mask must be a tensor, got list",
        ),
        ({"image_tokens": torch.full((3, 9), 32), "keep_mask": KEEP}, ValueError, "image_tokens must lie in 0 to 31"),
        ({"guidance_scale_pow": -1.0}, ValueError, "guidance_scale_pow must be"),
    ],
    ids=["no tokens", "no mask", "mask shape", "mask list", "token range", "power"],
)
def test_unusable_edits_are_refused_before_any_work(arguments, error, message):
    model = tiny_rar()
    labels, _ = tiny_batch(model)
    rows = record_forward_rows(model)
    with pytest.raises(error, match=message):
        model.generate(labels, **arguments)
    assert rows == []


# ---------------------------------------------------------------------------------------------------------------
# The model


def test_training_drops_labels_and_evaluation_does_not():
    model = tiny_rar(class_dropout=1.0, dropout=0.0, attention_dropout=0.0)
    labels, tokens = tiny_batch(model)
    null_logits = model(torch.full_like(labels, model.config.num_classes), tokens).logits
    assert not torch.allclose(model(labels, tokens).logits, null_logits)
    assert torch.equal(model.train()(labels, tokens).logits, null_logits)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_only(name):
    model = tiny_rar(**{"dropout": 0.0, "attention_dropout": 0.0, "class_dropout": 0.0, name: 0.5})
    labels, tokens = tiny_batch(model)
    evaluated = model(labels, tokens).logits
    assert torch.equal(model(labels, tokens).logits, evaluated)
    assert not torch.allclose(model.train()(labels, tokens).logits, evaluated)


def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient():
    model = tiny_rar(dropout=0.0, attention_dropout=0.0, class_dropout=0.0).train()
    batch, calls = tiny_batch(model), []
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    orders = random_orders(3)
    model(*batch, orders=orders, return_loss=True).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(*batch, orders=orders, return_loss=True).loss.backward()
    assert len(calls) == 1 + 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@torch.no_grad()
def test_the_layers_of_a_fresh_model_are_identities():
    model = VFMTokRARForImageGeneration(VFMTokRARConfig(**TINY_SIZES)).eval()
    hidden_states, condition = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    assert torch.equal(model.layers[0](hidden_states, condition), hidden_states)
    for name, parameter in model.named_parameters():
        is_zero = "modulation" in name or name.endswith("bias")
        is_one = "norm" in name and name.endswith("weight") and not is_zero
        expected = 0.0 if is_zero or is_one else 0.02
        assert abs(parameter.std(correction=0).item() - expected) < 0.01, name
        assert not is_one or (parameter == 1).all()


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision_stays_close_and_returns_float32(dtype, mantissa_bits):
    model = tiny_rar()
    batch = tiny_batch(model)
    expected = model(*batch).logits
    logits = model.to(dtype)(*batch).logits
    assert logits.dtype == torch.float32
    # The last bit of the largest logit, times a few for the roundings of two layers.
    assert (logits - expected).abs().max() < 5 * 2**-mantissa_bits * expected.abs().max()
    assert model.generate(batch[0], guidance_scale=2.0).shape == batch[1].shape


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_models_compute_the_same(tmp_path, dtype):
    model = tiny_rar().to(dtype)
    batch = tiny_batch(model)
    model.save_pretrained(tmp_path)
    loaded = VFMTokRARForImageGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.dtype == dtype
    assert torch.equal(loaded(*batch).logits, model(*batch).logits)


def test_layers_and_modulations_are_what_device_maps_and_fsdp_keep_whole():
    model = tiny_rar()
    whole = {type(module).__name__ for module in (*model.layers, model.norm_modulation)}
    assert whole == set(model._no_split_modules)
