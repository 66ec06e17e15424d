"""
Compare training steps of the original with ours: time and peak memory.

    python benchmarks/training_step.py

`original_training.py` describes the original's steps. Ours call the same functions as the trainers. All weights are random: the
released tokenizer with DINOv2-L, AR-B, a RAR of AR-B's width and depth, VGG-16, LPIPS's channel weights and the discriminator's
vision model. The original's generators encode their images in every step; its RAR also uses the second-nearest tokens of each
image as a second sequence. Ours read tokens that were computed once (`--num_crops`, `--codebook_top_k`). The row `tokens at
hand` excludes the encoding.

Each side runs in its own process; ours keeps freed memory, as the trainers do. Peak memory is that of the whole process, on
CUDA that of the tensors. Ours uses the trainers' defaults with the original's loss weights. `--compile` adds a side with
torch.compile, which takes minutes. bfloat16 steps run under autocast, by default only if the machine supports bfloat16 in
hardware.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measuring import SideProcess, add_machine_options, alternate, machine, name_of, usable_dtypes
from original_training import (
    OriginalARStep,
    OriginalLPIPS,
    OriginalRARStep,
    OriginalTokenizerStep,
    nearest_two_tokens,
)
from random_models import MODEL_CLASSES, GeneratorConfig, generator_config, random_tokenizer, tokenizer_config
from result_tables import show_table
from torch import nn
from torchvision.models import vgg16
from transformers import ViTConfig, ViTModel

from vfmtok_hf import VFMTokConfig, VFMTokRARConfig
from vfmtok_hf.cpu.packing import keep_freed_memory
from vfmtok_hf.data.image_distances import LPIPS
from vfmtok_hf.training.arguments import TokenizerArguments
from vfmtok_hf.training.codebook import CodebookUsage
from vfmtok_hf.training.discriminator import DinoDiscriminator, DiscriminatorObjective
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.objective import TokenizerObjective
from vfmtok_hf.training.precision import choose_attention
from vfmtok_hf.training.tokenizer_training import set_up_layers


Step = Callable[[], None]
# The original's, for what `TokenizerObjective` weighs.
WEIGHTS = {"l1": 0, "mse": 2, "lpips": 1, "perceptual": 0}
SIDES = {
    "tokenizer": ("straightforward", "ours"),
    "AR-B": ("straightforward", "straightforward, tokens at hand", "ours"),
    "RAR-B": ("straightforward", "straightforward, tokens at hand", "ours"),
}
BATCH_SIZES = {"tokenizer": 1, "AR-B": 4, "RAR-B": 4}
COMPILED = "ours, compiled"


class RandomNetwork(nn.Module):
    """The VGG-16 network of the `lpips` package with random weights. It needs neither the package nor a file."""

    # Where a stage ends in torchvision's list of layers: before the pooling.
    ENDS = (4, 9, 16, 23, 30)
    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, dropout: float):
        super().__init__()
        self.layers = vgg16().features[: self.ENDS[-1]]
        self.lins = nn.ModuleList(
            nn.Sequential(nn.Dropout(dropout), nn.Conv2d(channels, 1, 1, bias=False)) for channels in self.CHANNELS
        )
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def scaling_layer(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.shift) / self.scale

    def net(self, images: torch.Tensor) -> list[torch.Tensor]:
        stages = []
        for number, layer in enumerate(self.layers, start=1):
            images = layer(images)
            if number in self.ENDS:
                stages.append(images)
        return stages


class RandomLPIPS(LPIPS):
    """The operations of LPIPS on random weights, for timing."""

    def __init__(self, dropout: float):
        nn.Module.__init__(self)
        self.network = RandomNetwork(dropout).requires_grad_(False)


def random_discriminator(vision_config: ViTConfig) -> DiscriminatorObjective:
    vision_model = ViTModel(vision_config, add_pooling_layer=False)
    return DiscriminatorObjective(DinoDiscriminator(vision_model)).train()


def our_step(
    model: nn.Module, loss_of: Callable[[], torch.Tensor], autocast: bool, weight_decay: float, average: bool
) -> Step:
    """The part of the trainers' loops after the loss."""
    device = next(model.parameters()).device.type
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    ema = EMA(model, 0.9999) if average else None

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update()

    return step


def random_images(batch_size: int, config: VFMTokConfig, device: str) -> torch.Tensor:
    return torch.randn(batch_size, 3, config.image_size, config.image_size, device=device).clamp(-1, 1)


