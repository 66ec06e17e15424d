"""
Train a class-conditional generator of image tokens on a folder of images.

    python -m vfmtok_hf.training.train_generator --config configs/emoji/generator.yaml
    accelerate launch -m vfmtok_hf.training.train_generator --config configs/emoji/generator.yaml --generator rar
    python -m vfmtok_hf.training.train_generator --config configs/emoji/generator.yaml --resume true

The images are turned into tokens once, with `variants` augmentations each, by a trained tokenizer. The run's folder
receives `model/` (averaged weights, for `from_pretrained`), `tokens/`, `checkpoints/`, `log.jsonl`, `arguments.yaml`
and pictures of samples, one row per class.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from vfmtok_hf.modeling.configuration_vfmtok_ar import VFMTokARConfig
from vfmtok_hf.modeling.configuration_vfmtok_rar import VFMTokRARConfig
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.training.arguments import parse_arguments
from vfmtok_hf.training.data import EpochSampler, ImageFolder
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.run import (
    Progress,
    StopRequest,
    WindowMeans,
    check_finite,
    configure_logging,
    learning_rate_at,
    open_output,
    save_checkpoint,
    save_grid,
    save_model,
    set_learning_rate,
    start_accelerator,
    start_run,
    training_batches,
)
from vfmtok_hf.training.tokens import TokenDataset, load_or_extract_tokens


GENERATORS = {
    "ar": (VFMTokARConfig, VFMTokARForImageGeneration),
    "rar": (VFMTokRARConfig, VFMTokRARForImageGeneration),
}


@dataclass
class GeneratorArguments:
    # Data
    tokenizer: str  # folder or repository of a trained VFMTokModel
    train_data: str  # folder with one folder of images per class
    validation_data: str  # the same, never trained on
    output: str  # folder of the run
    class_names: str | None = None  # JSON file with "id2label"; None: the names of the folders
    variants: int = 4  # augmentations of each training image
    neighbours: int = 1  # token sequences of each: 2 adds its second-nearest codebook rows (VFMTok-RAR)
    crop_scale: list[float] = field(default_factory=lambda: [0.8, 1.0])  # side of random crops / shorter image side
    horizontal_flip: bool = True
    balance_power: float = 0.0  # classes are drawn with weight n ** (1 - balance_power)
    # Model
    generator: Literal["ar", "rar"] = "ar"
    init_from: str | None = None  # a generator to continue from; None: random weights
    model: dict[str, Any] = field(
        default_factory=dict
    )  # config fields; sizes of tokens and classes come from the data
    rar_random_until: float = 0.5  # share of the run with random orders only (RAR)
    rar_raster_from: float = 0.75  # share of the run after which the order is raster only; linear in between
    # Optimizer
    max_steps: int = 10_000
    batch_size: int = 64  # per process
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "constant"
    final_learning_rate: float = 0.01  # of a cosine schedule, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05  # of matrices and embeddings; vectors have none
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.9999
    # Sample pictures
    samples_per_class: int = 4
    temperature: float = 1.0
    top_k: int = 0
    # System
    attention: Literal["sdpa", "eager"] = "sdpa"  # on CPUs "eager" is several times faster in bf16
    mixed_precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    seed: int = 0
    log_every: int = 20
    tracker: list[str] = field(default_factory=list)  # beside log.jsonl: tensorboard, trackio, wandb
    validate_every: int = 500
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = False


def build_generator(arguments: GeneratorArguments, tokenizer: VFMTokModel, labels: list[str]) -> nn.Module:
    """A generator for the tokenizer's tokens and the data's classes.

    Raises:
        ValueError: `init_from` is for other tokens or another number of classes.
    """
    config_class, model_class = GENERATORS[arguments.generator]
    sizes = {
        "codebook_size": tokenizer.config.codebook_size,
        "num_image_tokens": tokenizer.config.num_anchors,
        "num_classes": len(labels),
    }
    if arguments.init_from is None:
        return model_class(config_class(**arguments.model, **sizes, id2label=dict(enumerate(labels))))
    model = model_class.from_pretrained(arguments.init_from)
    for name, size in sizes.items():
        if getattr(model.config, name) != size:
            raise ValueError(f"{arguments.init_from} has {name} {getattr(model.config, name)}, the data needs {size}.")
    return model


def read_class_names(file: str | None, folders: list[str]) -> list[str]:
    """Names of the classes in the order of their folders."""
    if file is None:
        return folders
    names = json.loads(Path(file).read_text())["id2label"]
    if sorted(map(int, names)) != list(range(len(folders))):
        raise ValueError(f"{file} names {len(names)} classes, the training data has {len(folders)}: {folders}.")
    return [names[str(number)] for number in range(len(folders))]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and embeddings only, as in the original's `creat_optimizer`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def random_ratio_at(step: int, arguments: GeneratorArguments) -> float:
    """Probability of a random order in RAR's annealing: 1, then linear to 0, then 0."""
    start, end = (share * arguments.max_steps for share in (arguments.rar_random_until, arguments.rar_raster_from))
    return min(max((end - step) / max(end - start, 1), 0.0), 1.0)


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader) -> dict[str, float]:
    """Mean cross-entropy of unseen images' tokens in nats, in raster order."""
    model.eval()
    total, count = 0.0, 0
    for batch in loader:
        labels, tokens = batch["label"].to(model.device), batch["image_tokens"].to(model.device)
        total += model(class_labels=labels, image_tokens=tokens, return_loss=True).loss.item() * len(labels)
        count += len(labels)
    model.train()
    return {"loss": total / count}


