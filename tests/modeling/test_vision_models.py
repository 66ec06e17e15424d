"""Every supported family of vision models, as a tiny randomly initialized model of its real class."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipVisionConfig,
    TimmBackboneConfig,
    TimmWrapperConfig,
)

from tests.testing import tiny_images, tiny_model
from vfmtok_hf import VFMTokModel


# Written out: what the families were trained with.
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "intermediate_size": 32,
}
# family -> (config, attribute path of the final norm, prefix tokens, mean and std)
TRANSFORMERS = {
    "dinov2": (Dinov2Config(**SIZES), "layernorm", 1, IMAGENET_MEAN_STD),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4),
        "layernorm",
        5,
        IMAGENET_MEAN_STD,
    ),
    "dinov3_vit": (DINOv3ViTConfig(**SIZES, num_register_tokens=4), "norm", 5, IMAGENET_MEAN_STD),
    "clip": (CLIPVisionConfig(**SIZES), "post_layernorm", 1, OPENAI_CLIP_MEAN_STD),
    "siglip": (SiglipVisionConfig(**SIZES), "post_layernorm", 0, HALF_MEAN_STD),
}
TIMM_VIT = TimmWrapperConfig(
    architecture="vit_tiny_patch16_224",
    model_args={"depth": 3, "embed_dim": 16, "num_heads": 2, "patch_size": 8, "img_size": 32},
)
TIMM_HIERARCHICAL = TimmWrapperConfig(
    architecture="convnext_atto", model_args={"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}
)
TIMM_CONV = TimmWrapperConfig(
    architecture="efficientnet_lite0", pretrained_cfg={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
)


def randomized_norms(model: VFMTokModel) -> VFMTokModel:
    """Fresh norms are all alike, so that taking the wrong one would go unnoticed."""
    with torch.no_grad():
        for module in model.vision_model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.uniform_(0.5, 1.5)
    return model


def token_states(vision_model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What goes into the first block, and what comes out of each: not every version's output holds them."""
    states = []
    blocks = [module for module in vision_model.modules() if type(module).__name__.endswith("Layer")]
    blocks[0].register_forward_pre_hook(lambda block, inputs: states.append(inputs[0]))
    for block in blocks:
        block.register_forward_hook(
            lambda block, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
    vision_model(images)
    return states


def assert_whole_model_works(model: VFMTokModel, tmp_path):
    images = tiny_images()
    out = model(images, return_loss=True)
    assert out.reconstruction.shape == (2, 3, 32, 32)
    assert out.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = VFMTokModel.from_pretrained(tmp_path).eval()
    assert not any(parameter.requires_grad for parameter in loaded.vision_model.parameters())
    assert torch.equal(loaded.encode(images).latents, model.encode(images).latents)


@pytest.mark.parametrize("family", TRANSFORMERS)
@torch.no_grad()
def test_transformers_levels(family):
    config, final_norm, num_prefix_tokens, (mean, std) = TRANSFORMERS[family]
    model = randomized_norms(tiny_model(vision_config=config))
    assert (model.config.vision_image_mean, model.config.vision_image_std) == (list(mean), list(std))

    images = tiny_images()
    features = model.extract_vision_features(images)
    normalized = ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    states = token_states(model.vision_model, normalized)
    assert len(states) == 4
    assert states[1].shape[1] == num_prefix_tokens + 16
    expected = [states[1], states[2], model.vision_model.get_submodule(final_norm)(states[3])]
    for level, tokens in zip(features, expected, strict=True):
        assert level.shape == (2, 16, 4, 4)
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), tokens[:, num_prefix_tokens:])


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_whole_model(family, tmp_path):
    assert_whole_model_works(tiny_model(vision_config=TRANSFORMERS[family][0]), tmp_path)


@pytest.mark.parametrize("family", TRANSFORMERS)
@torch.no_grad()
def test_other_input_size_than_the_vision_model_was_trained_at(family):
    model = tiny_model(vision_config=TRANSFORMERS[family][0], vision_image_size=48)
    assert [tuple(level.shape) for level in model.extract_vision_features(tiny_images())] == [(2, 16, 6, 6)] * 3
    assert model.config.feature_grid_size == 6


@torch.no_grad()
def test_timm_backbone_gives_the_feature_grid():
    config = TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3], use_pretrained_backbone=False)
    model = tiny_model(vision_config=config, vision_image_size=96)
    assert model.extract_vision_features(tiny_images())[-1].shape[-2:] == (6, 6)
    assert model.config.feature_grid_size == 6


@pytest.mark.parametrize("vision_config", [TRANSFORMERS["clip"][0], TIMM_VIT, TIMM_CONV], ids=["clip", "vit", "conv"])
def test_wrong_feature_grids_are_refused(vision_config):
    sizes = {"vision_config": vision_config, "vision_feature_layers": [1, 2]}
    with pytest.raises(ValueError, match=r"feature_grid_size is 5, but .* has [48] positions per side"):
        tiny_model(**sizes, feature_grid_size=5)
    with pytest.raises(ValueError, match="vision_image_size 30 must be a multiple of 8"):
        tiny_model(**sizes, vision_image_size=30)


