"""
Train a class-conditional generator of image tokens, from nothing or from a trained one.

    python -m vfmtok_hf.training.train_generator --config configs/emoji/generator.yaml
    accelerate launch -m vfmtok_hf.training.train_generator --config configs/emoji/generator.yaml --generator rar
    python -m vfmtok_hf.training.train_generator --config configs/emoji/generator.yaml --resume true

The data are images, which become tokens once (`variants` augmentations of each) or anew in every step, or the shards of
`extract_tokens.py`. The run's folder receives `model/` (averaged weights, for `from_pretrained`), `pipeline/`,
`tokens/`, `checkpoints/`, `log.jsonl`, `arguments.yaml` and pictures of samples, one row per class.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from vfmtok_hf.modeling.configuration_vfmtok_ar import VFMTokARConfig
from vfmtok_hf.modeling.configuration_vfmtok_rar import VFMTokRARConfig
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.training.arguments import parse_arguments
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.finetuning import (
    Generator,
    add_lora,
    is_pipeline,
    load_generator,
    load_tokenizer,
    save_adapted,
    save_pipeline,
)
from vfmtok_hf.training.generator_data import open_data, token_batch
from vfmtok_hf.training.image_data import DataArguments, training_loader
from vfmtok_hf.training.run import (
    Progress,
    StopRequest,
    WindowMeans,
    check_finite,
    choose_attention,
    configure_logging,
    learning_rate_at,
    logger,
    open_output,
    save_checkpoint,
    save_grid,
    save_model,
    set_learning_rate,
    start_accelerator,
    start_run,
)
from vfmtok_hf.training.sharding import checkpoint_averages, clip_gradients, gathered, prepare_model, save_together
from vfmtok_hf.training.tokens import TokenShards


GENERATORS = {
    "ar": (VFMTokARConfig, VFMTokARForImageGeneration),
    "rar": (VFMTokRARConfig, VFMTokRARForImageGeneration),
}


# Parameters with these in their names have no weight decay, nor have vectors; the originals' `creat_optimizer`.
WITHOUT_DECAY = {
    "vfmtok_ar": (),
    "vfmtok_rar": ("embed_tokens", "position_embeddings", "timestep_embeddings", "norm_modulation"),
}
# Class embeddings: of an AR, and of a RAR's adapters. Else a RAR has them in one table with the image tokens.
CLASS_TABLES = ("class_embedding", "trainable_tokens_delta")


@dataclass
class GeneratorArguments(DataArguments):
    # Data, beside those that every run has
    tokenizer: str | None = None  # folder or repository of a trained VFMTokModel or pipeline; None: that of init_from
    variants: int = 4  # augmentations of each training image that become tokens once; 0: tokens anew in every step
    neighbours: int = 1  # token sequences of each: 2 adds its second-nearest codebook rows (VFMTok-RAR)
    # Model
    generator: Literal["ar", "rar"] = "ar"  # of a new one; init_from knows its own kind
    init_from: str | None = None  # a generator or pipeline to continue from; None: random weights
    model: dict[str, Any] = field(
        default_factory=dict
    )  # config fields of a new one; sizes of tokens and classes come from the data
    lora_rank: int = 0  # of low-rank adapters; 0: all weights are trained
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    rar_random_until: float = 0.5  # share of the run with random orders only (RAR)
    rar_raster_from: float = 0.75  # share of the run after which the order is raster only; linear in between
    # Optimizer
    max_steps: int = 10_000
    batch_size: int = 64  # per process
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    class_learning_rate_scale: float = 1.0  # of class embeddings: new classes may need more (AR, and RAR with LoRA)
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_learning_rate: float = 0.01  # of a falling schedule, as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.9999
    # Sample pictures
    samples_per_class: int = 4
    sample_classes: int = 32  # the first ones
    temperature: float | None = None  # also of the saved model's generation config; None: as that says
    top_k: int | None = None
    # System
    attention: Literal["auto", "sdpa", "eager"] = "auto"  # auto: eager on CPUs, in bf16 or with dropout, else sdpa
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 20
    tracker: list[str] = field(default_factory=list)  # beside log.jsonl: tensorboard, trackio, wandb
    validate_every: int = 500
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = False


# ---------------------------------------------------------------------------------------------------------------
# Model


def build_generator(arguments: GeneratorArguments, tokenizer: VFMTokModel, class_names: list[str]) -> Generator:
    """
    A generator for the tokenizer's tokens and the data's classes; of a trained one, classes of the same name are kept.

    Raises:
        ValueError: `init_from` is for other tokens, or comes with settings of a new model.
    """
    sizes = {"codebook_size": tokenizer.config.codebook_size, "num_image_tokens": tokenizer.config.num_anchors}
    if arguments.init_from is None:
        config_class, model_class = GENERATORS[arguments.generator]
        id2label = dict(enumerate(class_names))
        model = model_class(config_class(**arguments.model, **sizes, num_classes=len(class_names), id2label=id2label))
    else:
        if arguments.model:
            raise ValueError("--model describes a new generator; --init_from brings its own configuration.")
        model = load_generator(arguments.init_from)
        for name, size in sizes.items():
            if getattr(model.config, name) != size:
                actual = getattr(model.config, name)
                raise ValueError(f"{arguments.init_from} has {name} {actual}, the tokenizer's is {size}.")
        if class_names != [name for _, name in sorted((model.config.id2label or {}).items())]:
            origins = model.resize_class_embeddings(class_names)
            kept = [name for name, origin in zip(class_names, origins, strict=True) if origin is not None]
            logger.info("%d classes, %d of them known to %s: %s", len(origins), len(kept), arguments.init_from, kept)
    for name, value in (("temperature", arguments.temperature), ("top_k", arguments.top_k)):
        if value is not None:
            model.generation_config.update(do_sample=True, **{name: value})
    return model


def parameter_groups(model: Generator, arguments: GeneratorArguments) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay; and class embeddings that have a table of their own."""
    without = WITHOUT_DECAY[model.config.model_type]
    decayed, plain, classes = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or any(part in name for part in without)
            is_class = any(part in name for part in CLASS_TABLES)
            (classes if is_class else plain if is_plain else decayed).append(parameter)
    class_decay = 0.0 if "embed_tokens" in without else arguments.weight_decay
    return [
        {"params": decayed, "weight_decay": arguments.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": classes, "weight_decay": class_decay, "lr_scale": arguments.class_learning_rate_scale},
    ]


def random_ratio_at(step: int, arguments: GeneratorArguments) -> float:
    """Probability of a random order in RAR's annealing: 1, then linear to 0, then 0."""
    start, end = (share * arguments.max_steps for share in (arguments.rar_random_until, arguments.rar_raster_from))
    return min(max((end - step) / max(end - start, 1), 0.0), 1.0)


@torch.no_grad()
def validate(model: Generator, data: TokenShards, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean cross-entropy of unseen images' tokens in nats, in raster order. The processes share the images."""
    model.eval()
    count = accelerator.num_processes
    # As many on each process, since all run a sharded model together: after the last image the first ones come again.
    own = [(first + accelerator.process_index) % len(data) for first in range(0, len(data), count)]
    losses = []
    # With a generator of its own, as a loader would draw from the global one, and training would notice.
    for batch in DataLoader(Subset(data, own), batch_size, generator=torch.Generator()):
        labels, tokens = batch["label"].to(model.device), batch["image_tokens"].to(model.device)
        logits = model(class_labels=labels, image_tokens=tokens).logits
        token_losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        losses.append(token_losses.view(tokens.shape).mean(dim=1))
    model.train()
    in_order = accelerator.gather(torch.cat(losses)).view(count, -1).T.flatten()
    return {"loss": in_order[: len(data)].mean().item()}


@torch.no_grad()
def draw_samples(model: Generator, tokenizer: VFMTokModel, arguments: GeneratorArguments) -> torch.Tensor:
    """Images `(classes * samples_per_class, 3, height, width)`, the same random numbers at every call."""
    model.eval()
    labels = torch.arange(min(model.config.num_classes, arguments.sample_classes), device=model.device)
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    tokens = model.generate(labels.repeat_interleave(arguments.samples_per_class), generator=generator)
    model.train()
    return torch.cat([tokenizer.decode(image_tokens=part).reconstruction for part in tokens.split(32)])


# ---------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(GeneratorArguments, sys.argv[1:] if argv is None else argv)
    configure_logging()
    output = Path(arguments.output)
    checkpoint = open_output(output, arguments)
    accelerator = start_accelerator(arguments, output, can_shard=not (arguments.lora_rank or arguments.compile))

    # Data
    tokenizer_source = arguments.tokenizer or arguments.init_from
    if tokenizer_source is None or (arguments.tokenizer is None and not is_pipeline(tokenizer_source)):
        raise ValueError("Give --tokenizer: only a pipeline as --init_from brings its own.")
    tokenizer = load_tokenizer(tokenizer_source).to(accelerator.device)
    train_data, validation_data = open_data(arguments, tokenizer, accelerator)
    train_loader = training_loader(train_data, arguments, accelerator)

    # Model and optimizer
    model = build_generator(arguments, tokenizer, train_data.class_names).to(accelerator.device).train()
    precision, dropout = arguments.mixed_precision, model.config.attention_dropout
    model.set_attn_implementation(choose_attention(arguments.attention, accelerator.device, precision, dropout))
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    adapted = None
    if arguments.lora_rank:
        adapted = add_lora(model, arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout)
    betas = (arguments.beta1, arguments.beta2)
    groups = parameter_groups(model, arguments)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, fused=True)
    progress = Progress()
    prepare_model(accelerator, model, arguments.mixed_precision)
    step_function = torch.compile(model) if arguments.compile else model
    step_function, optimizer = accelerator.prepare(step_function, optimizer)
    # Once all processes have the first one's random weights, or their parts of them.
    ema = EMA(model, arguments.ema_decay)
    accelerator.register_for_checkpointing(progress)
    checkpoint_averages(accelerator, ema)
    save_together(accelerator)
    log = start_run(accelerator, output, checkpoint, arguments, progress)

    # Loop
    is_rar = model.config.model_type == "vfmtok_rar"
    stop = StopRequest(accelerator)
    if progress.step == 0 and arguments.init_from is not None:
        log.write("validation", 0, validate(model, validation_data, arguments.batch_size, accelerator))
    window = WindowMeans(accelerator)
    batches = train_loader.batches(progress)
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
        order = {"random_ratio": random_ratio_at(step, arguments)} if is_rar else {}
        losses, indices = [], []
        for _ in range(arguments.gradient_accumulation_steps):
            batch = next(batches)
            labels, tokens = token_batch(batch, tokenizer, arguments.neighbours)
            with accelerator.accumulate(step_function):
                loss = step_function(class_labels=labels, image_tokens=tokens, return_loss=True, **order).loss
                accelerator.backward(loss)
            losses.append(loss.detach())
            indices.append(batch["index"])
        values = {"loss": torch.stack(losses).mean()}
        norms = {"gradient_norm": clip_gradients(accelerator, model, arguments.max_gradient_norm)}
        check_finite(accelerator, step, values, norms, train_data.name, torch.cat(indices))
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        progress.step += 1
        stop.agree()

        # Log, validate, draw, save
        num_images = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
        window.add(values | norms, num_images)
        done = progress.step == arguments.max_steps
        if progress.step % arguments.log_every == 0 or done:
            log.write("train", progress.step, {**window.take(), "lr": learning_rate})
        if progress.step % arguments.validate_every == 0 or done:
            with ema.applied():
                metrics = validate(model, validation_data, arguments.batch_size, accelerator)
                whole = gathered(accelerator, model)
                if accelerator.is_main_process:
                    log.write("validation", progress.step, {**metrics, "unreadable": train_data.num_unreadable})
                    if adapted is None:
                        save_model(whole, output / "model")
                    else:
                        save_adapted(adapted, output / "model", output / "adapter")
            window.restart()
        draws = accelerator.is_main_process or accelerator.is_fsdp2  # A sharded model runs on all or on none.
        if (progress.step % arguments.sample_every == 0 or done) and draws:
            with ema.applied():
                samples = draw_samples(model, tokenizer, arguments)
            if accelerator.is_main_process:
                picture = output / "samples" / f"step_{progress.step:08d}.png"
                save_grid(samples, picture, columns=arguments.samples_per_class)
            window.restart()
        if progress.step % arguments.checkpoint_every == 0 or done or stop:
            save_checkpoint(accelerator, output, progress.step, arguments.keep_checkpoints)
    if stop:
        log.write("stopped", progress.step, {})
    elif accelerator.is_main_process:
        save_pipeline(tokenizer, output / "model", output / "pipeline")
    accelerator.end_training()


if __name__ == "__main__":
    main()
