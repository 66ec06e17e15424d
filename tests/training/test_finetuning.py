"""From a trained generator to one of other classes, in full or by adapters."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from PIL import Image

from tests.modeling.generators import tiny_ar, tiny_rar
from tests.testing import tiny_model
from vfmtok_hf import VFMTokImageProcessor, VFMTokPipeline
from vfmtok_hf.training import generator_training, train_generator
from vfmtok_hf.training.arguments import GeneratorArguments
from vfmtok_hf.training.finetuning import add_lora, load_generator, load_tokenizer
from vfmtok_hf.training.generator_training import parameter_groups, scaled_class_steps
from vfmtok_hf.training.schedule import set_learning_rate


OLD_NAMES = {0: "fish", 1: "crane, bird", 2: "heart, love", 3: "moon", 4: "sun"}
NEW_NAMES = ["comet", "heart", "moon"]


@pytest.fixture(params=[tiny_ar, tiny_rar])
def pipeline(request, tmp_path):
    """A saved pipeline, in half precision as they are shipped."""
    generator = request.param(codebook_size=64, id2label=OLD_NAMES)
    processor = VFMTokImageProcessor(size={"height": 32, "width": 32})
    pipe = VFMTokPipeline(tiny_model(), generator, processor).to(torch.float16)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def images(tmp_path):
    for number in range(24):
        file = tmp_path / "images" / NEW_NAMES[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        gray = 60 * (number % 3) + np.random.default_rng(number).integers(0, 60, (32, 32, 3))
        Image.fromarray(gray.astype(np.uint8)).save(file)
    return tmp_path / "images"


def finetune(pipeline, images, output, **options):
    values = {
        "init_from": pipeline,
        "train_data": images,
        "output": output,
        "max_steps": 6,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "ema_decay": 0.5,
        "log_every": 1,
        "validation_share": 0.25,
        **options,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    train_generator.main([item for name, value in values.items() for item in (f"--{name}", str(value))])
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "validation"]


def trained_rows(generator):
    """Rows of the class embeddings: classes, then the null class."""
    table, first = generator.class_embedding_table()
    return table.weight[first:]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_folder_of_images_becomes_a_pipeline(lora_rank, pipeline, images, tmp_path):
    output = tmp_path / "run"
    before, after = finetune(pipeline, images, output, lora_rank=lora_rank)
    assert after < before
    pipe = VFMTokPipeline.from_pretrained(output / "pipeline")
    assert pipe.id2label == dict(enumerate(NEW_NAMES))
    assert pipe.transformer.config.num_classes == 3
    assert len(pipe(["comet", "heart", "moon"], guidance_scale=1.5).images) == 3
    for name, tensor in load_tokenizer(str(pipeline)).state_dict().items():
        assert torch.equal(tensor, pipe.vq_model.state_dict()[name]), name
    changed = {
        name
        for name, tensor in load_generator(str(pipeline)).state_dict().items()
        if tensor.shape == pipe.transformer.state_dict()[name].shape
        and not torch.equal(tensor, pipe.transformer.state_dict()[name])
    }
    assert ("lm_head.weight" in changed) == (lora_rank == 0)
    assert "layers.1.self_attn.q_proj.weight" in changed


def test_classes_of_the_same_name_keep_their_rows(pipeline, images, tmp_path):
    old = trained_rows(load_generator(str(pipeline)))
    finetune(pipeline, images, tmp_path / "run", max_steps=1, learning_rate=0)
    new = trained_rows(load_generator(str(tmp_path / "run" / "model")))
    torch.testing.assert_close(new, old[[5, 2, 3, 5]])


def test_adapters_alone_give_the_merged_model(pipeline, images, tmp_path):
    finetune(pipeline, images, tmp_path / "run", lora_rank=4)
    base = load_generator(str(pipeline))
    base.resize_class_embeddings(NEW_NAMES)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    merged = load_generator(str(tmp_path / "run" / "model")).eval()
    labels, tokens = torch.arange(3), torch.randint(64, (3, 9))
    # Merging adds the updates to the weights before the product, which rounds otherwise.
    torch.testing.assert_close(adapted(labels, tokens).logits, merged(labels, tokens).logits, rtol=1e-4, atol=1e-4)


def test_resumed_adapters_equal_uninterrupted_ones(pipeline, images, tmp_path):
    options = {"lora_rank": 4, "lora_dropout": 0.1, "checkpoint_every": 3}
    whole, part = tmp_path / "whole", tmp_path / "part"
    finetune(pipeline, images, whole, **options)
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_00000006")
    shutil.rmtree(part / "model")
    finetune(pipeline, images, part, resume="true", **options)
    expected = load_generator(str(whole / "model")).state_dict()
    for name, tensor in load_generator(str(part / "model")).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("make", [tiny_ar, tiny_rar])
def test_adapters_leave_everything_else_frozen(make):
    model = make()
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    for name, parameter in model.named_parameters():
        is_class_row = "modules_to_save" in name or "trainable_tokens_delta" in name
        assert parameter.requires_grad == ("lora_" in name or is_class_row), name
    rows = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n)
    assert rows == 6 * 32  # five classes and the null class


@pytest.mark.parametrize("make", [tiny_ar, tiny_rar])
def test_weight_decay(make):
    """All matrices of an AR; of a RAR neither its tables nor the last modulation. Never vectors."""
    model = make()
    arguments = GeneratorArguments(
        train_data="data", output="output", weight_decay=0.05, class_learning_rate_scale=3.0
    )
    groups = parameter_groups(model, arguments)
    decayed, plain, classes = groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert [names[id(parameter)] for parameter in classes["params"]] == ["class_embedding.weight"] * (make is tiny_ar)
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.3])
    assert "layers.0.self_attn.q_proj.weight" in decayed_names
    assert ("embed_tokens.weight" in decayed_names) == (make is tiny_ar)
    assert not any(name.startswith(("norm", "position", "target_position", "timestep")) for name in decayed_names)
    assert all(parameter.ndim == 1 or make is tiny_rar for parameter in plain["params"])


def stepped(make, scale, lora_rank=0):
    """Class embeddings and other embeddings of their table, before and after a step of AdamW, and the other weights after it."""
    torch.manual_seed(0)
    model = make(class_dropout=0.0)
    if lora_rank:
        add_lora(model, lora_rank, alpha=4, dropout=0.0)
    table, first = model.class_embedding_table()
    before = table.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    model(torch.arange(5), torch.arange(45).view(5, 9) % 32, return_loss=True).loss.backward()
    with scaled_class_steps(model, scale):
        optimizer.step()
    moved = table.weight.detach() - before
    others = [p.detach().clone() for name, p in model.named_parameters() if p is not table.weight]
    return moved[first:], moved[:first], others


def test_classes_of_a_rar_take_larger_steps_than_its_image_tokens():
    classes, tokens, others = stepped(tiny_rar, 1.0)
    scaled_classes, scaled_tokens, scaled_others = stepped(tiny_rar, 3.0)
    assert classes[:5].abs().min() > 0
    torch.testing.assert_close(scaled_classes, 3 * classes, atol=1e-6, rtol=1e-4)
    assert torch.equal(scaled_tokens, tokens)
    assert all(torch.equal(*pair) for pair in zip(others, scaled_others, strict=True))


@pytest.mark.parametrize(("make", "lora_rank"), [(tiny_ar, 0), (tiny_ar, 2), (tiny_rar, 2)])
def test_classes_in_a_table_of_their_own_are_scaled_by_their_parameter_group_alone(make, lora_rank):
    plain = stepped(make, 1.0, lora_rank)
    scaled = stepped(make, 3.0, lora_rank)
    assert torch.equal(plain[0], scaled[0])
    assert all(torch.equal(*pair) for pair in zip(plain[2], scaled[2], strict=True))


def test_a_sharded_rar_cannot_scale_its_classes(images, tmp_path, monkeypatch):
    generator = tiny_rar(codebook_size=64, id2label=OLD_NAMES)
    VFMTokPipeline(tiny_model(), generator, VFMTokImageProcessor()).save_pretrained(tmp_path / "rar")
    monkeypatch.setattr(generator_training, "sharding_of", lambda accelerator: "FSDP")
    with pytest.raises(ValueError, match="A sharded RAR cannot scale"):
        finetune(tmp_path / "rar", images, tmp_path / "run", class_learning_rate_scale=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "other"}, "has codebook_size 64, but the tokenizer's is 32"),
        ({"model.hidden_size": 8}, "--init_from, which has its own configuration"),
        ({"init_from": "generator"}, "is not a pipeline: pass --tokenizer"),
    ],
)
def test_what_does_not_fit_is_named(options, message, pipeline, images, tmp_path):
    tiny_model(codebook_size=32).save_pretrained(tmp_path / "other")
    shutil.copytree(pipeline / "transformer", tmp_path / "generator")
    paths = {"other": tmp_path / "other", "generator": tmp_path / "generator"}
    options = {name: paths.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        finetune(pipeline, images, tmp_path / "run", **options)


def test_only_a_fitting_model_loads(pipeline):
    with pytest.raises(ValueError, match="contains a VFMTokModel, expected a VFMTokARFor"):
        load_generator(str(pipeline / "vq_model"))
