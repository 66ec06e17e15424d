"""The parts of `serving/vllm` that need no vLLM. `make test-vllm` tests its models."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from vfmtok_hf import VFMTokARConfig, VFMTokARForImageGeneration, VFMTokRARConfig, VFMTokRARForImageGeneration


PACKAGE = Path(__file__).parents[2] / "serving" / "vllm" / "src" / "vfmtok_vllm"
MODELS = {
    "ar": (VFMTokARConfig, VFMTokARForImageGeneration),
    "rar": (VFMTokRARConfig, VFMTokRARForImageGeneration),
}


@pytest.fixture(scope="module")
def configurations():
    """The configuration classes that vLLM reads checkpoints with."""
    spec = importlib.util.spec_from_file_location("vfmtok_vllm_configuration", PACKAGE / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"ar": module.VFMTokARConfig, "rar": module.VFMTokRARConfig}


@pytest.mark.parametrize("kind", MODELS)
def test_saved_configurations_are_read(configurations, kind):
    config_class, (own_class, model_class) = configurations[kind], MODELS[kind]
    assert config_class.model_type == own_class.model_type
    assert config_class.num_condition_tokens == model_class.num_condition_tokens
    saved = own_class(num_image_tokens=64, hidden_size=96, num_attention_heads=2).to_dict()
    read = config_class(**saved).to_dict()
    fields = {**inspect.get_annotations(config_class), **inspect.get_annotations(config_class.__mro__[1])}
    fields = {name for name in fields if not name.startswith("guidance_")} - {"num_condition_tokens"}
    assert len(fields) >= 9
    assert {name: read[name] for name in fields} == {name: saved[name] for name in fields}


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("ar", {"guidance_scale": 2.0}),
        ("ar", {"guidance_scale": 2.0, "guidance_interval": 5}),
        ("ar", {"guidance_scale": 2.0, "guidance_interval": 1000}),
        ("rar", {"guidance_scale": 4.0}),
        ("rar", {"guidance_scale": 4.0, "guidance_scale_pow": 2.75, "guidance_interval": 30}),
        ("rar", {"guidance_scale": 4.0, "guidance_scale_pow": 0.0}),
    ],
)
def test_guidance_is_that_of_generate(configurations, kind, guidance):
    config = configurations[kind](num_image_tokens=64, **guidance)
    first = config.num_condition_tokens - 1
    assert len(config.guidance_scales) == config.max_position_embeddings
    expected = MODELS[kind][1].sampling_settings(**guidance).guidance_scales(64)
    assert config.guidance_scales[first:-1] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("width", "padded"), [(48, 64), (60, 64), (64, 64), (88, 96), (100, 112), (128, 128)])
def test_heads_are_padded_to_the_next_kernel(configurations, width, padded):
    config = configurations["ar"](hidden_size=2 * width, num_attention_heads=2)
    assert (config.head_width, config.head_dim) == (width, padded)


def test_vocabulary_ends_with_the_null_class(configurations):
    assert configurations["ar"](codebook_size=1024, num_classes=14).vocab_size == 1024 + 15
