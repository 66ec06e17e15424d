"""Arguments of the scripts: defaults, YAML files, command lines, and what a continued run may change."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from vfmtok_hf import VFMTokConfig
from vfmtok_hf.training import (
    checkpoints,
    distributed,
    generator_data,
    generator_training,
    image_data,
    logs,
    run_data,
    schedule,
    token_extraction,
    tokenizer_training,
)
from vfmtok_hf.training.arguments import (
    ExtractionArguments,
    GeneratorArguments,
    TokenizerArguments,
    TrainingArguments,
    check_resumed_arguments,
    parse_arguments,
    save_arguments,
)


REQUIRED = ["--train_data", "a", "--output", "c"]
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ([*REQUIRED, "--learning_rte", "1"], ValueError, "Unknown .* --learning_rte. Did you mean --learning_rate or"),
        ([*REQUIRED, "--learning-rte=1"], ValueError, "Did you mean --learning_rate or"),
        ([*REQUIRED, "--max_steps", "many"], ValueError, "--max_steps.*: invalid int value: 'many'"),
        ([*REQUIRED, "--trainable", "encoder"], ValueError, "--trainable: invalid choice"),
        ([*REQUIRED, "--resume", "perhaps"], ValueError, "--resume: expected true or false, got 'perhaps'"),
        ([*REQUIRED, "--output"], ValueError, "--output: expected one argument"),
        ([*REQUIRED, "--model", "{hidden_size"], ValueError, "--model: .* is not valid YAML"),
        ([*REQUIRED, "--model.hidden_size=["], ValueError, "Argument --model.hidden_size: '\\[' is not valid YAML"),
        ([*REQUIRED, "--model", "8"], ValueError, "--model: '8' is not a dictionary"),
        ([*REQUIRED, "--model.hidden_size"], ValueError, "--model.hidden_size needs a value"),
        ([*REQUIRED, "--learning_rate.x", "1"], ValueError, "Unknown argument --learning_rate.x"),
        ([*REQUIRED, "--batch", "1"], ValueError, "Unknown argument --batch. Did you mean --batch_size"),
        ([*REQUIRED, "--streaming", "--cache_images"], ValueError, "--cache_images true needs --streaming false"),
        ([*REQUIRED, "more"], ValueError, "Expected --key value or --key=value, got 'more'"),
        (["--output", "c"], ValueError, "Missing --train_data. --help"),
        (["--train_dta", "a"], ValueError, "Unknown argument --train_dta. Did you mean --train_data"),
        (["--config"], ValueError, "--config: expected one argument"),
        (["--config", "no_such.yaml"], FileNotFoundError, "no_such.yaml does not exist"),
    ],
)
def test_bad_arguments(argv, error, message):
    with pytest.raises(error, match=message):
        parse_arguments(TokenizerArguments, argv)


def config_file(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "Did you mean --learning_rate or"),
        ("max_steps: [1, 2]", "--max_steps.*: invalid int value: '\\[1, 2\\]'"),
        ("batch_size: 1.5", "--batch_size.*: invalid int value: '1.5'"),
        ("- output", "must contain `key: value` lines"),
        ("output: [", "is not valid YAML"),
        ("variants: 4", "names of an earlier version: variants is now num_crops"),
        ("neighbours: 2", "names of an earlier version: neighbours is now codebook_top_k"),
        ("feature_weight: 1", "feature_weight is now model.feature_loss_weight"),
    ],
)
def test_bad_config_files(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_arguments(GeneratorArguments, [*REQUIRED, "--config", config_file(tmp_path, text)])


def test_command_line_overrides_the_file(tmp_path):
    file = config_file(
        tmp_path,
        """
        train_data: a
        output: c
        learning_rate: 1e-3
        model: {hidden_size: 8, decoder_dropout: 0.1}
        crop_scale: [0.9, 1.15]
        horizontal_flip: false
        validation_data: null
        tracker: []
        mixed_precision: no
        """,
    )
    overrides = ["--model.num_anchors", "9", "--model.decoder-dropout=0.2", "--learning-rate", "0.5", "--resume"]
    arguments = parse_arguments(TokenizerArguments, [*overrides[:3], "--config", file, *overrides[3:]])
    assert arguments.model == {"hidden_size": 8, "decoder_dropout": 0.1, "num_anchors": 9, "decoder-dropout": 0.2}
    assert (arguments.learning_rate, arguments.crop_scale, arguments.horizontal_flip) == (0.5, [0.9, 1.15], False)
    assert (arguments.resume, arguments.mixed_precision, arguments.validation_data) == (True, "no", None)


def test_saved_arguments_repeat_the_run(tmp_path):
    argv = [*REQUIRED, "--model.hidden_size=8", "--tracker", "wandb", "trackio", "--no_horizontal_flip", "--seed=3"]
    arguments = parse_arguments(GeneratorArguments, argv)
    save_arguments(arguments, tmp_path / "arguments.yaml")
    assert parse_arguments(GeneratorArguments, ["--config", str(tmp_path / "arguments.yaml")]) == arguments


def test_help_lists_every_argument_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as done:
        parse_arguments(GeneratorArguments, ["--help"], "vfmtok train generator")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "usage: vfmtok train generator [--config FILE]" in text
    for field in dataclasses.fields(GeneratorArguments):
        assert f"--{field.name}" in text
        assert field.metadata["help"].split()[0] in text


def test_what_a_continued_run_may_change_stands_at_the_field(tmp_path):
    file = tmp_path / "arguments.yaml"
    before = GeneratorArguments(train_data="a", output="b")
    save_arguments(before, file)
    free = dataclasses.replace(before, max_steps=7, train_data="moved", tracker=["wandb"], rar_random_until=0.1)
    check_resumed_arguments(free, file)
    changed = dataclasses.replace(free, num_crops=2, batch_size=3)
    with pytest.raises(ValueError, match="differ from .*: --batch_size 64 -> 3, --num_crops 4 -> 2. Change them back"):
        check_resumed_arguments(changed, file)


def test_a_choice_of_precision_is_checked_once_it_is_made(tmp_path):
    file = tmp_path / "arguments.yaml"
    before = TokenizerArguments(train_data="a", output="b", mixed_precision="bf16")
    save_arguments(before, file)
    check_resumed_arguments(dataclasses.replace(before, mixed_precision="auto"), file)
    with pytest.raises(ValueError, match="--mixed_precision 'bf16' -> 'no'"):
        check_resumed_arguments(dataclasses.replace(before, mixed_precision="no"), file)


def test_runs_of_earlier_versions_are_continued(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text("train_data: a\noutput: b\nvariants: 4\nneighbours: 2\n")
    arguments = GeneratorArguments(train_data="a", output="b", codebook_top_k=2)
    check_resumed_arguments(arguments, file)
    with pytest.raises(ValueError, match="--num_crops 4 -> 8"):
        check_resumed_arguments(dataclasses.replace(arguments, num_crops=8), file)


def test_runs_whose_loss_weights_were_arguments_are_refused(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text("train_data: a\noutput: b\nfeature_weight: 1.0\n")
    with pytest.raises(ValueError, match="another script or version, with arguments feature_weight: start a new run"):
        check_resumed_arguments(TokenizerArguments(train_data="a", output="b"), file)


@pytest.mark.parametrize(
    ("script", "own_modules", "arguments_class"),
    [
        (tokenizer_training, [image_data], TokenizerArguments),
        (generator_training, [generator_data, image_data], GeneratorArguments),
        (token_extraction, [], ExtractionArguments),
    ],
)
def test_every_argument_is_read(script, own_modules, arguments_class):
    shared = (
        [checkpoints, distributed, logs, run_data, schedule] if issubclass(arguments_class, TrainingArguments) else []
    )
    read = {
        node.attr
        for module in (script, *own_modules, *shared)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "arguments"
    }
    assert {field.name for field in dataclasses.fields(arguments_class)} - read == set()


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("[!a]*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_the_recipes_parse(file):
    arguments_class = GeneratorArguments if file.stem.startswith("generator") else TokenizerArguments
    assert parse_arguments(arguments_class, ["--config", str(file)]).max_steps > 0


def test_the_imagenet_recipe_is_the_originals_objective():
    file = CONFIGS / "imagenet" / "tokenizer.yaml"
    arguments = parse_arguments(TokenizerArguments, ["--config", str(file)])
    assert (arguments.mse_weight, arguments.lpips_weight, arguments.lpips_dropout) == (2.0, 1.0, 0.5)
    config = VFMTokConfig(**arguments.model)
    assert (config.feature_loss_weight, config.codebook_loss_weight, config.commitment_loss_weight) == (1, 1, 0.25)
    assert config.entropy_loss_weight == 0
    assert (arguments.adversarial_weight, arguments.adversarial_start_step) == (0.5, 20_000)
    assert arguments.discriminator == "dino"
    assert (arguments.l1_weight, arguments.perceptual_weight, arguments.adaptive_adversarial_weight) == (0, 0, False)
