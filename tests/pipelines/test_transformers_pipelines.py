"""transformers' `pipeline` with an image tokenizer: features, and image tokens as a task of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.testing import tiny_model
from vfmtok_hf import VFMTokConfig, VFMTokImageProcessor, VFMTokModel
from vfmtok_hf.modeling.image_reading_vfmtok import read_image


IMAGES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.png"))[:3]
FILES = [str(path) for path in IMAGES]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def image_processor():
    return VFMTokImageProcessor(size=32)


@pytest.fixture
def folder(model, image_processor, tmp_path):
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    return str(tmp_path)


def encoded(model, image_processor):
    with torch.no_grad():
        return model.encode(image_processor(FILES, return_tensors="pt")["pixel_values"])


def test_image_features_are_those_of_the_tokens(model, image_processor):
    extract = transformers.pipeline("image-feature-extraction", model=model, image_processor=image_processor)
    features = extract(FILES, return_tensors=True)
    expected = encoded(model, image_processor).quantized_latents
    torch.testing.assert_close(torch.cat(features), expected)
    assert features[0].shape == (1, 9, 4)


def test_pooled_features_are_the_image_embeddings(model, image_processor):
    extract = transformers.pipeline("image-feature-extraction", model=model, image_processor=image_processor)
    pooled = extract(FILES, pool=True, return_tensors=True)
    pixel_values = image_processor(FILES, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat(pooled), model.get_image_features(pixel_values).detach())


def test_features_from_a_folder(folder, model, image_processor):
    extract = transformers.pipeline("image-feature-extraction", model=folder)
    features = torch.tensor(extract(FILES[0]))
    torch.testing.assert_close(features, encoded(model, image_processor).quantized_latents[:1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_image_tokens(folder, model, image_processor, batch_size):
    tokenize = transformers.pipeline("image-tokens", model=folder)
    expected = encoded(model, image_processor).image_tokens.tolist()
    assert tokenize(FILES, batch_size=batch_size) == expected
    assert tokenize(read_image(FILES[1])) == expected[1]
    assert tokenize(FILES[2], return_tensors=True).shape == (1, 9)


def test_image_tokens_in_half_precision(model, image_processor):
    tokenize = transformers.pipeline(
        "image-tokens", model=model.to(torch.bfloat16), image_processor=image_processor, dtype=torch.bfloat16
    )
    assert len(tokenize(FILES[0])) == 9


def test_unknown_options_are_named(model, image_processor):
    with pytest.raises(TypeError, match="not top_k"):
        transformers.pipeline("image-tokens", model=model, image_processor=image_processor, top_k=3)


@pytest.mark.process
def test_a_saved_pipeline_brings_its_code_along(folder, model, image_processor, tmp_path, monkeypatch):
    """As remote code, in a process that cannot import this package."""
    monkeypatch.setattr(VFMTokConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(VFMTokModel, "_auto_class", "AutoModel")
    monkeypatch.setattr(VFMTokImageProcessor, "_auto_class", "AutoImageProcessor")
    saved = tmp_path / "saved"
    transformers.pipeline("image-tokens", model=folder).save_pretrained(saved)
    assert (saved / "image_tokens_vfmtok.py").is_file()
    assert transformers.AutoConfig.from_pretrained(saved).custom_pipelines["image-tokens"]["pt"] == ["AutoModel"]
    code = f"""
import os, sys
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
sys.modules["vfmtok_hf"] = None
from transformers import pipeline
print(pipeline("image-tokens", model={str(saved)!r}, trust_remote_code=True)({FILES[0]!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(encoded(model, image_processor).image_tokens[0].tolist())


# -- where models live


def test_moving_a_model_moves_all_of_it(model):
    model.to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model.to("meta").device.type == "meta"
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_half_precision_keeps_the_codebook_lookup_exact(model):
    """Loading in bfloat16 keeps the codebook in float32; `.to` does not, and the lookup then works on what is left."""
    rows = model.quantizer.codebook.weight.detach().clone()
    model.to(torch.bfloat16)
    assert model.quantizer.lookup(torch.arange(64)).dtype == torch.float32
    torch.testing.assert_close(model.quantizer.codebook.weight.float(), rows, rtol=2**-8, atol=0)