def tokenizer_step(
    side: str, autocast: bool, batch_size: int, config: VFMTokConfig, judge_config: ViTConfig, device: str
) -> Step:
    model = random_tokenizer(config, device).train()
    images = random_images(batch_size, config, device)
    if side == "straightforward":
        judge = random_discriminator(judge_config).to(device)
        lpips = OriginalLPIPS(RandomLPIPS(dropout=0.5)).to(device)
        return partial(OriginalTokenizerStep(model, lpips, judge, autocast), images)
    objective = TokenizerObjective(model, WEIGHTS, lpips=RandomLPIPS(dropout=0.0).to(device)).train()
    precision = "bf16" if autocast else "no"
    arguments = TokenizerArguments(train_data="", output="", mixed_precision=precision, compile=side == COMPILED)
    set_up_layers(objective, arguments, model.device)
    run = torch.compile(objective) if side == COMPILED else objective
    usage = CodebookUsage(config.codebook_size, device)

    def loss_of() -> torch.Tensor:
        out = run(images)
        usage.update(out["image_tokens"])
        return out["loss"]

    return our_step(model, loss_of, autocast, weight_decay=0.0, average=True)


def generator_step(
    side: str, autocast: bool, batch_size: int, config: GeneratorConfig, tokenizer: VFMTokConfig, device: str
) -> Step:
    is_rar = isinstance(config, VFMTokRARConfig)
    with torch.device(device):
        model = MODEL_CLASSES[type(config)](config).train()
        labels = torch.randint(config.num_classes, (batch_size,))
        tokens = torch.randint(config.codebook_size, (batch_size, config.num_image_tokens))
    order = {"random_ratio": 1.0} if is_rar else {}
    precision = "bf16" if autocast else "no"
    if side.startswith("ours"):
        run = torch.compile(model) if side == COMPILED else model
        model.set_attn_implementation(choose_attention("auto", model.device, precision, config.attention_dropout))
        return our_step(
            model,
            lambda: run(labels, tokens, return_loss=True, **order).loss,
            autocast,
            weight_decay=0.05,
            average=not is_rar,  # as the original, which averages the one and not the other
        )
    step = OriginalRARStep(model, autocast) if is_rar else OriginalARStep(model, autocast)
    if side.endswith("tokens at hand"):
        return partial(step, labels, tokens)
    encoder = random_tokenizer(tokenizer, device)
    # RAR gets two sequences of each image.
    images = random_images(batch_size // 2 if is_rar else batch_size, tokenizer, device)

    def encode_and_step() -> None:
        with torch.no_grad():
            image_tokens = nearest_two_tokens(encoder, images) if is_rar else encoder.encode(images).image_tokens
        step(labels, image_tokens)

    return encode_and_step


def build_step(
    name: str, side: str, dtype: torch.dtype, batch_size: int, threads: int, device: str = "cpu", tiny: bool = False
) -> Step:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if side.startswith("ours") and device == "cpu":
        keep_freed_memory()
    autocast, tokenizer = dtype is torch.bfloat16, tokenizer_config(tiny)
    if name == "tokenizer":
        # ViT-S/16 of DINO
        judge_config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        return tokenizer_step(side, autocast, batch_size, tokenizer, judge_config, device)
    return generator_step(side, autocast, batch_size, generator_config(name, tiny), tokenizer, device)


def measure(name: str, dtype: torch.dtype, batch_size: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row per side, for the model `name`."""
    build = partial(build_step, name)
    inputs = (dtype, batch_size, arguments.threads, arguments.device, arguments.tiny)
    names = [*SIDES[name], *([COMPILED] if arguments.compile else [])]
    names = [side for side in names if side == "straightforward" or side in (arguments.only or names)]
    sides = {side: SideProcess(build, side, *inputs, device=arguments.device) for side in names}
    seconds = alternate(sides, arguments.runs)
    peaks = {side: process.close() for side, process in sides.items()}
    return [
        {
            "model": name,
            "dtype": name_of(dtype),
            "threads": arguments.threads,
            "batch": batch_size,
            "side": side,
            "seconds per step": f"{time:.3f}" if arguments.device == "cuda" else f"{time:.2f}",
            "peak GB": f"{peaks[side] / 1e9:.2f}",
            "times straightforward": f"{seconds['straightforward'] / time:.2f}",
        }
        for side, time in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--models", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument(
        "--dtypes", choices=["float32", "bfloat16"], nargs="+", help="default: those that the machine supports"
    )
    parser.add_argument(
        "--batch-size", type=int, help="default: 1 for the tokenizer, 4 sequences for the generators; even for RAR"
    )
    parser.add_argument("--compile", action="store_true", help="also measure the trainers with --compile true")
    parser.add_argument("--only", nargs="+", help="sides to measure besides the straightforward one")
    add_machine_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(arguments.device))
    named = [getattr(torch, name) for name in arguments.dtypes or ()]
    for name in arguments.models:
        for dtype in named or usable_dtypes(arguments.device):
            table = measure(name, dtype, arguments.batch_size or BATCH_SIZES[name], arguments)
            show_table("training_step", table)


if __name__ == "__main__":
    main()