@torch.no_grad()
def draw_samples(model: nn.Module, tokenizer: VFMTokModel, arguments: GeneratorArguments) -> torch.Tensor:
    """Images `(num_classes * samples_per_class, 3, height, width)`, the same random numbers at every call."""
    model.eval()
    labels = torch.arange(model.config.num_classes, device=model.device)
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    tokens = model.generate(
        labels.repeat_interleave(arguments.samples_per_class),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        generator=generator,
    )
    model.train()
    return torch.cat([tokenizer.decode(image_tokens=part).reconstruction for part in tokens.split(32)])


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(GeneratorArguments, sys.argv[1:] if argv is None else argv)
    configure_logging()
    output = Path(arguments.output)
    checkpoint = open_output(output, arguments)
    accelerator = start_accelerator(arguments, output)

    # Data: images become tokens once
    tokenizer = VFMTokModel.from_pretrained(arguments.tokenizer).to(accelerator.device).eval()
    image_size = tokenizer.config.image_size
    train_images = ImageFolder(
        arguments.train_data,
        image_size,
        crop_scale=(arguments.crop_scale[0], arguments.crop_scale[1]),
        horizontal_flip=arguments.horizontal_flip,
        seed=arguments.seed,
    )
    validation_images = ImageFolder(arguments.validation_data, image_size)
    if validation_images.class_names != train_images.class_names:
        raise ValueError(f"{arguments.validation_data} and {arguments.train_data} must hold the same class folders.")
    with accelerator.main_process_first():
        train_tokens = load_or_extract_tokens(
            output / "tokens" / "train.safetensors", tokenizer, train_images, arguments.variants, arguments.neighbours
        )
        validation_tokens = load_or_extract_tokens(
            output / "tokens" / "validation.safetensors", tokenizer, validation_images, variants=1
        )
    train_data = TokenDataset(train_tokens, train_images.labels, arguments.seed)
    train_loader = DataLoader(
        train_data,
        batch_size=arguments.batch_size,
        sampler=EpochSampler(train_data.labels, arguments.balance_power, arguments.seed),
        drop_last=True,
        # Starting an epoch draws from it: from the global generator a resumed run would draw once more.
        generator=torch.Generator(),
    )
    if len(train_loader) == 0:
        raise ValueError(f"{arguments.train_data} has fewer images than one batch of {arguments.batch_size}.")
    validation_loader = DataLoader(TokenDataset(validation_tokens, validation_images.labels), arguments.batch_size)

    # Model and optimizer
    labels = read_class_names(arguments.class_names, train_images.class_names)
    model = build_generator(arguments, tokenizer, labels).to(accelerator.device).train()
    model.set_attn_implementation(arguments.attention)
    betas = (arguments.beta1, arguments.beta2)
    groups = parameter_groups(model, arguments.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, fused=True)
    ema = EMA(model, arguments.ema_decay)
    progress = Progress()
    step_function = torch.compile(model) if arguments.compile else model
    step_function, optimizer, train_loader = accelerator.prepare(step_function, optimizer, train_loader)
    accelerator.register_for_checkpointing(progress, ema)
    log = start_run(accelerator, output, checkpoint, arguments, progress)

    # Loop
    stop = StopRequest(accelerator)
    window = WindowMeans(accelerator)
    batches = training_batches(accelerator, train_loader, train_data, progress)
    while progress.step < arguments.max_steps and not stop:
        step = progress.step
        learning_rate = learning_rate_at(
            step,
            arguments.learning_rate,
            arguments.warmup_steps,
            arguments.max_steps,
            arguments.schedule,
            arguments.final_learning_rate,
        )
        set_learning_rate(optimizer, learning_rate)
        batch = next(batches)
        order = {"random_ratio": random_ratio_at(step, arguments)} if arguments.generator == "rar" else {}
        loss = step_function(
            class_labels=batch["label"], image_tokens=batch["image_tokens"], return_loss=True, **order
        ).loss
        accelerator.backward(loss)
        norms = {"gradient_norm": accelerator.clip_grad_norm_(model.parameters(), arguments.max_gradient_norm)}
        check_finite(
            accelerator, step, {"loss": loss}, norms, lambda index: train_images.files[index].name, batch["index"]
        )
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        progress.step += 1
        stop.agree()

        # Log, validate, draw, save
        window.add({"loss": loss}, len(batch["label"]) * accelerator.num_processes)
        done = progress.step == arguments.max_steps
        if progress.step % arguments.log_every == 0 or done:
            log.write("train", progress.step, {**window.take(), "lr": learning_rate})
        if progress.step % arguments.validate_every == 0 or done:
            with ema.applied():
                metrics = validate(model, validation_loader)
                if accelerator.is_main_process:
                    log.write("validation", progress.step, metrics)
                    save_model(model, output / "model")
            window.restart()
        if (progress.step % arguments.sample_every == 0 or done) and accelerator.is_main_process:
            with ema.applied():
                samples = draw_samples(model, tokenizer, arguments)
            picture = output / "samples" / f"step_{progress.step:08d}.png"
            save_grid(samples, picture, columns=arguments.samples_per_class)
            window.restart()
        if progress.step % arguments.checkpoint_every == 0 or done or stop:
            save_checkpoint(accelerator, output, progress.step, arguments.keep_checkpoints)
    if stop:
        log.write("stopped", progress.step, {})
    accelerator.end_training()


if __name__ == "__main__":
    main()
