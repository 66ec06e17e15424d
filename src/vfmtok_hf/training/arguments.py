"""
Arguments of the trainers and of token extraction, as dataclasses: defaults, then a YAML file, then the command line.

They are read without torch and transformers, which take seconds to import, so mistakes are reported at once.
"""

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml


T = TypeVar("T")

MAY_CHANGE = "may change when a run is resumed"
# Arguments that a resumed run may change: length, learning rates, paths and reporting.
Changeable = Annotated[T, MAY_CHANGE]

# Names of earlier versions.
RENAMED = {
    "variants": "num_crops",
    "neighbours": "codebook_top_k",
    **{f"{term}_weight": f"model.{term}_loss_weight" for term in ("feature", "codebook", "commitment", "entropy")},
}


def argument(*, help: str, aliases: Sequence[str] = (), **default: Any) -> Any:
    """A field with its help text, which states the default. An argument without a default is required."""
    if not default:
        help += " (required)"
    elif default.get("default") is not None:
        help += f" (default: {default['default']})"
    return dataclasses.field(metadata={"help": help, "aliases": aliases}, **default)


@dataclass(kw_only=True)
class ImageArguments:
    """Options of reading images, for both trainers and token extraction."""

    split: str = argument(default="train", help="Split of a data set.")
    image_column: str | None = argument(default=None, help="Column with the images. Default: found by type and name.")
    label_column: str | None = argument(default=None, help="Column with the labels. Default: found by type and name.")
    class_names: str | None = argument(
        default=None, help='JSON file with "id2label". Default: the class names of the data.'
    )
    crop_scale: list[float] = argument(
        default_factory=lambda: [0.8, 1.0],
        help="Range of the side of random crops, relative to the image's shorter side. (default: 0.8 1.0)",
    )
    horizontal_flip: bool = argument(default=True, help="Mirror half of the random crops.")
    batch_size: int = argument(default=32, help="Images per process and forward pass.")
    num_workers: Changeable[int] = argument(default=0, help="Workers that read images, per training process.")
    seed: int = argument(default=0, help="Random seed.")


