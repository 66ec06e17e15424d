"""
Plan the ImageNet trainings of the paper: the tables of docs/scaling.md, from counted FLOPs and bytes.

    python benchmarks/plan_training.py --gpus 8 --tflops 989 --utilization 0.35

Nothing is computed: tensors have shapes but no values. torch's `FlopCounterMode` counts matrix multiplications, attention and
convolutions, forward and backward, but not the sampling of deformable attention. Activations are the bytes that the forward
pass keeps for the backward pass per additional image, under autocast to bfloat16.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from measuring import flop_counter
from random_models import MODEL_CLASSES, generator_config, tokenizer_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vfmtok_hf import VFMTokModel


IMAGENET_IMAGES = 1_281_167
# Weight, gradient, two moments of Adam and the moving average, all float32; frozen weights are kept once.
BYTES_PER_TRAINED, BYTES_PER_FROZEN = 4 + 4 + 8 + 4, 4
GIB = 2**30


@dataclass
class Cost:
    """FLOPs (forward and backward) and bytes of activations per image, and the parameters of the model."""

    flops: float
    activation_bytes: int
    trained: int
    frozen: int


@dataclass
class Recipe:
    """A training of the paper's authors; each image gives `sequences` token sequences."""

    name: str
    steps: int
    batch_size: int
    sequences: int = 1


AR_EPOCHS = {"B": 300, "L": 300, "XL": 300, "XXL": 200, "2B": 200, "3B": 200}


def measure(build: Callable[[], nn.Module], loss_of: Callable[[nn.Module, int], torch.Tensor]) -> Cost:
    """Count steps with one and with two images. Their difference excludes what a step keeps only once."""
    with torch.device("meta"):
        model = build().train()
    # Labels and tokens without values cannot be checked.
    with FakeTensorMode(allow_non_fake_inputs=True), patch("vfmtok_hf.modeling.generation_vfmtok.check_ids"):
        model.to_empty(device="cpu")
        flops, kept = zip(*(count_step(model, loss_of, images) for images in (1, 2)), strict=True)
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return Cost(flops[1] - flops[0], kept[1] - kept[0], counts[True], counts[False])


def count_step(model: nn.Module, loss_of: Callable[[nn.Module, int], torch.Tensor], images: int) -> tuple[int, int]:
    """FLOPs of a step, and bytes that its forward pass keeps."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with flop_counter() as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = loss_of(model, images)
        loss.backward()
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())


def tokenizer_cost() -> Cost:
    """DINOv2-L at 336 pixels, image and feature branch. Without LPIPS and discriminator."""

    def loss_of(model: nn.Module, images: int) -> torch.Tensor:
        out = model(torch.empty(images, 3, 336, 336), return_loss=True)
        return out.loss + out.reconstruction.square().mean()

    return measure(lambda: VFMTokModel(tokenizer_config()), loss_of)


def generator_cost(name: str) -> Cost:
    def loss_of(model: nn.Module, images: int) -> torch.Tensor:
        labels, tokens = torch.zeros(images, dtype=torch.int64), torch.zeros(images, 256, dtype=torch.int64)
        return model(class_labels=labels, image_tokens=tokens, return_loss=True).loss

    config = generator_config(name)
    return measure(lambda: MODEL_CLASSES[type(config)](config), loss_of)


def recipes() -> list[tuple[Recipe, Cost]]:
    steps_of_epoch = IMAGENET_IMAGES / 256
    planned = [(Recipe("tokenizer", round(50 * steps_of_epoch), 256), tokenizer_cost())]
    for size, epochs in AR_EPOCHS.items():
        steps = round(epochs * IMAGENET_IMAGES / 512)
        planned.append((Recipe(f"AR-{size}", steps, 512), generator_cost(f"AR-{size}")))
    for size in ("L", "XL", "XXL"):
        planned.append((Recipe(f"RAR-{size}", 250_000, 2048, sequences=2), generator_cost(f"RAR-{size}")))
    return planned


def table(gpus: int, tflops: float, utilization: float, memory: float) -> str:
    """Markdown: one line for each training."""
    lines = [
        "| training | parameters, trained + frozen | steps x images | TFLOP per image | hours | GiB per GPU: state"
        " | state, split | GiB per image | images at once |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, cost in recipes():
        flops = cost.flops * recipe.sequences
        hours = recipe.steps * recipe.batch_size * flops / (gpus * tflops * 1e12 * utilization) / 3600
        state = (cost.trained * BYTES_PER_TRAINED + cost.frozen * BYTES_PER_FROZEN) / GIB
        split = "" if recipe.name == "tokenizer" else f"{state / gpus:.1f}"  # which trains whole
        image = cost.activation_bytes * recipe.sequences / GIB
        fitting = int((0.9 * memory - state) / image)
        frozen = f" + {cost.frozen / 1e6:,.0f} M" if cost.frozen else ""
        lines.append(
            f"| {recipe.name} | {cost.trained / 1e6:,.0f} M{frozen} | {recipe.steps:,} x {recipe.batch_size} "
            f"| {flops / 1e12:.2f} | {hours:,.0f} | {state:.1f} | {split} | {image:.2f} | {max(fitting, 0)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=989, help="dense bfloat16 peak of one GPU; H100 SXM: 989")
    parser.add_argument("--utilization", type=float, default=0.35, help="share of the peak that is reached")
    parser.add_argument("--memory", type=float, default=80, help="GiB of one GPU")
    options = parser.parse_args()
    print(table(options.gpus, options.tflops, options.utilization, options.memory))


if __name__ == "__main__":
    main()
