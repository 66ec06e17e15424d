"""
Training steps: the original's against ours, time and peak memory.

    python benchmarks/training_step.py

`original_training.py` says what the original's steps compute. Ours are made of what the training scripts call. Random
weights of the released tokenizer with DINOv2-L and of AR-B, and a RAR of AR-B's width and depth; VGG-16 and the
discriminator's vision model have random weights too. The original's generators encode their images anew in every step,
RAR's with the second-nearest tokens of each as a sequence of its own; ours reads tokens that were computed once
(`--variants`, `--neighbours`). The row `tokens at hand` leaves the encoding out.
Each side has a process of its own, in which ours keeps freed memory as the scripts do; peak memory is that of the whole
process. Ours has the scripts' defaults, and the original's weights of the losses. `--compile` adds a side under
torch.compile, which takes minutes.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import SideProcess, alternate, in_fresh_process, machine, memory, show_table
from original_training import (
    OriginalARStep,
    OriginalLPIPS,
    OriginalRARStep,
    OriginalTokenizerStep,
    nearest_two_tokens,
)
from safetensors.torch import save_file
from torchvision.models import vgg16
from transformers import ViTConfig, ViTModel

from vfmtok_hf import (
    VFMTokARConfig,
    VFMTokARForImageGeneration,
    VFMTokConfig,
    VFMTokModel,
    VFMTokRARConfig,
    VFMTokRARForImageGeneration,
)
from vfmtok_hf.cpu.packing import keep_freed_memory
from vfmtok_hf.image_distances import LPIPS
from vfmtok_hf.training.arguments import TokenizerArguments
from vfmtok_hf.training.codebook import CodebookUsage
from vfmtok_hf.training.discriminator import DinoDiscriminator, DiscriminatorObjective
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.objective import TokenizerObjective
from vfmtok_hf.training.precision import choose_attention
from vfmtok_hf.training.train_tokenizer import set_up_layers


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
RAR_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def random_lpips(dropout: float) -> LPIPS:
    """LPIPS on a VGG-16 without training, through the file it is read from."""
    weights = {f"features.{name}": tensor for name, tensor in vgg16().features.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder, "vgg.safetensors"))
        return LPIPS("vgg", str(Path(folder, "vgg.safetensors")), dropout).train()


def random_discriminator(vision_config: ViTConfig) -> DiscriminatorObjective:
    vision_model = ViTModel(vision_config, add_pooling_layer=False)
    return DiscriminatorObjective(DinoDiscriminator(vision_model)).train()


def our_step(
    model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], autocast: bool, weight_decay: float, average: bool
) -> Step:
    """What the loops of the training scripts do with a loss."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    ema = EMA(model, 0.9999) if average else None

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update()

    return step


def tokenizer_step(side: str, autocast: bool, batch_size: int, config: VFMTokConfig, judge_config: ViTConfig) -> Step:
    model = VFMTokModel(config).train()
    images = torch.randn(batch_size, 3, config.image_size, config.image_size).clamp(-1, 1)
    if side == "straightforward":
        judge = random_discriminator(judge_config)
        lpips = OriginalLPIPS(random_lpips(dropout=0.5))
        return partial(OriginalTokenizerStep(model, lpips, judge, autocast), images)
    objective = TokenizerObjective(model, WEIGHTS, lpips=random_lpips(dropout=0.0)).train()
    precision = "bf16" if autocast else "no"
    arguments = TokenizerArguments(train_data="", output="", mixed_precision=precision, compile=side == COMPILED)
    set_up_layers(objective, arguments, model.device)
    run = torch.compile(objective) if side == COMPILED else objective
    usage = CodebookUsage(config.codebook_size)

    def loss_of() -> torch.Tensor:
        out = run(images)
        usage.update(out["image_tokens"])
        return out["loss"]

    return our_step(model, loss_of, autocast, weight_decay=0.0, average=True)


def generator_step(
    side: str, autocast: bool, batch_size: int, config: VFMTokARConfig | VFMTokRARConfig, tokenizer: VFMTokConfig
) -> Step:
    is_rar = isinstance(config, VFMTokRARConfig)
    model = (VFMTokRARForImageGeneration if is_rar else VFMTokARForImageGeneration)(config).train()
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
    encoder = VFMTokModel(tokenizer).eval()
    # RAR gets two sequences of each image.
    num_images = batch_size // 2 if is_rar else batch_size
    images = torch.randn(num_images, 3, tokenizer.image_size, tokenizer.image_size).clamp(-1, 1)

    def encode_and_step() -> None:
        with torch.no_grad():
            image_tokens = nearest_two_tokens(encoder, images) if is_rar else encoder.encode(images).image_tokens
        step(labels, image_tokens)

    return encode_and_step


def build_step(name: str, side: str, autocast: bool, batch_size: int, threads: int) -> Step:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if side.startswith("ours"):
        keep_freed_memory()
    if name == "tokenizer":
        # ViT-S/16 of DINO
        judge_config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        return tokenizer_step(side, autocast, batch_size, VFMTokConfig(), judge_config)
    config = VFMTokARConfig.from_variant("B") if name == "AR-B" else VFMTokRARConfig(**RAR_B)
    return generator_step(side, autocast, batch_size, config, VFMTokConfig())


def measure(name: str, names: Sequence[str], dtype: str, batch_size: int, runs: int) -> list[dict[str, object]]:
    """Rows of the sides `names` of the model `name`."""
    threads = torch.get_num_threads()
    sides = {side: SideProcess(build_step, name, side, dtype == "bfloat16", batch_size, threads) for side in names}
    seconds = alternate(sides, runs)
    for process in sides.values():
        process.close()
    peaks = {side: in_fresh_process(__file__, "--peak-of", name, side, dtype, batch_size, threads) for side in seconds}
    return [
        {
            "model": name,
            "dtype": dtype,
            "threads": threads,
            "batch": batch_size,
            "side": side,
            "seconds per step": f"{time:.2f}",
            "peak GB": f"{peaks[side]['bytes'] / 1e9:.2f}",
            "times straightforward": f"{seconds['straightforward'] / time:.2f}",
        }
        for side, time in seconds.items()
    ]


def print_peak(name: str, side: str, dtype: str, batch_size: str, threads: str) -> None:
    step = build_step(name, side, dtype == "bfloat16", int(batch_size), int(threads))
    for _ in range(2):
        step()
    print(json.dumps({"bytes": memory("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--models", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--batch-size", type=int, help="default: 1 for the tokenizer, 4 sequences for the generators; even for RAR"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="measure the scripts' --compile true as well")
    parser.add_argument("--peak-of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(*arguments.peak_of)
        return
    torch.set_num_threads(arguments.threads)
    print(machine())
    for name in arguments.models:
        for dtype in arguments.dtypes:
            batch_size = arguments.batch_size or BATCH_SIZES[name]
            sides = SIDES[name] + ((COMPILED,) if arguments.compile else ())
            table = measure(name, sides, dtype, batch_size, arguments.runs)
            show_table("training_step", table)


if __name__ == "__main__":
    main()
