"""
The public API as a user's typed program sees it: mypy checks this file, nothing runs it.

Library code that leans on transformers' and diffusers' run-time attributes is not checked itself.
"""

from pathlib import Path

import torch
from PIL import Image

from vfmtok_hf import (
    DEFAULT_CHECKPOINT,
    VFMTokARConfig,
    VFMTokARForImageGeneration,
    VFMTokConfig,
    VFMTokImageProcessor,
    VFMTokModel,
    VFMTokPipeline,
    VFMTokRARConfig,
    VFMTokRARForImageGeneration,
    disable_kernels,
    enable_kernels,
)
from vfmtok_hf.conversion import ConversionReport, convert_ar, convert_rar, convert_tokenizer, export_original_ar


def tokenizer(pixel_values: torch.Tensor) -> torch.Tensor | None:
    model = VFMTokModel(VFMTokConfig(image_size=336, num_anchors=256, vision_feature_layers=[6, 12, 18, 24]))
    features: list[torch.Tensor] = model.extract_vision_features(pixel_values)
    latents: torch.Tensor = model.encode_features(features)
    encoded = model.encode(pixel_values, output_sampling_locations=True)
    locations: tuple[torch.Tensor, ...] | None = encoded.sampling_locations
    model.decode(quantized_latents=latents, output_features=locations is not None)
    embeddings: torch.Tensor = model.get_image_features(pixel_values)
    model.load_vision_model("facebook/dinov2-with-registers-large", revision="main")
    enable_kernels(model, mode="inference")
    disable_kernels(model)
    return model.decode(image_tokens=encoded.image_tokens).reconstruction if embeddings.numel() else None


def generators(class_labels: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
    ar = VFMTokARForImageGeneration(VFMTokARConfig.from_variant("B"))
    loss: torch.Tensor | None = ar(class_labels=class_labels, image_tokens=image_tokens, return_loss=True).loss
    assert loss is not None
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(class_labels))]
    tokens: torch.Tensor = ar.generate(class_labels, guidance_scale=1.5, top_k=100, generator=generator)
    rar = VFMTokRARForImageGeneration(VFMTokRARConfig.from_variant("L"))
    return rar.generate(class_labels, guidance_scale=4.0, guidance_scale_pow=2.75, image_tokens=tokens)


def pipeline(image: Image.Image) -> torch.Tensor:
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    ids: list[int] = pipe.get_label_ids(["smiley", 3])
    pipe(ids, num_images_per_label=2, generator=torch.Generator().manual_seed(0), output_type="np")
    tokens: torch.Tensor = pipe.tokenize(image)
    pipe.reconstruct([Path("image.png")])
    pipe.detokenize(tokens, output_type="pil")
    return tokens


def processor(image: Image.Image) -> torch.Tensor:
    image_processor = VFMTokImageProcessor(size={"height": 64, "width": 64})
    return image_processor(image, return_tensors="pt")["pixel_values"]


def conversion(checkpoint: Path, output: Path) -> dict[str, torch.Tensor]:
    report: ConversionReport = convert_tokenizer(checkpoint, output, weights="ema", dry_run=True)
    convert_ar(checkpoint, output, weights="model")
    convert_rar(checkpoint, report.output or output)
    return export_original_ar(VFMTokARForImageGeneration.from_pretrained(output))
