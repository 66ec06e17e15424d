"""Training of generators: the model, validation, samples and the loop of `train_generator.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader, Subset

from vfmtok_hf.data.token_sets import TokenSet
from vfmtok_hf.modeling.configuration_vfmtok_ar import VFMTokARConfig
from vfmtok_hf.modeling.configuration_vfmtok_rar import VFMTokRARConfig
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.modeling.modeling_vfmtok_ar import VFMTokARForImageGeneration
from vfmtok_hf.modeling.modeling_vfmtok_rar import VFMTokRARForImageGeneration
from vfmtok_hf.training.arguments import GeneratorArguments
from vfmtok_hf.training.checkpoints import Progress, open_output, save_checkpoint, save_model, start_run
from vfmtok_hf.training.distributed import (
    StopRequest,
    check_losses,
    checkpoint_averages,
    clip_gradients,
    gathered,
    prepare_model,
    save_together,
    sharding_of,
    start_accelerator,
)
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
from vfmtok_hf.training.generator_data import open_token_data, token_batch
from vfmtok_hf.training.image_data import training_loader
from vfmtok_hf.training.logs import WindowMeans, configure_logging, logger, save_grid
from vfmtok_hf.training.precision import choose_attention, choose_mixed_precision, recompute_activations
from vfmtok_hf.training.schedule import learning_rate_at, random_ratio_at, set_learning_rate


GENERATORS = {
    "ar": (VFMTokARConfig, VFMTokARForImageGeneration),
    "rar": (VFMTokRARConfig, VFMTokRARForImageGeneration),
}


# Parameters with these names and vectors have no weight decay, as in the originals' `creat_optimizer`.
WITHOUT_DECAY = {
    "vfmtok_ar": (),
    "vfmtok_rar": ("embed_tokens", "position_embeddings", "timestep_embeddings", "norm_modulation"),
}
# Class embeddings of an AR and of a RAR's adapters. Otherwise a RAR has one table for classes and image tokens, whose rows
# `scaled_class_steps` treats separately.
CLASS_TABLES = ("class_embedding", "trainable_tokens_delta")


# ---------------------------------------------------------------------------------------------------------------
# Model


def build_generator(arguments: GeneratorArguments, tokenizer: VFMTokModel, class_names: list[str]) -> Generator:
    """
    Create a generator for the tokenizer's tokens and the data's classes. A trained one keeps classes of the same name.

    Raises:
        ValueError: `init_from` has other tokens, or is combined with settings of a new model.
    """
    sizes = {"codebook_size": tokenizer.config.codebook_size, "num_image_tokens": tokenizer.config.num_anchors}
    if arguments.init_from is None:
        config_class, model_class = GENERATORS[arguments.generator]
        id2label = dict(enumerate(class_names))
        model = model_class(config_class(**arguments.model, **sizes, num_classes=len(class_names), id2label=id2label))
    else:
        if arguments.model:
            raise ValueError(
                "--model configures a new generator and cannot be combined with --init_from, which has its own configuration."
            )
        model = load_generator(arguments.init_from)
        for name, size in sizes.items():
            if getattr(model.config, name) != size:
                actual = getattr(model.config, name)
                raise ValueError(f"{arguments.init_from} has {name} {actual}, but the tokenizer's is {size}.")
        if class_names != [name for _, name in sorted((model.config.id2label or {}).items())]:
            origins = model.resize_class_embeddings(class_names)
            kept = [name for name, origin in zip(class_names, origins, strict=True) if origin is not None]
            logger.info("%d classes, %d of which exist in %s: %s", len(origins), len(kept), arguments.init_from, kept)
    for name, value in (("temperature", arguments.temperature), ("top_k", arguments.top_k)):
        if value is not None:
            model.generation_config.update(do_sample=True, **{name: value})
    return model


def parameter_groups(model: Generator, arguments: GeneratorArguments) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay, and class embeddings if they have their own table."""
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


def shares_class_table(model: Generator) -> bool:
    """Whether classes are trained as rows of a table that also contains image tokens: those of a RAR without adapters."""
    table, first = model.class_embedding_table()
    return first > 0 and table.weight.requires_grad


@contextmanager
def scaled_class_steps(model: Generator, scale: float) -> Iterator[None]:
    """
    Multiply the optimizer step of class embeddings in a shared table by `scale`, because a parameter group cannot contain single
    rows. Class embeddings in their own table are left unchanged.
    """
    if scale == 1 or not shares_class_table(model):
        yield
        return
    table, first = model.class_embedding_table()
    classes = table.weight.detach()[first:]
    before = classes.clone()
    yield
    classes.copy_(before.lerp(classes, scale))


