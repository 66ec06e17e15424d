"""Versions, device and checkpoint, for `vfmtok info` and bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import MODEL_MAPPING, AutoConfig
from transformers.utils.hub import has_file

from vfmtok_hf.cpu.precision import MANY_ROWS, is_bfloat16_faster
from vfmtok_hf.hub_kernels import kernel_facts
from vfmtok_hf.pipelines.component_vfmtok import AUTOENCODERS, MODEL_TYPES
from vfmtok_hf.pipelines.portable_vfmtok import saved_components


PACKAGES = (
    "vfmtok-hf", "torch", "torchvision", "transformers", "diffusers", "timm", "accelerate", "kernels", "safetensors",
)  # fmt: skip


def default_device() -> torch.device:
    """The accelerator if available, otherwise the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def environment_facts() -> dict[str, str]:
    """Versions of the libraries, the default device, and its implementation of deformable attention."""
    device = default_device()
    facts = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type == "cpu":
        facts["fastest dtype"] = fastest_dtypes()
    return facts | kernel_facts(device)


def fastest_dtypes() -> str:
    """The `--dtype` that this CPU computes fastest, by kind of work."""
    rows = {"to generate one image": 1, "to generate 8 images": 8, "to encode, decode and train": MANY_ROWS}
    chosen = {work: "bfloat16" if is_bfloat16_faster(count) else "float32" for work, count in rows.items()}
    return ", ".join(f"{dtype} {work}" for work, dtype in chosen.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def checkpoint_facts(name_or_path: str) -> dict[str, str]:
    """
    What a folder or repository of a model or a pipeline holds, from its configurations alone.

    Raises:
        OSError: there is none.
    """
    facts = {"path": str(name_or_path)}
    if has_file(name_or_path, "config.json"):  # the root of a pipeline has none
        facts |= model_facts(AutoConfig.from_pretrained(name_or_path))
    else:
        for name, model_class in saved_components(DiffusionPipeline.load_config(name_or_path)).items():
            if model_class in MODEL_TYPES and name != "guidance_transformer":
                facts |= model_facts(AutoConfig.from_pretrained(name_or_path, subfolder=name))
    if Path(name_or_path).is_dir():
        size = sum(file.stat().st_size for file in Path(name_or_path).rglob("*") if file.is_file())
        facts["size on disk"] = f"{size / 1e6:.1f} MB"
    return facts


def model_facts(config: Any) -> dict[str, str]:
    """The facts in a model's configuration, for display."""
    if config.model_type not in AUTOENCODERS:
        model_class: Any = MODEL_MAPPING[type(config)]
        depth = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
        if config.model_type == "vfmtok_dit":
            depth += f" and {config.head_num_hidden_layers} of width {config.head_hidden_size}"
        return {"generator": f"{model_class.__name__}, {depth}", "classes": str(config.num_classes)}
    facts = {"images": f"{config.image_size} x {config.image_size} pixels"}
    if config.model_type == "vfmtok":
        codebook = f"codebook of {config.codebook_size} x {config.codebook_dim}"
        facts["image tokens"] = f"{config.num_anchors} per image, {codebook}"
    else:
        facts["latents"] = f"{' x '.join(map(str, config.latent_shape))} continuous values per image"
    in_checkpoint = "" if config.save_vision_model else " (not in the checkpoint)"
    return {**facts, "vision model": config.vision_config.model_type + in_checkpoint}