@torch.no_grad()
def test_a_last_level_before_the_last_block_is_not_normalized():
    config, *_ = TRANSFORMERS["dinov2"]
    model = randomized_norms(tiny_model(vision_config=config, vision_feature_layers=[1, 2]))
    images = tiny_images()
    mean, std = (torch.tensor(constants).view(3, 1, 1) for constants in IMAGENET_MEAN_STD)
    last = model.extract_vision_features(images)[-1]
    states = token_states(model.vision_model, ((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), states[2][:, 1:])


@torch.no_grad()
def test_timm_vit_levels(tmp_path):
    model = randomized_norms(tiny_model(vision_config=TIMM_VIT, vision_feature_layers=[0, 1, 2]))
    images = tiny_images()
    features = model.extract_vision_features(images)
    mean, std = (torch.tensor(constants).view(3, 1, 1) for constants in IMAGENET_MEAN_STD)
    timm_model = model.vision_model.timm_model
    last, states = timm_model.forward_intermediates(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(features[0], states[0])
    torch.testing.assert_close(features[1], states[1])
    torch.testing.assert_close(features[2].flatten(2).transpose(1, 2), last[:, 1:])
    assert_whole_model_works(model, tmp_path)


@torch.no_grad()
def test_timm_convolutional_levels_differ_in_size(tmp_path):
    model = tiny_model(vision_config=TIMM_CONV, vision_feature_layers=[1, 2, 3], vision_image_size=64)
    assert (model.config.vision_image_mean, model.config.vision_image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    features = model.extract_vision_features(tiny_images())
    assert [tuple(level.shape) for level in features] == [(2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4)]
    # What lies behind the last level is neither run nor stored.
    assert len(model.vision_model.timm_model.blocks) == 5
    stored = {name.split(".")[0] for name in model.vision_model.timm_model.state_dict()}
    assert stored == {"conv_stem", "bn1", "blocks"}
    locations = model.encode(tiny_images(), output_sampling_locations=True).sampling_locations[0]
    assert locations.shape[3] == 3
    assert_whole_model_works(model, tmp_path)


@torch.no_grad()
def test_timm_backbone(tmp_path):
    config = TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3], use_pretrained_backbone=False)
    model = tiny_model(vision_config=config, vision_image_size=64)
    assert [level.shape[-1] for level in model.extract_vision_features(tiny_images())] == [16, 8, 4]
    assert_whole_model_works(model, tmp_path)


@pytest.mark.parametrize("saved_pruned", [True, False])
def test_versions_of_timm_may_differ_in_weights_that_nothing_reads(saved_pruned, tmp_path, monkeypatch):
    """As they do in what they prune."""
    settings = {"vision_config": TIMM_HIERARCHICAL, "vision_feature_layers": [0, 1], "vision_image_size": 64}

    def build(pruned, action):
        with monkeypatch.context() as patch:
            if not pruned:
                patch.setattr(ConvNeXt, "prune_intermediate_layers", lambda model, levels: None)
            return action()

    saved = build(saved_pruned, lambda: tiny_model(**settings))
    saved.save_pretrained(tmp_path)
    loaded = build(not saved_pruned, lambda: VFMTokModel.from_pretrained(tmp_path))
    assert saved.vision_model.state_dict().keys() != loaded.vision_model.state_dict().keys()
    images = tiny_images()
    assert torch.equal(loaded.encode(images).image_tokens, saved.encode(images).image_tokens)
    assert not any(parameter.requires_grad for parameter in loaded.vision_model.parameters())

    weights = load_file(tmp_path / "model.safetensors")
    del weights["vision_model.timm_model.stages.1.blocks.0.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks weights: 'vision_model.timm_model.stages.1.blocks.0.norm.weight' \(of 1"
    ):
        build(not saved_pruned, lambda: VFMTokModel.from_pretrained(tmp_path))


def test_two_tower_config_is_refused():
    with pytest.raises(ValueError, match="for a two-tower model .* pass its vision config"):
        tiny_model(vision_config={"model_type": "clip"})


def test_pruned_vision_model_loads_from_its_full_checkpoint(tmp_path):
    full = tiny_model(vision_config=TIMM_CONV, vision_feature_layers=[1, 2, 4], vision_image_size=64)
    full.vision_model.save_pretrained(tmp_path)
    light = tiny_model(
        vision_config=TIMM_CONV, vision_feature_layers=[1, 2, 3], vision_image_size=64, save_vision_model=False
    )
    light.load_vision_model(str(tmp_path))
    images = tiny_images()
    assert torch.equal(light.extract_vision_features(images)[1], full.extract_vision_features(images)[1])
    assert len(light.vision_model.timm_model.blocks) == 5
