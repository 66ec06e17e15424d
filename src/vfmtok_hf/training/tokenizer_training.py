"""Training of the image tokenizer: the model, losses, validation and the loop of `train_tokenizer.py`."""

import math
from collections.abc import Callable, Iterator
from copy import copy
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoConfig

from vfmtok_hf.cpu.training import pack_frozen_weights
from vfmtok_hf.data.image_datasets import ImageDataset, ImageStream
from vfmtok_hf.data.image_distances import LPIPS
from vfmtok_hf.data.loaders import TrainingLoader
from vfmtok_hf.data.statistics import codebook_statistics, psnr
from vfmtok_hf.data.transforms import Augmentation
from vfmtok_hf.hub_kernels import use_found_kernels
from vfmtok_hf.modeling.configuration_vfmtok import VFMTokConfig
from vfmtok_hf.modeling.modeling_vfmtok import VFMTokModel
from vfmtok_hf.training.arguments import TokenizerArguments
from vfmtok_hf.training.checkpoints import Progress, open_output, save_checkpoint, save_model, start_run
from vfmtok_hf.training.codebook import CodebookUsage, initialize_codebook, restart_dead_rows
from vfmtok_hf.training.discriminator import (
    DinoDiscriminator,
    DiscriminatorObjective,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    check_virtual_batches,
    frozen,
    load_dino,
)
from vfmtok_hf.training.distributed import StopRequest, check_losses, start_accelerator
from vfmtok_hf.training.ema import EMA
from vfmtok_hf.training.image_data import (
    open_training_images,
    open_validation_images,
    training_augmentation,
    training_loader,
    validation_loader,
)
from vfmtok_hf.training.logs import WindowMeans, configure_logging, save_grid
from vfmtok_hf.training.objective import TokenizerObjective, compile_objective
from vfmtok_hf.training.precision import choose_attention, choose_mixed_precision, recompute_activations
from vfmtok_hf.training.run_data import check_data
from vfmtok_hf.training.schedule import learning_rate_at, set_learning_rate


CODEBOOK = "quantizer.codebook.weight"


def build_model(arguments: TokenizerArguments) -> VFMTokModel:
    """The initial model: `init_from`, or random weights around the pretrained `vision_model`."""
    if arguments.init_from is not None:
        weights = [name for name in VFMTokConfig.default_fields() if name.endswith("_loss_weight")]
        fixed = [name for name in arguments.model if name not in weights]
        if fixed:
            raise ValueError(
                f"--model.{fixed[0]} configures a new tokenizer. With --init_from, only "
                f"{', '.join(weights)} may change."
            )
        # Averages and updates need float32; `mixed_precision` changes only the computation.
        return VFMTokModel.from_pretrained(
            arguments.init_from, load_vision_model=True, dtype=torch.float32, **arguments.model
        )
    vision_config = AutoConfig.from_pretrained(arguments.vision_model)
    vision_config.name_or_path = ""  # often a local folder
    model = VFMTokModel(VFMTokConfig(vision_config=vision_config, **arguments.model))
    model.load_vision_model(arguments.vision_model)
    return model


def build_objective(model: VFMTokModel, arguments: TokenizerArguments) -> TokenizerObjective:
    weights = {
        "l1": arguments.l1_weight,
        "mse": arguments.mse_weight,
        "lpips": arguments.lpips_weight,
        "perceptual": arguments.perceptual_weight,
    }
    lpips = LPIPS("vgg", arguments.vgg_weights, arguments.lpips_dropout) if arguments.lpips_weight > 0 else None
    return TokenizerObjective(model, weights, arguments.trainable == "all", lpips).train()


def set_up_layers(objective: TokenizerObjective, arguments: TokenizerArguments, device: torch.device) -> None:
    """Set the attention of `--attention`, and on CPUs further optimizations."""
    model = objective.model
    # If frozen, the encoder and the vision model compute in float32 and without dropout.
    precision = arguments.mixed_precision if objective.train_encoder else "no"
    own = choose_attention(arguments.attention, device, arguments.mixed_precision, model.config.decoder_dropout)
    vision = choose_attention(arguments.attention, device, precision, dropout=0.0, causal=False)
    model.set_attn_implementation({"": own, "vision_config": vision})
    if device.type == "cpu" and not arguments.compile:  # torch.compile packs weights and chooses layouts itself
        use_found_kernels(model, device)
        pack_frozen_weights(model.vision_model, torch.bfloat16 if precision == "bf16" else torch.float32)
        if objective.lpips is not None:
            objective.lpips.to(memory_format=torch.channels_last)


def build_discriminator(arguments: TokenizerArguments) -> DiscriminatorObjective | None:
    if arguments.adversarial_weight == 0:
        return None
    if arguments.discriminator == "patch":
        return DiscriminatorObjective(PatchDiscriminator())
    check_virtual_batches(arguments.batch_size)
    return DiscriminatorObjective(DinoDiscriminator(load_dino(arguments.discriminator_model)))


