"""Whole runs of the training scripts on a few generated images."""

import itertools
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from tests.testing import tiny_config, tiny_model
from tests.training.test_discriminator import tiny_vit
from tests.training.tiny_runs import DROPOUTS, copy_until
from vfmtok_hf import VFMTokARForImageGeneration, VFMTokModel, VFMTokPipeline, VFMTokRARForImageGeneration
from vfmtok_hf.training import train_generator, train_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of eight images: a colored disc, or bar, at a random place."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :32]
    for name in ("bar", "disc"):
        (root / name).mkdir()
        for index in range(8):
            center = rng.integers(8, 24, 2)
            shape = (
                (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < 49
                if name == "disc"
                else abs(rows - center[0]) < 4
            )
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[shape] = rng.integers(0, 200, 3)
            Image.fromarray(pixels).save(root / name / f"{name}_{index}.png")
    return root


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(1)
    tiny_model().vision_model.save_pretrained(folder)
    return folder


def run(main, options):
    """One run of a script, as in a process of its own: Accelerate keeps its state per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main([item for name, value in options.items() for item in (f"--{name}", str(value))])


def train_tokenizer_for(steps, data, output, **options):
    fields = tiny_config().to_diff_dict()
    model = {name: value for name, value in fields.items() if name not in ("vision_config", "model_type")}
    model = {name: value for name, value in model.items() if name in tiny_config().default_fields()}
    defaults = {
        "train_data": data,
        "validation_data": data,
        "output": output,
        "max_steps": steps,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 1,
        "ema_decay": 0.9,
        "log_every": 1,
        "validate_every": 4,
        "checkpoint_every": 4,
        "grid_images": 4,
        "kmeans_images": 16,
    }
    values = {**defaults, **options}
    if "init_from" not in values:
        values = {f"model.{name}": json.dumps(value) for name, value in model.items()} | values
    run(train_tokenizer.main, values)
    return output


@pytest.fixture(scope="module")
def tokenizer(data, vision_model, tmp_path_factory):
    """A run with all phases: plain autoencoder, k-means, quantized."""
    output = tmp_path_factory.mktemp("tokenizer") / "run"
    return train_tokenizer_for(
        8, data, output, vision_model=vision_model, codebook_warmup_steps=3, restart_patience=2, mixed_precision="bf16"
    )


def log_of(output, kind):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights_of(folder, model_class=VFMTokModel):
    return model_class.from_pretrained(folder).state_dict()


def test_tokenizer_run_writes_what_it_promises(tokenizer, vision_model):
    steps = log_of(tokenizer, "train")
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert {"loss", "mse", "perceptual", "feature", "codebook", "psnr", "images/s"} <= steps[0].keys()
    validation = log_of(tokenizer, "validation")[-1]
    assert validation["psnr"] > 5
    assert 0 < validation["usage"] <= 1
    assert (tokenizer / "reconstructions" / "step_00000008.png").is_file()
    assert (tokenizer / "arguments.yaml").is_file()
    assert [folder.name for folder in sorted((tokenizer / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000008",
    ]
    model = VFMTokModel.from_pretrained(tokenizer / "model")
    trained = model.vision_model.state_dict()
    start = tiny_model()
    start.load_vision_model(str(vision_model))
    for name, tensor in start.vision_model.state_dict().items():
        assert torch.equal(trained[name], tensor), name


def test_loss_falls(data, vision_model, tmp_path):
    output = train_tokenizer_for(30, data, tmp_path / "run", vision_model=vision_model, validate_every=100)
    losses = [line["mse"] for line in log_of(output, "train")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_decoder_phase_keeps_the_tokens(tokenizer, data, tmp_path):
    output = train_tokenizer_for(
        2, data, tmp_path / "run", init_from=tokenizer / "model", trainable="decoder", adversarial_weight=0.1
    )
    before, after = weights_of(tokenizer / "model"), weights_of(output / "model")
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"post_quant_proj", "vit_decoder", "pixel_decoder"}
    assert "adversarial" in log_of(output, "train")[0]


def test_a_continued_tokenizer_may_weigh_its_losses_anew(tokenizer, data, tmp_path):
    init_from, weight = {"init_from": tokenizer / "model"}, {"model.feature_loss_weight": 0.0}
    output = train_tokenizer_for(1, data, tmp_path / "run", **init_from, **weight)
    assert "feature" not in log_of(output, "train")[0]
    assert VFMTokModel.from_pretrained(output / "model").config.feature_loss_weight == 0
    with pytest.raises(ValueError, match="--model.hidden_size configures a new tokenizer"):
        train_tokenizer_for(1, data, tmp_path / "other", **init_from, **{"model.hidden_size": 64})


def test_a_checkpoint_in_half_precision_trains_in_float32(tokenizer, data, tmp_path):
    half = VFMTokModel.from_pretrained(tokenizer / "model", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    output = train_tokenizer_for(1, data, tmp_path / "run", init_from=tmp_path / "half")
    assert {tensor.dtype for tensor in weights_of(output / "model").values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert VFMTokModel.from_pretrained(output / "model").config.dtype == torch.float32


PRECISE = {
    "model.decoder_dropout": 0.0,
    "model.feature_loss_weight": 0.0,
    "adversarial_weight": 0.5,
    "learning_rate": 1e-3,
}


def assert_same_training(one, other, names=("loss", "adversarial", "gradient_norm")):
    """Equal up to the order of float32 sums, which Adam's division by small gradients magnifies."""
    for (line, expected), name in itertools.product(
        zip(log_of(other, "train"), log_of(one, "train"), strict=True), names
    ):
        assert line[name] == pytest.approx(expected[name], rel=1e-3), (line["step"], name)
    expected = weights_of(one / "model")
    for name, tensor in weights_of(other / "model").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


def test_accumulated_gradients_equal_the_large_batch(data, vision_model, tmp_path):
    """Both optimizers: the discriminator too steps once, on the mean gradient of all parts."""
    options = {"vision_model": vision_model, "restart_patience": 2, **PRECISE}
    whole = train_tokenizer_for(3, data, tmp_path / "whole", batch_size=4, **options)
    parts = train_tokenizer_for(3, data, tmp_path / "parts", batch_size=1, gradient_accumulation_steps=4, **options)
    assert log_of(parts, "train")[-1]["restarted_rows"] > 0
    assert_same_training(whole, parts)


@pytest.fixture
def quick_compiler(monkeypatch):
    """One graph without breaks, as `compile: true` needs it, but run as it is: generating code takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch.compiler.reset()


def test_a_compiled_tokenizer_trains_and_resumes_alike(data, vision_model, tmp_path, quick_compiler):
    """Through the start of the discriminator."""
    options = {"vision_model": vision_model, "checkpoint_every": 3, **PRECISE}
    options["adversarial_start_step"] = 1
    plain = train_tokenizer_for(5, data, tmp_path / "plain", **options)
    compiled = train_tokenizer_for(5, data, tmp_path / "compiled", compile="true", **options)
    assert_same_training(plain, compiled, ("loss", "gradient_norm"))
    resumed = copy_until(compiled, 3, tmp_path / "resumed")
    train_tokenizer_for(5, data, resumed, compile="true", resume="true", **options)
    expected = weights_of(compiled / "model")
    for name, tensor in weights_of(resumed / "model").items():
        assert torch.equal(tensor, expected[name]), name


def test_two_processes_equal_one_with_the_double_batch(data, vision_model, tmp_path):
    """With a term off, a discriminator, accumulation and restarts: no parameter goes unused, all choose alike."""
    options = {"vision_model": vision_model, "restart_patience": 2, "gradient_accumulation_steps": 2, **PRECISE}
    one = train_tokenizer_for(3, data, tmp_path / "one", batch_size=2, **options)
    arguments = yaml.safe_load((one / "arguments.yaml").read_text())
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**arguments, "output": str(tmp_path / "two"), "batch_size": 1}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [*launcher, "vfmtok_hf.training.train_tokenizer", "--config", str(config)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Losses are logged by the first process, of its own images.
    assert_same_training(one, tmp_path / "two", ("gradient_norm", "discriminator_gradient_norm", "restarted_rows"))


def test_every_option_of_the_objective_at_once(data, vision_model, tmp_path):
    """The original's discriminator with the adaptive weight, from its start step on, in mixed precision."""
    torch.manual_seed(0)
    tiny_vit().save_pretrained(tmp_path / "dino")
    output = train_tokenizer_for(
        3,
        data,
        tmp_path / "run",
        vision_model=vision_model,
        mixed_precision="bf16",
        gradient_checkpointing="true",
        l1_weight=1,
        adversarial_weight=0.5,
        adversarial_start_step=1,
        adaptive_adversarial_weight="true",
        discriminator="dino",
        discriminator_model=tmp_path / "dino",
        **{"model.entropy_loss_weight": 0.1},
    )
    steps = log_of(output, "train")
    names = {"adversarial", "adaptive_weight", "discriminator", "logits_fake", "logits_real"}
    assert [names <= line.keys() for line in steps] == [False, True, True]
    assert all(line["gradient_norm"] > 0 for line in steps)
    last = steps[-1]
    weighted = last["l1"] + 2 * last["mse"] + last["perceptual"] + last["feature"] + last["entropy"]
    weighted += last["codebook"] + last["commitment"] + 0.5 * last["adaptive_weight"] * last["adversarial"]
    assert last["loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminator": "dino", "batch_size": 9}, "--batch_size 9 does not split"),
        ({"adaptive_adversarial_weight": "true", "compile": "true"}, "--compile true does not support"),
    ],
)
def test_impossible_adversarial_options(options, message, data, vision_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_tokenizer_for(1, data, tmp_path / "run", vision_model=vision_model, adversarial_weight=1, **options)


def test_lpips_without_weights_stops_before_training(data, vision_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file missing.pth"):
        train_tokenizer_for(
            1, data, tmp_path / "run", vision_model=vision_model, lpips_weight=1, vgg_weights="missing.pth"
        )
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_new_tokenizer_needs_one_source(data, tmp_path):
    with pytest.raises(ValueError, match="exactly one of --init_from"):
        train_tokenizer_for(1, data, tmp_path / "run", init_from="a", vision_model="b")


def train_generator_for(steps, tokenizer, data, output, **options):
    values = {
        "tokenizer": tokenizer / "model",
        "train_data": data,
        "validation_data": data,
        "output": output,
        "num_crops": 2,
        "max_steps": steps,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "ema_decay": 0.9,
        "log_every": 1,
        "validate_every": 4,
        "sample_every": 4,
        "checkpoint_every": 4,
        "samples_per_class": 2,
        "model.hidden_size": 32,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2,
        "model.intermediate_size": 48,
        **options,
    }
    run(train_generator.main, values)
    return output


@pytest.mark.parametrize(
    ("generator", "model_class"), [("ar", VFMTokARForImageGeneration), ("rar", VFMTokRARForImageGeneration)]
)
def test_generator_run(generator, model_class, tokenizer, data, tmp_path):
    output = train_generator_for(16, tokenizer, data, tmp_path / "run", generator=generator)
    losses = [line["loss"] for line in log_of(output, "train")]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert log_of(output, "validation")[-1]["loss"] > 0
    assert (output / "samples" / "step_00000016.png").is_file()
    model = model_class.from_pretrained(output / "model")
    assert model.config.id2label == {0: "bar", 1: "disc"}
    assert model.config.num_classes == 2
    assert model.generate(torch.tensor([0, 1])).shape == (2, 9)


def test_a_continued_run_keeps_its_tokens_and_its_tokenizer(tokenizer, data, tmp_path):
    output = train_generator_for(2, tokenizer, data, tmp_path / "run")
    file = output / "tokens" / "train" / "tokens-00000.parquet"
    first = file.stat().st_mtime_ns
    train_generator_for(4, tokenizer, data, output, resume="true")
    assert file.stat().st_mtime_ns == first
    with pytest.raises(ValueError, match="--tokenizer"):
        train_generator_for(6, tmp_path / "other", data, output, resume="true")


def test_tokens_anew_in_every_step(tokenizer, data, tmp_path):
    """Without keeping tokens, with two sequences of each image, and continued after an interruption."""
    options = {"num_crops": 0, "codebook_top_k": 2, "generator": "rar", "gradient_accumulation_steps": 2}
    whole = train_generator_for(4, tokenizer, data, tmp_path / "whole", checkpoint_every=2, **options)
    assert not (whole / "tokens" / "train").exists()
    part = train_generator_for(
        2, tokenizer, data, tmp_path / "part", rar_random_until=1, rar_raster_from=1.5, **options
    )
    train_generator_for(4, tokenizer, data, part, resume="true", **options)
    expected = weights_of(whole / "model", VFMTokRARForImageGeneration)
    for name, tensor in weights_of(part / "model", VFMTokRARForImageGeneration).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("generator", ["ar", "rar"])
def test_a_compiled_generator_trains_alike(generator, tokenizer, data, tmp_path, quick_compiler):
    """A RAR in raster order, as random ones are drawn from another sequence of numbers."""
    options = {"generator": generator, "rar_random_until": 0, "rar_raster_from": 0}
    options |= {f"model.{name}": 0.0 for name in DROPOUTS[generator]}
    plain = train_generator_for(4, tokenizer, data, tmp_path / "plain", **options)
    compiled = train_generator_for(4, tokenizer, data, tmp_path / "compiled", compile="true", **options)
    for line, expected in zip(log_of(compiled, "train"), log_of(plain, "train"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    assert (compiled / "pipeline" / "model_index.json").is_file()


def test_a_finished_run_is_a_pipeline(tokenizer, data, tmp_path):
    output = train_generator_for(2, tokenizer, data, tmp_path / "run", temperature=0.8, top_k=5)
    pipe = VFMTokPipeline.from_pretrained(output / "pipeline")
    assert pipe.id2label == {0: "bar", 1: "disc"}
    assert (pipe.transformer.generation_config.temperature, pipe.transformer.generation_config.top_k) == (0.8, 5)
    assert pipe(["disc", "bar"]).images[0].size == (32, 32)
