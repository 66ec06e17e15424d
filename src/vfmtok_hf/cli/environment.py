"""What is installed, what it runs on, and what a checkpoint is: facts for people and for bug reports."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from transformers import AutoConfig

from vfmtok_hf.cpu.precision import MANY_ROWS, is_bfloat16_faster
from vfmtok_hf.hub_kernels import kernel_facts


PACKAGES = (
    "vfmtok-hf", "torch", "torchvision", "transformers", "diffusers", "timm", "accelerate", "kernels", "safetensors",
)  # fmt: skip


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def environment_facts() -> dict[str, str]:
    """Versions of what takes part, the device that would be used, and its implementation of deformable attention."""
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
    What a pipeline folder or repository holds, from its configurations alone.

    Raises:
        OSError: there is no pipeline.
    """
    index = DiffusionPipeline.load_config(name_or_path)
    tokenizer = AutoConfig.from_pretrained(name_or_path, subfolder="vq_model")
    generator = AutoConfig.from_pretrained(name_or_path, subfolder="transformer")
    facts = {
        "path": str(name_or_path),
        "images": f"{tokenizer.image_size} x {tokenizer.image_size} pixels",
        "image tokens": f"{tokenizer.num_anchors} per image, codebook of {tokenizer.codebook_size} x {tokenizer.codebook_dim}",
        "vision model": tokenizer.vision_config.model_type
        + ("" if tokenizer.save_vision_model else " (not in the checkpoint)"),
        "generator": f"{index['transformer'][1]}, {generator.num_hidden_layers} layers of width {generator.hidden_size}",
        "classes": str(generator.num_classes),
    }
    if Path(name_or_path).is_dir():
        size = sum(file.stat().st_size for file in Path(name_or_path).rglob("*") if file.is_file())
        facts["size on disk"] = f"{size / 1e6:.1f} MB"
    return facts
