import ast
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.testing import tiny_images, tiny_model
from vfmtok_hf import VFMTokARConfig, VFMTokRARConfig
from vfmtok_hf.cpu import training as cpu_training
from vfmtok_hf.cpu.training import FrozenProduct, WinogradConvolution
from vfmtok_hf.training import (
    extract_tokens,
    generator_data,
    image_data,
    run,
    tracking,
    train_generator,
    train_tokenizer,
)
from vfmtok_hf.training.arguments import parse_arguments
from vfmtok_hf.training.codebook import CodebookUsage, perplexity, restart_dead_rows, spherical_kmeans
from vfmtok_hf.training.data import EpochSampler
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.run import choose_attention, learning_rate_at
from vfmtok_hf.training.train_tokenizer import TokenizerArguments


CONFIGS = Path(__file__).parents[2] / "configs"


# -- attention


@pytest.mark.parametrize(
    ("device", "mixed_precision", "dropout", "expected"),
    [
        ("cpu", "no", 0.0, "sdpa"),
        ("cpu", "no", 0.1, "eager"),
        ("cpu", "bf16", 0.0, "eager"),
        ("cuda", "bf16", 0.1, "sdpa"),
    ],
)
def test_attention_that_is_fastest_where_it_runs(device, mixed_precision, dropout, expected):
    setting = torch.device(device), mixed_precision, dropout
    assert choose_attention("auto", *setting) == expected
    assert {choose_attention(named, *setting) for named in ("sdpa", "eager")} == {"sdpa", "eager"}


def set_up(model, trainable="all", **settings):
    arguments = TokenizerArguments(train_data="", output="", perceptual_weight=0, trainable=trainable, **settings)
    objective = train_tokenizer.build_objective(model, arguments)
    train_tokenizer.set_up_layers(objective, arguments, torch.device("cpu"))
    layers = [vars(module).get("forward") for module in model.vision_model.modules()]
    return {layer.dtype for layer in layers if isinstance(layer, FrozenProduct)}


@pytest.mark.parametrize(("precision", "vision"), [("no", "sdpa"), ("bf16", "eager")])
def test_layers_of_a_tokenizer(precision, vision):
    """Nothing is dropped in the frozen vision model, and its features are those that autocast alone gives."""
    model, images = tiny_model(decoder_dropout=0.1), tiny_images()
    model.set_attn_implementation({"": "sdpa", "vision_config": vision})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def features(enabled: bool) -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return model.extract_vision_features(images)

    expected = {enabled: features(enabled) for enabled in (False, True)}
    assert set_up(model, mixed_precision=precision) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert model.config._attn_implementation == "eager"
    assert model.vision_model.config._attn_implementation == vision
    for enabled in (False, True):
        torch.testing.assert_close(features(enabled), expected[enabled])
    assert model.state_dict().keys() == weights.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_encoder_is_set_up_for_the_precision_it_computes_in():
    model = tiny_model()
    assert set_up(model, trainable="decoder", mixed_precision="bf16") == {torch.float32}
    assert model.vision_model.config._attn_implementation == "sdpa"


def test_a_compiled_tokenizer_keeps_its_layers():
    assert set_up(tiny_model(), compile=True) == set()


@pytest.mark.skipif(
    not torch.backends.nnpack.is_available(), reason="torch has no NNPACK here: x86 with AVX2 runs this"
)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, True), ({"mixed_precision": "bf16"}, False), ({"channels_last": True}, False), ({"compile": True}, False)],
)
def test_convolutions_of_a_tokenizer(settings, expected, monkeypatch):
    monkeypatch.setattr(cpu_training, "MIN_CHANNELS", 1)
    model = tiny_model()
    set_up(model, **settings)
    assert isinstance(vars(model.pixel_decoder.conv_in).get("forward"), WinogradConvolution) is expected


# -- codebook


def test_kmeans_finds_separate_clusters():
    centres = F.normalize(torch.eye(4) + 0.1, dim=-1)
    vectors = F.normalize(centres.repeat_interleave(50, 0) + 0.02 * torch.randn(200, 4), dim=-1)
    found = spherical_kmeans(vectors, 4, torch.Generator().manual_seed(3))
    similarity = found @ centres.T
    assert sorted(similarity.argmax(1).tolist()) == [0, 1, 2, 3]
    assert similarity.amax(1).min() > 0.999
    with pytest.raises(ValueError, match="at least 201"):
        spherical_kmeans(vectors, 201, torch.Generator())