def open_images(
    arguments: TokenizerArguments, image_size: int, accelerator: Accelerator
) -> tuple[ImageDataset | ImageStream, ImageDataset]:
    """
    Open training and validation images.

    Raises:
        ValueError: a stream cannot be split.
    """
    labeled = arguments.balance_power > 0
    train_data, held_out = open_training_images(arguments, image_size, accelerator, labeled)
    records = open_validation_images(arguments, held_out, accelerator, labeled)
    check_data(arguments, train_data, records, accelerator.is_main_process, classes_may_change=True)
    if not isinstance(train_data, ImageStream):
        augmentation = training_augmentation(arguments, image_size)
        train_data = ImageDataset(train_data, augmentation, arguments.cache_images, arguments.seed)
    return train_data, ImageDataset(records, Augmentation(image_size), arguments.cache_images)


def kmeans_batches(data: ImageDataset | ImageStream, arguments: TokenizerArguments) -> Iterator[torch.Tensor]:
    """Batches of `kmeans_images` training images, the same on every process: the first images of a single process."""
    size = arguments.batch_size
    # A copy keeps the run's position in the data.
    loader = TrainingLoader(copy(data), size, balance_power=arguments.balance_power, seed=arguments.seed)
    for batch in islice(loader.batches(Progress()), math.ceil(arguments.kmeans_images / size)):
        yield batch["pixel_values"]