@dataclass(kw_only=True)
class TrainingArguments(ImageArguments):
    """Arguments of both trainers."""

    # Data
    train_data: Changeable[str] = argument(
        help="Training images, from any source in docs/training.md; for generators also token sets."
    )
    validation_data: Changeable[str | None] = argument(
        default=None, help="Validation images. Default: a part of the training images is held out."
    )
    validation_share: float = argument(
        default=0.1, help="Share of each class that is held out without --validation_data."
    )
    validation_split: str = argument(default="validation", help="Split of --validation_data.")
    streaming: bool = argument(default=False, help="Read a data set front to back without storing it.")
    epoch_images: int | None = argument(
        default=None,
        help="Images, or token sequences, per epoch of a stream. Default: the number that the stream states.",
    )
    shuffle_buffer: int = argument(
        default=1000, help="Encoded images, or token sequences, in the shuffle buffer of each worker of a stream."
    )
    balance_power: float = argument(
        default=0.0, help="A class with n images is sampled with weight n ** (1 - balance_power)."
    )
    # Run
    output: Changeable[str] = argument(help="Folder of the run.")
    resume: Changeable[bool] = argument(default=False, help="Continue from the newest checkpoint in --output.")
    accept_changed_data: Changeable[bool] = argument(
        default=False, help="Resume although the data changed since the start of the run."
    )
    init_from: str | None = argument(default=None, help="Folder or repository of a trained model to start from.")
    model: dict[str, Any] = argument(
        default_factory=dict,
        help="Configuration fields of a new model, also one by one: --model.hidden_size=256. For a trained "
        "tokenizer, only its *_loss_weight fields.",
    )
    # Optimizer
    max_steps: Changeable[int] = argument(default=10_000, help="Optimizer steps.")
    gradient_accumulation_steps: int = argument(default=1, help="Forward passes per optimizer step.")
    learning_rate: Changeable[float] = argument(default=1e-4, help="Peak learning rate.")
    warmup_steps: int = argument(default=100, help="Steps until the learning rate reaches its peak.")
    schedule: Changeable[Literal["constant", "cosine", "linear"]] = argument(
        default="constant", help="Learning rate schedule after the warm-up."
    )
    final_learning_rate: Changeable[float] = argument(
        default=0.01, help="Final learning rate of a decaying schedule, relative to the peak."
    )
    beta1: float = argument(default=0.9, help="First beta of Adam.")
    beta2: float = argument(default=0.95, help="Second beta of Adam.")
    weight_decay: Changeable[float] = argument(default=0.0, help="Weight decay of AdamW.")
    max_gradient_norm: Changeable[float] = argument(default=1.0, help="Gradients are clipped to this norm.")
    ema_decay: float = argument(default=0.9999, help="Decay of the moving average; 0 disables it.")
    # System
    attention: Literal["auto", "sdpa", "eager"] = argument(
        default="auto", help="auto: the fastest one; blockwise on CPUs in bfloat16 or with dropout, otherwise sdpa."
    )
    mixed_precision: Literal["auto", "no", "bf16"] = argument(
        default="no", help="auto: bf16 if this machine computes it faster than float32; the choice is logged."
    )
    gradient_checkpointing: bool = argument(
        default=False, help="Recompute activations in the backward pass to save memory."
    )
    compile: bool = argument(default=False, help="Compile the training step with torch.compile.")
    # Reports
    tracker: Changeable[list[str]] = argument(
        default_factory=list, help="Trackers in addition to log.jsonl: tensorboard, trackio, wandb."
    )
    log_every: Changeable[int] = argument(default=20, help="Steps between lines of the log.")
    validate_every: Changeable[int] = argument(default=500, help="Steps between validations, which also save model/.")
    checkpoint_every: Changeable[int] = argument(default=500, help="Steps between checkpoints.")
    keep_checkpoints: Changeable[int] = argument(default=2, help="Number of recent checkpoints to keep.")


@dataclass(kw_only=True)
class TokenizerArguments(TrainingArguments):
    """
    Arguments of `train_tokenizer.py`.

    Raises:
        ValueError: `streaming` and `cache_images` are combined, or `adaptive_adversarial_weight` and `compile`.
    """

    cache_images: Changeable[bool] = argument(default=False, help="Keep decoded images in memory.")
    # Model
    vision_model: str | None = argument(
        default=None, help="Folder or repository of the pretrained vision model of a new tokenizer."
    )
    trainable: Literal["all", "decoder"] = argument(
        default="all", help="decoder: train only the decoders; image tokens do not change."
    )
    # Losses on pixels. The weights of feature and codebook losses are in the model's configuration (*_loss_weight). A
    # weight of 0 turns a term off.
    l1_weight: float = argument(default=0.0, help="Weight of the absolute error of pixels.")
    mse_weight: float = argument(
        default=2.0, help="Weight of the squared error of pixels, which the original counts twice."
    )
    lpips_weight: float = argument(default=0.0, help="Weight of LPIPS.")
    lpips_dropout: float = argument(default=0.0, help="Dropout in LPIPS; the original uses 0.5.")
    vgg_weights: Changeable[str | None] = argument(
        default=None, help="File with torchvision's VGG-16 for LPIPS. Default: torch's cache, or a download."
    )
    perceptual_weight: float = argument(
        default=1.0, help="Weight of the distance between features of the frozen vision model."
    )
    adversarial_weight: float = argument(default=0.0, help="Weight of the adversarial loss.")
    adversarial_start_step: int = argument(default=0, help="Step at which discriminator and adversarial loss start.")
    adaptive_adversarial_weight: bool = argument(
        default=False, help="Balance the adversarial loss with the gradient norm of the pixel losses."
    )
    discriminator: Literal["dino", "patch"] = argument(default="patch", help="dino is the original's discriminator.")
    discriminator_model: Changeable[str] = argument(
        default="facebook/dino-vits16", help="Folder or repository of the vision transformer of dino."
    )
    discriminator_learning_rate: Changeable[float] = argument(
        default=1e-4, help="Learning rate of the discriminator, constant."
    )
    # Codebook
    codebook_warmup_steps: int = argument(
        default=0, help="Steps as a plain autoencoder before k-means on its latents initializes the codebook."
    )
    kmeans_images: int = argument(default=512, help="Images for k-means.")
    restart_patience: int = argument(default=0, help="Steps after which an unused codebook row is replaced; 0: never.")
    restart_until: float = argument(default=0.8, help="Share of the run after which rows are no longer replaced.")
    # System
    channels_last: bool = argument(default=False, help="Memory format of convolutions.")
    grid_images: Changeable[int] = argument(default=16, help="Images in the grid of reconstructions.")

    def __post_init__(self) -> None:
        if self.streaming and self.cache_images:
            raise ValueError("A stream cannot be cached: --cache_images true needs --streaming false.")
        if self.adversarial_weight and self.adaptive_adversarial_weight and self.compile:
            raise ValueError(
                "--adaptive_adversarial_weight needs two backward passes, which --compile true does not support: use one of them."
            )


