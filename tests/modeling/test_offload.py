"""Accelerate's hooks watch `forward` alone: every public method works wherever the parts of a model have been put."""

import itertools

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from transformers import AutoModel

from tests.modeling.generators import tiny_ar, tiny_rar
from tests.modeling.test_vision_models import TIMM_CONV, TIMM_VIT, TRANSFORMERS
from tests.testing import tiny_images, tiny_model


TOKENIZER_PARTS = (
    "vision_model",
    "anchor_encoder",
    "anchor_encoder.layers.1",
    "quant_proj",
    "quantizer",
    "post_quant_proj",
    "vit_decoder",
    "vit_decoder.layers.0",
    "pixel_decoder",
)
GENERATOR_PARTS = {
    "ar": ("class_embedding", "embed_tokens", "layers.0", "norm", "lm_head"),
    "rar": ("embed_tokens", "layers.0", "norm_modulation", "lm_head"),
}


def place(model, part, folder):
    """The saved model, loaded with `part` on disk and the rest in memory."""
    model.save_pretrained(folder / "model")
    names = part.split(".")
    ancestors = [".".join(names[:depth]) for depth in range(len(names))]
    device_map = {part: "disk"}
    for ancestor in ancestors:
        module = model.get_submodule(ancestor)
        members = [
            module.named_children(),
            module.named_parameters(recurse=False),
            module.named_buffers(recurse=False),
        ]
        for name, _ in itertools.chain(*members):
            path = f"{ancestor}.{name}".removeprefix(".")
            if path not in ancestors:
                device_map.setdefault(path, "cpu")
    placed = AutoModel.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=folder / "offload"
    ).eval()
    assert any(parameter.is_meta for parameter in placed.get_submodule(part).parameters())
    return placed


def use_tokenizer(model):
    """Results of all public methods."""
    torch.manual_seed(1)
    images = tiny_images()
    encoded = model.encode(images, output_sampling_locations=True)
    decoded = model.decode(image_tokens=encoded.image_tokens, output_features=True)
    out = model(images, return_loss=True)
    return [
        encoded.image_tokens,
        encoded.latents,
        model.encode_features(model.extract_vision_features(images)),
        decoded.reconstruction,
        decoded.image_embeds,
        model.decode(quantized_latents=encoded.quantized_latents).reconstruction,
        model.get_image_features(images),
        model.quantizer.lookup(encoded.image_tokens),
        model.quantizer.top_k(encoded.latents, 2),
        model.quantizer.normalized_codebook(),
        out.loss,
        model(images).reconstruction,
    ]


def use_generator(model):
    labels, tokens = torch.tensor([0, 3]), torch.arange(18).view(2, 9)
    return [
        model(class_labels=labels, image_tokens=tokens, return_loss=True).loss,
        model.generate(labels, guidance_scale=2.0, do_sample=False),
        model.generate(labels, generator=torch.Generator().manual_seed(0)),
    ]


def assert_same(results, expected):
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(result, wanted, msg=lambda message, index=index: f"result {index}: {message}")


@torch.no_grad()
@pytest.mark.parametrize("part", TOKENIZER_PARTS)
def test_a_tokenizer_with_a_part_on_disk(part, tmp_path):
    model = tiny_model()
    assert_same(use_tokenizer(place(model, part, tmp_path)), use_tokenizer(model))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in GENERATOR_PARTS.items() for part in parts])
def test_a_generator_with_a_part_on_disk(kind, part, tmp_path):
    model = {"ar": tiny_ar, "rar": tiny_rar}[kind]()
    assert_same(use_generator(place(model, part, tmp_path)), use_generator(model))


@torch.no_grad()
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("build", [tiny_model, tiny_ar, tiny_rar])
def test_whole_models_offloaded(build, offload, tmp_path):
    model = build()
    use = use_tokenizer if build is tiny_model else use_generator
    expected = use(model)
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(use(model), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "vision_config",
    [*(config for config, *_ in TRANSFORMERS.values()), TIMM_VIT, TIMM_CONV],
    ids=lambda config: config.model_type,
)
def test_vision_models_of_each_family_are_offloaded(vision_config):
    model = tiny_model(vision_config=vision_config, vision_feature_layers=[1, 2])
    images = tiny_images()
    expected = model.encode(images).latents
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    for _ in range(2):
        torch.testing.assert_close(model.encode(images).latents, expected)
        assert all(parameter.is_meta for parameter in model.vision_model.parameters())


@pytest.mark.parametrize("build", [tiny_ar, tiny_rar])
def test_classes_of_an_offloaded_generator_are_not_resized(build):
    """Its hooks would go on loading the old table."""
    model = build()
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        model.resize_class_embeddings(["sun", "moon"])


@pytest.mark.parametrize("build", [tiny_model, tiny_ar, tiny_rar])
def test_a_model_whose_weights_are_elsewhere_is_not_saved_without_them(build, tmp_path):
    model = build()
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        model.save_pretrained(tmp_path / "model")
    remove_hook_from_module(model, recurse=True)
    model.save_pretrained(tmp_path / "model")
    AutoModel.from_pretrained(tmp_path / "model")