def test_restart_replaces_exactly_the_idle_rows():
    codebook, usage = torch.zeros(5, 3), CodebookUsage(5, history_length=10)
    for _ in range(4):
        usage.update(torch.tensor([0, 3]))
    latents = torch.randn(2, 6, 3)
    assert restart_dead_rows(codebook, usage, latents, patience=4, seed=0) == 3
    assert torch.equal(codebook[[0, 3]], torch.zeros(2, 3))
    directions = F.normalize(latents.flatten(0, 1), dim=-1)
    for row in codebook[[1, 2, 4]]:
        assert (directions == row).all(-1).any()
    assert usage.idle_steps.tolist() == [0, 0, 0, 0, 0]


def test_perplexity_of_an_even_use_is_its_size():
    assert perplexity(torch.tensor([3] * 8 + [0] * 24)) == pytest.approx(8)
    assert perplexity(torch.tensor([9] + [0] * 31)) == pytest.approx(1)


# -- average of weights


def test_ema_converges_to_constant_weights_and_tracks_buffers():
    model = nn.BatchNorm1d(2)
    model.bias.requires_grad_(False)
    ema = EMA(model, decay=0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(5)
        model.running_mean.fill_(3)
        model.num_batches_tracked.fill_(7)
    ema.update()
    decay = 2 / 11  # (1 + updates) / (10 + updates) while that is below the given one
    torch.testing.assert_close(ema.averages["weight"], decay * start + (1 - decay) * 5)
    assert "bias" not in ema.averages
    assert ema.averages["num_batches_tracked"] == 7
    for _ in range(300):
        ema.update()
    torch.testing.assert_close(ema.averages["running_mean"], torch.full((2,), 3.0))


def test_ema_is_applied_only_inside_the_block():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.5)
    own = model.weight.detach().clone()
    ema.averages["weight"].fill_(1)
    with ema.applied():
        assert (model.weight == 1).all()
    assert torch.equal(model.weight, own)
    restored = EMA(nn.Linear(2, 2), decay=0.5)
    restored.load_state_dict(ema.state_dict())
    assert torch.equal(restored.averages["weight"], ema.averages["weight"])


# -- schedule, order, checks


def test_learning_rate():
    rates = [learning_rate_at(step, 1.0, 10, 110, "cosine", 0.1) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[60] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[110] == pytest.approx(0.1)
    assert learning_rate_at(500, 1.0, 10, 110, "constant", 0.1) == 1.0
    assert [learning_rate_at(step, 1.0, 10, 110, "linear", 0.1) for step in (10, 35, 110)] == pytest.approx(
        [1, 0.775, 0.1]
    )


def test_epochs_differ_and_are_repeatable():
    sampler = EpochSampler([0] * 20)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(sampler) == first


def test_balancing_makes_classes_equally_likely():
    sampler = EpochSampler([0] * 900 + [1] * 100, balance_power=1.0)
    drawn = [index >= 900 for epoch in range(20) if sampler.set_epoch(epoch) is None for index in sampler]
    # 20,000 draws at p = 1/2 scatter by 0.0035; four times that.
    assert sum(drawn) / len(drawn) == pytest.approx(0.5, abs=0.014)


# -- arguments

REQUIRED = ["--train_data", "a", "--validation_data", "b", "--output", "c"]


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ([*REQUIRED, "--learning_rte", "1"], ValueError, "Did you mean one of .*'learning_rate'"),
        ([*REQUIRED, "--max_steps", "many"], ValueError, "--max_steps must be int"),
        ([*REQUIRED, "--trainable", "encoder"], ValueError, "--trainable must be one of"),
        (["--output", "c"], ValueError, "Missing arguments: --train_data"),
        (["--config", "no_such.yaml"], FileNotFoundError, "no_such.yaml does not exist"),
        (["--resume"], ValueError, "`--key value` pairs"),
    ],
)
def test_bad_arguments(argv, error, message):
    with pytest.raises(error, match=message):
        parse_arguments(train_tokenizer.TokenizerArguments, argv)