@torch.no_grad()
def validate(model: Generator, data: TokenSet, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean cross-entropy of validation tokens in nats, in raster order. The processes share the images."""
    model.eval()
    count = accelerator.num_processes
    # The same number on each process, because all run a sharded model together: the first images are repeated.
    own = [(first + accelerator.process_index) % len(data) for first in range(0, len(data), count)]
    losses = []
    # With its own generator: a loader would sample from the global one and so change the training.
    for batch in DataLoader(Subset(data, own), batch_size, generator=torch.Generator()):
        labels, tokens = batch["label"].to(model.device), batch["image_tokens"].to(model.device)
        logits = model(class_labels=labels, image_tokens=tokens).logits
        token_losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        losses.append(token_losses.view(tokens.shape).mean(dim=1))
    model.train()
    in_order = accelerator.gather(torch.cat(losses)).view(count, -1).T.flatten()
    return {"loss": in_order[: len(data)].mean().item()}


@torch.no_grad()
def sample_images(model: Generator, tokenizer: VFMTokModel, arguments: GeneratorArguments) -> torch.Tensor:
    """Sample images `(classes * samples_per_class, 3, height, width)`, with the same random numbers at every call."""
    model.eval()
    labels = torch.arange(min(model.config.num_classes, arguments.sample_classes), device=model.device)
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    tokens = model.generate(labels.repeat_interleave(arguments.samples_per_class), generator=generator)
    model.train()
    return torch.cat([tokenizer.decode(image_tokens=part).reconstruction for part in tokens.split(32)])


# ---------------------------------------------------------------------------------------------------------------
# The run


def open_tokenizer(arguments: GeneratorArguments) -> VFMTokModel:
    """
    Load `arguments.tokenizer`, or by default the tokenizer in `arguments.init_from`.

    Raises:
        ValueError: there is none.
    """
    if arguments.tokenizer is None and not is_pipeline(arguments.init_from):
        raise ValueError(f"{arguments.init_from} is not a pipeline: pass --tokenizer.")
    return load_tokenizer(arguments.tokenizer or arguments.init_from)


def train(arguments: GeneratorArguments, tokenizer: VFMTokModel | None = None) -> None:
    """
    Run or continue a training.

    Args:
        tokenizer (`VFMTokModel`, *optional*): defaults to the one that the arguments name ([`open_tokenizer`]).

    Raises:
        ValueError: the output contains a run, and `arguments.resume` is false or other arguments changed.
    """
    configure_logging()
    arguments.mixed_precision = choose_mixed_precision(arguments.mixed_precision)
    output = Path(arguments.output)
    checkpoint = open_output(output, arguments)
    accelerator = start_accelerator(arguments, output, can_shard=not (arguments.lora_rank or arguments.compile))

    # Data
    tokenizer = (tokenizer or open_tokenizer(arguments)).to(accelerator.device)
    train_data, validation_data = open_token_data(arguments, tokenizer, accelerator)
    train_loader = training_loader(train_data, arguments, accelerator)

    # Model and optimizer
    model = build_generator(arguments, tokenizer, train_data.class_names).to(accelerator.device).train()
    precision, dropout = arguments.mixed_precision, model.config.attention_dropout
    model.set_attn_implementation(choose_attention(arguments.attention, accelerator.device, precision, dropout))
    if arguments.gradient_checkpointing:
        recompute_activations(model)
    if arguments.class_learning_rate_scale != 1 and shares_class_table(model) and sharding_of(accelerator):
        raise ValueError(
            "A sharded RAR cannot scale the learning rate of its classes: leave --class_learning_rate_scale out."
        )
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
    register_fsdp_forward_method(model, "decode_step")  # a sharded model then gathers weights in it, as in `forward`
    # After all processes have the first one's random weights, or their shards of them.
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
        learning_rate = learning_rate_at(step, arguments)
        set_learning_rate(optimizer, learning_rate)
        order = {"random_ratio": random_ratio_at(step, arguments)} if is_rar else {}
        losses, indices = [], []
        for _ in range(arguments.gradient_accumulation_steps):
            batch = next(batches)
            labels, tokens = token_batch(batch, tokenizer, arguments.codebook_top_k)
            with accelerator.accumulate(step_function):
                loss = step_function(class_labels=labels, image_tokens=tokens, return_loss=True, **order).loss
                accelerator.backward(loss)
            losses.append(loss.detach())
            indices.append(batch["index"])
        values = {"loss": torch.stack(losses).mean()}
        norms = {"gradient_norm": clip_gradients(accelerator, model, arguments.max_gradient_norm)}
        check_losses(accelerator, step, values, norms, train_data.name, torch.cat(indices))
        with scaled_class_steps(model, arguments.class_learning_rate_scale):
            optimizer.step()
        optimizer.zero_grad()
        ema.update()
        progress.step += 1
        stop.agree()

        # Log, validate, sample, save
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
        # A sharded model must run on all processes.
        samples_here = accelerator.is_main_process or accelerator.is_fsdp2
        if (progress.step % arguments.sample_every == 0 or done) and samples_here:
            with ema.applied():
                samples = sample_images(model, tokenizer, arguments)
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
