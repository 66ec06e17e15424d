"""The claims' configurations, their VQGAN baseline, and how runs are compared."""

import importlib
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from tests.modeling.generators import tiny_ar
from tests.testing import tiny_config, tiny_images, tiny_model
from tests.training.tiny_runs import write_images, write_vision_model
from vfmtok_hf import VFMTokARForImageGeneration
from vfmtok_hf.data.files import find_images
from vfmtok_hf.training.arguments import GeneratorArguments, TokenizerArguments, parse_arguments
from vfmtok_hf.training.objective import TokenizerObjective


CLAIMS = Path(__file__).parents[2] / "examples" / "claims"
MODULES = ("compare", "judge", "measure", "train", "vqgan")


@pytest.fixture
def claims(monkeypatch):
    """The modules of the example."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def tiny_vqgan(claims):
    torch.manual_seed(0)
    return claims.vqgan.VQGANModel(tiny_config(num_anchors=81, save_vision_model=False, feature_loss_weight=0.0))


def test_configurations_of_the_claims_are_the_trainers():
    tokenizer = ["--config", str(CLAIMS / "tokenizer.yaml"), "--output", "run"]
    assert parse_arguments(TokenizerArguments, tokenizer).perceptual_weight == 0
    generator = ["--config", str(CLAIMS / "generator.yaml"), "--output", "run", "--tokenizer", "model"]
    assert parse_arguments(GeneratorArguments, generator).generator == "ar"


def test_the_baseline_differs_from_vfmtok_only_in_its_encoder(claims):
    model, vfmtok = tiny_vqgan(claims), tiny_model()
    shapes, expected = (
        {name: tuple(weight.shape) for name, weight in whole.state_dict().items() if "encoder." not in name}
        for whole in (model, vfmtok)
    )
    per_token = "vit_decoder.anchor_position_embeddings"
    assert (shapes.pop(per_token), expected.pop(per_token)) == ((1, 81, 32), (1, 9, 32))
    assert shapes == {name: shape for name, shape in expected.items() if not name.startswith("vision_model.")}
    encoded = model.encode(tiny_images())
    assert encoded.image_tokens.shape == (2, 81)
    assert model.decode(image_tokens=encoded.image_tokens).reconstruction.shape == (2, 3, 32, 32)


def test_tokens_of_the_baseline_are_in_raster_order(claims):
    """A changed corner, 4 of 32 pixels at the top right, changes the last token of the first row most."""
    model = tiny_vqgan(claims)
    images = tiny_images(1)
    changed = images.clone()
    changed[..., :4, -4:] = 1 - changed[..., :4, -4:]
    difference = (model.encode(changed).latents - model.encode(images).latents).norm(dim=-1)
    assert difference.argmax() == 8


def test_pixels_train_the_whole_encoder_of_the_baseline(claims):
    model = tiny_vqgan(claims)
    weights = {"l1": 1.0, "mse": 2.0, "lpips": 0.0, "perceptual": 0.0}
    out = TokenizerObjective(model, weights)(tiny_images())
    assert "feature" not in out["terms"]
    out["image_loss"].backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.anchor_encoder.parameters())


def test_both_kinds_of_tokenizers_are_loaded(claims, tmp_path):
    images = tiny_images()
    for model in (tiny_vqgan(claims), tiny_model()):
        model.eval().save_pretrained(tmp_path / type(model).__name__)
        loaded = claims.vqgan.load_tokenizer(tmp_path / type(model).__name__)
        assert type(loaded) is type(model)
        assert torch.equal(loaded.encode(images).latents, model.encode(images).latents)


def test_a_run_of_the_baseline_and_its_generator_at_any_step(claims, tmp_path, monkeypatch):
    """Tiny runs of both trainers. The last checkpoint's averages are the weights that the trainer saves for use."""
    for part in ("train", "validation"):
        write_images(tmp_path / "data" / part)
    fields = tiny_config().to_diff_dict()
    fields = {name: fields[name] for name in tiny_config().default_fields() if name in fields}
    del fields["vision_config"]
    every_step = {"max_steps": 3, "batch_size": 4, "validate_every": 3, "checkpoint_every": 1, "keep_checkpoints": 3}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    configs = {
        "tokenizer": {"model": fields, "perceptual_weight": 0, "grid_images": 4, **every_step},
        "generator": {"model": sizes, "num_crops": 1, "samples_per_class": 1, "learning_rate": 0.01, **every_step},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(claims.train, "HERE", tmp_path)
    vision_model = write_vision_model(tmp_path / "vision_model")
    tokenizer, generator = tmp_path / "tokenizer", tmp_path / "generator"
    AcceleratorState._reset_state(reset_partial_state=True)
    claims.train.train_tokenizer_of("vqgan", tmp_path / "data", vision_model, tokenizer, seed=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    claims.train.train_generator_of(tokenizer / "model", tmp_path / "data", generator, seed=0)

    assert claims.train.is_finished(generator)
    model = VFMTokARForImageGeneration.from_pretrained(generator / "model")
    assert model.config.num_image_tokens == 81
    final = {name: weight.clone() for name, weight in model.named_parameters()}
    with claims.compare.at_step(model, generator, 3):
        assert all(torch.equal(weight, final[name]) for name, weight in model.named_parameters())
    with claims.compare.at_step(model, generator, 1):
        assert not torch.equal(model.lm_head.weight, final["lm_head.weight"])
    assert torch.equal(model.lm_head.weight, final["lm_head.weight"])
    assert isinstance(claims.vqgan.load_tokenizer(tokenizer / "model"), claims.vqgan.VQGANModel)


def test_a_fixed_grid_reads_the_center_of_each_cell(claims, tmp_path):
    """The offsets are zero and stay zero, because their gradients are."""
    vision_model = write_vision_model(tmp_path / "vision_model")
    arguments = TokenizerArguments(train_data="", output="", vision_model=str(vision_model))
    fields = tiny_config().to_diff_dict()
    arguments.model = {name: fields[name] for name in tiny_config().default_fields() if name in fields}
    del arguments.model["vision_config"]
    model = claims.train.BUILDERS["fixed_grid"](arguments)
    out = TokenizerObjective(model, {"l1": 1.0, "mse": 2.0, "lpips": 0.0, "perceptual": 0.0})(tiny_images())
    out["image_loss"].backward()
    for layer in model.anchor_encoder.layers:
        for parameter in layer.cross_attn.sampling_offsets.parameters():
            assert not parameter.any()
            assert not parameter.grad.any()


def test_judges_are_those_of_the_tables(claims, refusal):
    judges = ["data/efficientnet_lite0_classifier", "data/resnet"]
    error = refusal(claims.compare, runs="runs", data="data", judges=judges)
    assert "folders named efficientnet_lite0_classifier and judge" in error


def test_results_need_a_finished_run(claims, refusal, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    figure = output / "claims_convergence.png"
    figure.write_text("an earlier figure")
    options = {"runs": "nope", "data": "nope"}
    assert "no finished run in nope" in refusal(claims.measure, features="nope", output=output, **options)
    judges = list(claims.compare.JUDGES)
    assert "no finished run in nope" in refusal(claims.compare, judges=judges, **options)
    assert "no finished run in nope" in refusal(claims.compare, judges=judges, output=output, **options)
    assert [figure.read_text()] == [file.read_text() for file in output.iterdir()]


def test_a_comparison_needs_all_runs_and_several_seeds(claims, refusal, tmp_path):
    for variant in claims.compare.VARIANTS:
        (tmp_path / "seed_0" / variant).mkdir(parents=True)
        (tmp_path / "seed_0" / variant / "comparison.json").write_text("{}")
    options = {"runs": tmp_path, "data": "nope", "judges": list(claims.compare.JUDGES), "output": tmp_path / "new"}
    assert f"no finished run in {tmp_path}/seed_1/region_adaptive" in refusal(claims.compare, seeds=[0, 1], **options)
    assert "two or more --seeds" in refusal(claims.compare, seeds=0, **options)
    assert not (tmp_path / "new").exists()


def test_classes_without_images_keep_their_numbers(claims, tmp_path):
    write_images(tmp_path)
    held_out = list(find_images([tmp_path / "disc"]).values())
    assert claims.compare.Images(held_out, ["bar", "disc"]).labels.tolist() == [1] * 8


def test_both_splits_have_the_same_classes(claims, refusal, tmp_path, monkeypatch):
    """With one class fewer, the numbers of the others would differ."""
    for part in ("train", "validation"):
        write_images(tmp_path / part, images_per_class=32)
    train, test = claims.judge.open_splits(tmp_path)
    assert train.class_names == test.class_names == ["bar", "disc"]
    shutil.rmtree(tmp_path / "validation" / "bar")
    assert "different classes: bar" in refusal(claims.judge, data=tmp_path, output=tmp_path / "judge")
    monkeypatch.setattr(claims.compare, "is_finished", lambda run: True)
    options = {"runs": tmp_path, "judges": list(claims.compare.JUDGES)}
    assert "different classes: bar" in refusal(claims.compare, data=tmp_path, **options)


def test_a_judge_is_trained_only_if_it_can_be_saved(claims, refusal, tmp_path):
    for part in ("train", "validation"):
        write_images(tmp_path / part)
    file, folder = tmp_path / "file", tmp_path / "judge"
    file.touch()
    assert "file is a file, not a folder" in refusal(claims.judge, data=tmp_path, output=file)
    assert "There is no folder nope/train" in refusal(claims.judge, data="nope", output=folder)
    assert "16 images, and a step of training needs 64" in refusal(claims.judge, data=tmp_path, output=folder)
    assert "--epochs must be 1 or more" in refusal(claims.judge, data=tmp_path, output=folder, epochs=0)
    assert not folder.exists()


def test_measured_runs_fill_the_tables(claims, tmp_path, monkeypatch):
    """The trained parts are replaced: checkpoints, judges and probes. Samples of the last step are not drawn again."""
    for part in ("train", "validation"):
        write_images(tmp_path / "data" / part)
    tiny_vqgan(claims).save_pretrained(tmp_path / "tokenizer" / "model")
    tiny_ar(num_image_tokens=81, codebook_size=64, num_classes=2).save_pretrained(tmp_path / "generator" / "model")
    probes = dict.fromkeys(("image_embeds", "token_embeddings", "pixels"), SimpleNamespace(mean_class_accuracy=0.5))
    monkeypatch.setattr(claims.compare, "NUM_IMAGES", 4)
    monkeypatch.setattr(claims.compare, "at_step", lambda *arguments: nullcontext())
    monkeypatch.setattr(claims.compare, "evaluate_linear_probe", lambda *arguments: probes)
    judged = []

    def values(pixels, labels):
        assert len(pixels) == len(labels)
        judged.append(len(pixels))
        return {"distance": 10 / len(judged), "right": 0.5, "recall": 0.1}

    judges = [SimpleNamespace(name=name, values=values) for name in claims.compare.JUDGES]
    files = list(find_images([tmp_path / "data" / "train"]).values())
    reference = claims.compare.Images(files, ["bar", "disc"])
    results = claims.compare.measure_run(tmp_path, tmp_path / "data", judges, reference, "cpu")
    drawn = len(claims.compare.STEPS) + len(claims.compare.GUIDANCE_SCALES) - 1
    assert sorted(judged) == sorted(len(judges) * ([16, 16] + drawn * [4]))
    assert results["guidance"][1.0] == results["convergence"][1200]
    seeds = [json.loads(json.dumps(results))] * 2
    assert len(claims.compare.tables({"region_adaptive": seeds, "vqgan": seeds})) == 6


def test_seeds_are_written_side_by_side(claims, run_script, tmp_path, monkeypatch):
    """With what was measured before, as neither seed has a finished run here."""
    monkeypatch.setattr(claims.measure, "VisionModelFeatures", lambda *arguments: SimpleNamespace(name="features"))
    for seed, name in enumerate(("claims", "claims_seed_1")):
        runs = tmp_path / f"seed_{seed}"
        measured = json.loads((CLAIMS.parents[1] / "docs" / "assets" / "claims_seed_1.json").read_text())
        for variant in measured["tokenizer"]:
            log = runs / variant / "tokenizer" / "log.jsonl"
            log.parent.mkdir(parents=True)
            log.write_text('{"kind": "validation", "step": 1, "psnr": 10}')
        measured["tokenizer"]["region_adaptive"]["psnr"] = seed
        (runs / "measurements.json").write_text(json.dumps(measured))
        options = {"runs": runs, "data": "data", "features": "features", "output": tmp_path / "output", "name": name}
        run_script(claims.measure, **options)
    for seed, name in enumerate(("claims", "claims_seed_1")):
        written = json.loads((tmp_path / "output" / f"{name}.json").read_text())
        assert written["tokenizer"]["region_adaptive"]["psnr"] == seed
        for figure in ("convergence", "probes"):
            assert (tmp_path / "output" / f"{name}_{figure}.png").is_file()


@pytest.mark.parametrize(("target", "step"), [(9, 100), (6, 150), (4, 200), (3, 250), (1, None)])
def test_steps_to_a_quality_are_interpolated(claims, target, step):
    assert claims.compare.steps_to_reach([100, 200, 300], [8, 4, 2], target) == step