def test_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train_data: a\nvalidation_data: b\noutput: c\nlearning_rate: 1e-3\nmodel:\n  hidden_size: 8\n")
    arguments = parse_arguments(
        train_tokenizer.TokenizerArguments,
        ["--config", str(file), "--model.num_anchors", "9", "--learning-rate", "0.5"],
    )
    assert arguments.model == {"hidden_size": 8, "num_anchors": 9}
    assert arguments.learning_rate == 0.5


@pytest.mark.parametrize(
    ("modules", "arguments_class"),
    [
        ([train_tokenizer, image_data, run, tracking], train_tokenizer.TokenizerArguments),
        ([train_generator, generator_data, image_data, run, tracking], train_generator.GeneratorArguments),
        ([extract_tokens], extract_tokens.ExtractionArguments),
    ],
)
def test_every_argument_is_read(modules, arguments_class):
    read = {
        node.attr
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "arguments"
    }
    assert set(arguments_class.__dataclass_fields__) - read == set()


@pytest.mark.parametrize(
    ("config", "module", "arguments_class"),
    [
        ("tokenizer", train_tokenizer, "TokenizerArguments"),
        ("decoder", train_tokenizer, "TokenizerArguments"),
        ("generator", train_generator, "GeneratorArguments"),
        ("generator_continued", train_generator, "GeneratorArguments"),
        ("generator_balanced", train_generator, "GeneratorArguments"),
        ("generator_variants", train_generator, "GeneratorArguments"),
        ("generator_rar", train_generator, "GeneratorArguments"),
    ],
)
def test_the_emoji_recipe_parses(config, module, arguments_class):
    file = str(CONFIGS / "emoji" / f"{config}.yaml")
    assert parse_arguments(getattr(module, arguments_class), ["--config", file]).max_steps > 0


def test_the_imagenet_recipe_is_the_originals_objective():
    file = CONFIGS / "imagenet" / "tokenizer.yaml"
    arguments = parse_arguments(train_tokenizer.TokenizerArguments, ["--config", str(file)])
    assert (arguments.mse_weight, arguments.lpips_weight, arguments.feature_weight) == (2.0, 1.0, 1.0)
    assert (arguments.adversarial_weight, arguments.adversarial_start_step) == (0.5, 20_000)
    assert arguments.discriminator == "dino"
    assert (arguments.l1_weight, arguments.perceptual_weight, arguments.adaptive_adversarial_weight) == (0, 0, False)


IMAGENET_IMAGES = 1_281_167


@pytest.mark.parametrize(
    ("name", "config_class", "num_processes", "epochs", "rates", "random_ratios"),
    [
        ("ar", VFMTokARConfig, 8, 300, [(0, 1e-4), (700_000, 1e-4)], []),
        (
            *("rar", VFMTokRARConfig, 32, 400, [(62_499, 4e-4), (156_250, 2.05e-4), (250_000, 1e-5)]),
            [(0, 1), (125_000, 1), (156_250, 0.5), (187_500, 0)],
        ),
    ],
)
def test_the_imagenet_recipes_of_generators_are_the_originals(
    name, config_class, num_processes, epochs, rates, random_ratios
):
    """Model, images seen, and the schedules at the steps that the original's code names."""
    file = CONFIGS / "imagenet" / f"generator_{name}.yaml"
    arguments = parse_arguments(train_generator.GeneratorArguments, ["--config", str(file)])
    assert config_class(**arguments.model).to_diff_dict() == config_class.from_variant("L").to_diff_dict()
    images_per_step = num_processes * arguments.batch_size * arguments.gradient_accumulation_steps
    assert arguments.max_steps * images_per_step / IMAGENET_IMAGES == pytest.approx(epochs, rel=1e-3)
    schedule = (arguments.warmup_steps, arguments.max_steps, arguments.schedule, arguments.final_learning_rate)
    for step, rate in rates:
        assert learning_rate_at(step, arguments.learning_rate, *schedule) == pytest.approx(rate)
    for step, ratio in random_ratios:
        assert train_generator.random_ratio_at(step, arguments) == ratio