@dataclass(kw_only=True)
class GeneratorArguments(TrainingArguments):
    """Arguments of `train_generator.py`."""

    # Data
    tokenizer: str | None = argument(
        default=None, help="Folder or repository of a VFMTokModel or pipeline. Default: the one in --init_from."
    )
    num_crops: int = argument(
        default=4,
        aliases=["--variants"],  # its name in commands of version 0.1
        help="Random crops per training image that are encoded once; 0: encode new crops in every step.",
    )
    codebook_top_k: int = argument(
        default=1, help="Token sequences per crop; 2 adds the second-nearest codebook rows (VFMTok-RAR)."
    )
    # Model
    generator: Literal["ar", "rar"] = argument(default="ar", help="Type of a new generator.")
    lora_rank: int = argument(default=0, help="Rank of LoRA adapters; 0: train all weights.")
    lora_alpha: float = argument(default=16.0, help="Adapters are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = argument(default=0.0, help="Dropout of the adapters' input.")
    rar_random_until: Changeable[float] = argument(default=0.5, help="Share of the run with only random orders (RAR).")
    rar_raster_from: Changeable[float] = argument(
        default=0.75, help="Share of the run after which only raster order is used; linear in between (RAR)."
    )
    # Optimizer, where it differs from the tokenizer's
    batch_size: int = argument(default=64, help="Images per process and forward pass.")
    weight_decay: Changeable[float] = argument(default=0.05, help="Weight decay of AdamW.")
    class_learning_rate_scale: float = argument(
        default=1.0,
        help="Learning rate factor of class embeddings; new classes may need more. Not for a sharded RAR.",
    )
    # Samples
    sample_every: Changeable[int] = argument(default=1000, help="Steps between sample grids.")
    samples_per_class: Changeable[int] = argument(default=4, help="Samples per class in a grid.")
    sample_classes: Changeable[int] = argument(default=32, help="Number of classes to sample, starting at the first.")
    temperature: float | None = argument(
        default=None, help="Temperature of samples and of the saved generation config. Default: unchanged."
    )
    top_k: int | None = argument(
        default=None, help="Top-k of samples and of the saved generation config. Default: unchanged."
    )


@dataclass(kw_only=True)
class ExtractionArguments(ImageArguments):
    """Arguments of `extract_tokens.py`."""

    data: str = argument(help="Folder of class folders, or a data set of the datasets library.")
    tokenizer: str = argument(help="Folder or repository of a VFMTokModel or a pipeline.")
    output: str = argument(help="Folder of the token set.")
    crops: Literal["random", "ten", "center"] = argument(default="random", help="Views of each image.")
    num_crops: int = argument(
        default=4,
        aliases=["--variants"],  # its name in commands of version 0.1
        help="Random crops per image.",
    )
    ten_crop_ranges: list[float] = argument(
        default_factory=lambda: [1.1], help="Ten crops for each of these ranges. (default: 1.1)"
    )
    codebook_top_k: int = argument(
        default=1, help="Token sequences per view; 2 adds the second-nearest codebook rows (VFMTok-RAR)."
    )
    shard_size: int = argument(default=4096, help="Images per file.")


# ---------------------------------------------------------------------------------------------------------------
# Reading


Arguments = TypeVar("Arguments", bound=ImageArguments)


class _Parser(ArgumentParser):
    """A parser of the fields of a dataclass that raises `ValueError` instead of exiting."""

    def __init__(self, arguments_class: type[ImageArguments], command: str | None):
        super().__init__(
            prog=command,
            usage="%(prog)s [--config FILE] [--key value]...",
            allow_abbrev=False,
            argument_default=SUPPRESS,  # defaults are the dataclass's
        )
        self.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line overrides it.")
        hints = typing.get_type_hints(arguments_class)
        for field in dataclasses.fields(arguments_class):
            names = [f"--{field.name}", *field.metadata["aliases"]]
            self.add_argument(*names, dest=field.name, help=field.metadata["help"], **_type_options(hints[field.name]))
            if field.default is True:
                self.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. --help lists all arguments.")


def _type_options(hint: Any) -> dict[str, Any]:
    """Options of `add_argument` for a field of a type: `X`, `X | None`, `Literal[...]`, `list[X]` or `dict[str, Any]`."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        return _type_options(typing.get_args(hint)[0])
    if origin is Literal:
        return {"choices": typing.get_args(hint)}
    if origin is list:
        return {**_type_options(typing.get_args(hint)[0]), "nargs": "+"}
    if origin is dict:
        return {"type": _dictionary, "metavar": "DICT"}
    if hint is bool:
        return {"type": _boolean, "metavar": "BOOL", "nargs": "?", "const": True}
    return {"type": hint, "metavar": hint.__name__.upper()}


def parse_arguments(
    arguments_class: type[Arguments], argv: list[str] | None = None, command: str | None = None
) -> Arguments:
    """
    Parse `[--config FILE] [--key value | --key=value]...` into a dataclass. Entries of a dictionary are set with a
    dot (`--model.hidden_size=128`); `--help` prints all arguments and exits.

    Args:
        argv (`list[str]`, *optional*): defaults to the command line.
        command (`str`, *optional*): name of the command, for the help.

    Raises:
        ValueError: an unknown argument (the error suggests the closest ones), a missing one, or an invalid value.
        FileNotFoundError: the config file does not exist.
    """
    parser = _Parser(arguments_class, command)
    argv = [_with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    found, rest = parser.parse_known_args(argv)
    if "config" in found:
        # The file's arguments come first, so the command line overrides them.
        argv = [*_command_line(arguments_class, _read_yaml(Path(found.config))), *argv]
        found, rest = parser.parse_known_args(argv)
        del found.config
    entries = list(_entries(arguments_class, rest))
    missing = [
        f"--{field.name}"
        for field in dataclasses.fields(arguments_class)
        if field.name not in found and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        parser.error(f"missing {' and '.join(missing)}")
    arguments = arguments_class(**vars(found))
    for name, entry, value in entries:
        setattr(arguments, name, {**getattr(arguments, name), entry: value})
    return arguments


def _with_underscores(word: str) -> str:
    """`--learning-rate` and `--learning-rate=1` with underscores. Entries such as `.some-name` stay."""
    return re.sub(r"^--[\w-]+", lambda name: f"--{name[0][2:].replace('-', '_')}", word)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"Config file {file} does not exist.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"Config file {file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Config file {file} must contain `key: value` lines.")
    renamed = [f"{name} is now {RENAMED[name]}" for name in values if name in RENAMED]
    if renamed:
        raise ValueError(f"Config file {file} contains argument names of an earlier version: {', '.join(renamed)}.")
    return values


def _command_line(arguments_class: type, values: dict[str, Any]) -> list[str]:
    """Convert values of a YAML file to command line arguments."""
    hints = typing.get_type_hints(arguments_class)
    argv: list[str] = []
    for name, value in values.items():
        if isinstance(value, list) and value and typing.get_origin(hints.get(name)) is list:
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, bool):
            argv.append(f"--{name}={'yes' if value else 'no'}")  # YAML reads a bare `no` as false
        elif value not in (None, []):
            argv.append(f"--{name}={value}")
    return argv


def _boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise ArgumentTypeError(f"expected true or false, got {text!r}")
    return values[text.lower()]


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"{text!r} is not valid YAML") from error


def _dictionary(text: str) -> dict[str, Any]:
    value = _yaml_value(text)
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is not a dictionary")
    return value


def _entries(arguments_class: type, rest: list[str]) -> typing.Iterator[tuple[str, str, Any]]:
    """Field, entry and value of each remaining `--field.entry value`. Anything else is an error."""
    hints = typing.get_type_hints(arguments_class)
    words = iter(rest)
    for word in words:
        name, equals, text = word.partition("=")
        field, _, entry = name.removeprefix("--").partition(".")
        if not word.startswith("--"):
            raise ValueError(f"Expected --key value or --key=value, got {word!r}.")
        if field in RENAMED:
            raise ValueError(f"The argument --{field} is now --{RENAMED[field]}.")
        if not entry or hints.get(field) != dict[str, Any]:
            close = difflib.get_close_matches(field, hints, n=3)
            hint = f"Did you mean {' or '.join('--' + name for name in close)}?" if close else "--help lists them all."
            raise ValueError(f"Unknown argument --{field}{'.' if entry else ''}{entry}. {hint}")
        if not equals and (text := next(words, None)) is None:
            raise ValueError(f"The argument {name} needs a value.")
        try:
            value = _yaml_value(text)
        except ArgumentTypeError as error:
            raise ValueError(f"Argument {name}: {error}.") from error
        yield field, entry, value


# ---------------------------------------------------------------------------------------------------------------
# Resumed runs


def save_arguments(arguments: ImageArguments, file: Path) -> None:
    """Write the arguments of a run to a YAML file that repeats it."""
    file.write_text(yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False), encoding="utf-8")


def check_resumed_arguments(arguments: TrainingArguments, file: Path) -> None:
    """
    Check that a resumed run uses the arguments in `file`, except for those that are [`Changeable`].

    Raises:
        ValueError: other arguments changed, or belong to another script or version.
    """
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    now = dataclasses.asdict(arguments)
    unknown = sorted(name for name in saved if RENAMED.get(name, name) not in now)
    if unknown:
        raise ValueError(
            f"{file.parent} belongs to another script or version, with arguments {', '.join(unknown)}: start a new "
            "run with another --output, and with --init_from if it should start from trained weights."
        )
    before = {RENAMED.get(name, name): value for name, value in saved.items()}
    hints = typing.get_type_hints(type(arguments), include_extras=True)
    fixed = [name for name in before if MAY_CHANGE not in getattr(hints[name], "__metadata__", ())]
    changed = [name for name in fixed if before[name] != now[name]]
    if now["mixed_precision"] == "auto" and "mixed_precision" in changed:
        changed.remove("mixed_precision")  # the trainer replaces it by a choice, which is checked in turn
    if changed:
        changes = ", ".join(f"--{name} {before[name]!r} -> {now[name]!r}" for name in changed)
        raise ValueError(
            f"A resumed run must use the same arguments, but these differ from {file}: {changes}. Change them back, or start "
            "a new run with another --output, and with --init_from if it should start from trained weights."
        )
