"""Models with random weights: at the released sizes or, with `tiny`, at those of the checkpoint in the package."""

from pathlib import Path

import torch

from vfmtok_hf import (
    DEFAULT_CHECKPOINT,
    VFMAEConfig,
    VFMAEModel,
    VFMTokARConfig,
    VFMTokARForImageGeneration,
    VFMTokConfig,
    VFMTokModel,
    VFMTokRARConfig,
    VFMTokRARForImageGeneration,
)


GeneratorConfig = VFMTokARConfig | VFMTokRARConfig
Generator = VFMTokARForImageGeneration | VFMTokRARForImageGeneration
MODEL_CLASSES = {VFMTokARConfig: VFMTokARForImageGeneration, VFMTokRARConfig: VFMTokRARForImageGeneration}
# The paper has no RAR of this size.
RAR_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SIZES = ("codebook_size", "num_classes", "num_image_tokens", "intermediate_size")
SIZES += ("hidden_size", "num_hidden_layers", "num_attention_heads")


def tokenizer_config(tiny: bool = False) -> VFMTokConfig:
    """DINOv2-L at 336 x 336, the released model."""
    if not tiny:
        return VFMTokConfig()
    # The checkpoint has no registers, which the reimplemented original needs.
    config = VFMTokConfig.from_pretrained(Path(DEFAULT_CHECKPOINT, "vq_model"), num_register_tokens=1)
    config.dtype = config.vision_config.dtype = torch.float32
    return config


def vfmae_config(tiny: bool = False) -> VFMAEConfig:
    """DINOv2-L at 224 x 224 and images of 256 x 256, the released model."""
    if not tiny:
        return VFMAEConfig()
    vision_config = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14}
    sizes = {"hidden_size": 64, "encoder_num_layers": 2, "decoder_num_layers": 2, "decoder_intermediate_size": 88}
    layers = {"vision_feature_layers": [1, 2, 3, 4], "pixel_decoder_base_channels": 32}
    return VFMAEConfig(vision_config=vision_config, **sizes, **layers)


def generator_config(name: str, tiny: bool = False) -> GeneratorConfig:
    """`name` as in AR-B or RAR-L; a tiny one has the family of its name."""
    family, variant = name.split("-")
    config_class = {"AR": VFMTokARConfig, "RAR": VFMTokRARConfig}[family]
    if tiny:
        checkpoint = VFMTokRARConfig.from_pretrained(Path(DEFAULT_CHECKPOINT, "transformer"))
        return config_class(**{field: getattr(checkpoint, field) for field in SIZES})
    return config_class(**RAR_B) if name == "RAR-B" else config_class.from_variant(variant)


def random_tokenizer(config: VFMTokConfig | VFMAEConfig, device: str = "cpu") -> VFMTokModel | VFMAEModel:
    torch.manual_seed(0)
    model_class = VFMAEModel if isinstance(config, VFMAEConfig) else VFMTokModel
    with torch.device(device):
        return model_class(config).eval()


def random_generator(config: GeneratorConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Generator:
    """The head is initialized to zeros, which makes all tokens equally likely, so it gets random weights as well."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODEL_CLASSES[type(config)](config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model.to(dtype)