def bounded_psnr(pixel_values: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """PSNR of images in [-1, 1], `(batch_size,)`, at most 100 dB, because JSON has no infinity."""
    return psnr(pixel_values, reconstruction.clamp(-1, 1), data_range=2).clamp_max(100)


@torch.no_grad()
def validate(
    model: VFMTokModel, data: ImageDataset, quantize: bool, arguments: TokenizerArguments, accelerator: Accelerator
) -> tuple[dict[str, float], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """
    Reconstruct validation images in float32, through the image tokens if the codebook is in use. The processes share
    the images.

    Returns:
        `psnr` (mean over images, dB), `usage` (used share of the codebook), `perplexity`; and this process's
        first batches, `grid_images` or more originals and their reconstructions, `(batch_size, 3, height, width)`.
    """
    model.eval()
    sums = torch.zeros(2, device=model.device)  # of PSNR, and of images
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64, device=model.device)
    originals, reconstructions = [], []
    for batch in validation_loader(data, arguments, accelerator):
        pixel_values = batch["pixel_values"].to(model.device)
        encoded = model.encode(pixel_values)
        memory = encoded.quantized_latents if quantize else F.normalize(encoded.latents, dim=-1)
        reconstruction = model.decode(quantized_latents=memory).reconstruction
        decibels = bounded_psnr(pixel_values, reconstruction)
        sums += torch.stack([decibels.sum(), torch.full_like(decibels[0], len(decibels))])
        counts += torch.bincount(encoded.image_tokens.flatten(), minlength=len(counts))
        if len(originals) * arguments.batch_size < arguments.grid_images:
            originals.append(pixel_values)
            reconstructions.append(reconstruction)
    model.train()
    total, num_images = accelerator.reduce(sums).tolist()
    codebook = codebook_statistics(accelerator.reduce(counts))
    metrics = {"psnr": total / num_images, "usage": codebook.usage, "perplexity": codebook.perplexity}
    return metrics, (originals, reconstructions)


def train(
    arguments: TokenizerArguments, build_model: Callable[[TokenizerArguments], VFMTokModel] = build_model
) -> None:
    """
    Run or continue a training.

    Args:
        build_model (`Callable`, *optional*): builds the initial model, for models that arguments cannot describe.

    Raises:
        ValueError: the output contains a run, and `arguments.resume` is false or other arguments changed.
    """
    configure_logging()
    arguments.mixed_precision = choose_mixed_precision(arguments.mixed_precision)
    output = Path(arguments.output)
    checkpoint = open_output(output, arguments)
    accumulation_steps = arguments.gradient_accumulation_steps
    accelerator = start_accelerator(arguments, output)

    # Data
    model = build_model(arguments)
    train_data, validation_data = open_images(arguments, model.config.image_size, accelerator)
    train_loader = training_loader(train_data, arguments, accelerator)

    # Model, losses, optimizers
    if arguments.gradient_checkpointing:
        recompute_activations(model)
    objective = build_objective(model, arguments).to(accelerator.device)
    if arguments.channels_last:
        objective.to(memory_format=torch.channels_last)
    betas = (arguments.beta1, arguments.beta2)
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=arguments.learning_rate, betas=betas, weight_decay=arguments.weight_decay, fused=True
    )
    usage = CodebookUsage(model.config.codebook_size, accelerator.device)
    progress = Progress()
    step_function = compile_objective(objective) if arguments.compile else objective
    step_function, optimizer = accelerator.prepare(step_function, optimizer)
    # After all processes have the first one's weights.
    ema = EMA(model, arguments.ema_decay)
    wrapped = [step_function]
    discriminator_objective = build_discriminator(arguments)
    if discriminator_objective is not None:
        discriminator_objective.to(accelerator.device).train()
        discriminator = discriminator_objective.discriminator
        discriminator_trainable = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        discriminator_optimizer = torch.optim.Adam(
            discriminator_trainable, lr=arguments.discriminator_learning_rate, betas=betas, fused=True
        )
        discriminator_step_function, discriminator_optimizer = accelerator.prepare(
            discriminator_objective, discriminator_optimizer
        )
        wrapped.append(discriminator_step_function)
    accelerator.register_for_checkpointing(progress, ema, usage)
    log = start_run(accelerator, output, checkpoint, arguments, progress)
    # After the run's weights are loaded.
    set_up_layers(objective, arguments, accelerator.device)

    # Loop
    stop = StopRequest(accelerator)
    window = WindowMeans(accelerator)
    codebook, last_layer = model.quantizer.codebook.weight.data, model.pixel_decoder.conv_out.weight
    train_encoder = objective.train_encoder
    warmup_steps = arguments.codebook_warmup_steps if train_encoder else 0
    restart_until = (
        arguments.restart_until * arguments.max_steps if train_encoder and arguments.restart_patience else 0
    )
    batches = train_loader.batches(progress)
    while progress.step < arguments.max_steps and not stop:
        step = progress.step
        quantize = step >= warmup_steps
        is_adversarial = discriminator_objective is not None and step >= arguments.adversarial_start_step
        if step == warmup_steps > 0:
            model.eval()
            initialize_codebook(model, kmeans_batches(train_data, arguments), arguments.seed)
            model.train()
            ema.averages[CODEBOOK].copy_(codebook)
        learning_rate = learning_rate_at(step, arguments)
        set_learning_rate(optimizer, learning_rate)

        # Gradients of the tokenizer, and of the discriminator on the same reconstructions
        parts, indices, latents, image_tokens = [], [], [], []
        for _ in range(accumulation_steps):
            batch = next(batches)
            pixel_values = batch["pixel_values"]
            with accelerator.accumulate(*wrapped):
                out = step_function(pixel_values, quantize)
                loss, terms, reconstruction = out["loss"], out["terms"], out["reconstruction"]
                if is_adversarial:
                    with frozen(discriminator_trainable), accelerator.autocast():
                        terms["adversarial"] = adversarial_loss(discriminator(reconstruction))
                    weight = arguments.adversarial_weight
                    if arguments.adaptive_adversarial_weight:
                        terms["adaptive_weight"] = adaptive_weight(out["image_loss"], terms["adversarial"], last_layer)
                        weight = weight * terms["adaptive_weight"]
                    loss = loss + weight * terms["adversarial"]
                accelerator.backward(loss)
                if is_adversarial:
                    verdict = discriminator_step_function(reconstruction, pixel_values)
                    # The weight affects gradient clipping.
                    accelerator.backward(arguments.adversarial_weight * verdict["discriminator"])
                    terms |= verdict
            decibels = bounded_psnr(pixel_values, reconstruction.detach()).mean()
            parts.append({"loss": loss, **terms, "psnr": decibels})
            indices.append(batch["index"])
            # Gathered part by part, they are in the order of one large batch, so restarts make the same choices.
            image_tokens.append(accelerator.gather(out["image_tokens"]))
            if step < restart_until:
                latents.append(accelerator.gather(out["latents"]))
        values = {name: torch.stack([part[name].detach() for part in parts]).mean() for name in parts[0]}

        # Step
        norms = {"gradient_norm": accelerator.clip_grad_norm_(trainable, arguments.max_gradient_norm)}
        if is_adversarial:
            norms["discriminator_gradient_norm"] = accelerator.clip_grad_norm_(
                discriminator_trainable, arguments.max_gradient_norm
            )
        check_losses(accelerator, step, values, norms, train_data.name, torch.cat(indices))
        optimizer.step()
        optimizer.zero_grad()
        if is_adversarial:
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

        # Codebook and average
        if quantize:
            usage.update(torch.cat(image_tokens))
            if step < restart_until:
                patience = arguments.restart_patience
                restarted = restart_dead_rows(codebook, usage, torch.cat(latents), patience, seed=step)
                values["restarted_rows"] = restarted.float()
        ema.update()
        progress.step += 1
        stop.agree()

        # Log, validate, save
        window.add(values | norms, accumulation_steps * len(pixel_values) * accelerator.num_processes)
        done = progress.step == arguments.max_steps
        if progress.step % arguments.log_every == 0 or done:
            log.write("train", progress.step, {**window.take(), "usage": usage.usage(), "lr": learning_rate})
        if progress.step % arguments.validate_every == 0 or done:
            with ema.applied():
                metrics, pictures = validate(model, validation_data, quantize, arguments, accelerator)
                if accelerator.is_main_process:
                    log.write("validation", progress.step, {**metrics, "unreadable": train_data.num_unreadable})
                    rows = torch.cat([torch.cat(images)[: arguments.grid_images] for images in pictures])
                    picture = output / "reconstructions" / f"step_{progress.step:08d}.png"
                    save_grid(rows, picture, columns=len(rows) // 2)
                    save_model(model, output / "model")
            window.restart()
        if progress.step % arguments.checkpoint_every == 0 or done or stop:
            save_checkpoint(accelerator, output, progress.step, arguments.keep_checkpoints)
    if stop:
        log.write("stopped", progress.step, {})
    accelerator.end_training()
