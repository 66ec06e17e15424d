"""
Arguments of the trainers and of token extraction, as dataclasses that transformers' `HfArgumentParser` reads: defaults,
then a YAML file, then the command line.
"""

import dataclasses
import difflib
import json
import sys
import typing
from argparse import SUPPRESS, ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


T = TypeVar("T")

MAY_CHANGE = "may change when a run is continued"
# What a continued run may change: how long and how fast it learns from here on, where its files lie, what it reports.
Changeable = Annotated[T, MAY_CHANGE]

# Names of earlier versions.
RENAMED = {
    "variants": "num_crops",
    "neighbours": "codebook_top_k",
    **{f"{term}_weight": f"model.{term}_loss_weight" for term in ("feature", "codebook", "commitment", "entropy")},
}


@dataclass(kw_only=True)
class ImageArguments:
    """How images are read: of both trainers and of token extraction."""

    split: str = HfArg(default="train", help="Split of what the datasets library reads.")
    image_column: str | None = HfArg(default=None, help="Column of the images. Default: found by type and name.")
    label_column: str | None = HfArg(default=None, help="Column of the labels. Default: found by type and name.")
    class_names: str | None = HfArg(
        default=None, help='JSON file with "id2label". Default: the names that the data have.'
    )
    crop_scale: list[float] = HfArg(
        default_factory=lambda: [0.8, 1.0],
        help="Range of the side of random crops, as a share of the image's shorter side.",
    )
    horizontal_flip: bool = HfArg(default=True, help="Mirror half of the random crops.")
    batch_size: int = HfArg(default=32, help="Images of each process and forward pass.")
    num_workers: Changeable[int] = HfArg(default=0, help="Processes that read images, for each training process.")
    seed: int = HfArg(default=0, help="Of all random numbers.")


@dataclass(kw_only=True)
class TrainingArguments(ImageArguments):
    """What both trainers ask for; each adds its own."""

    # Data
    train_data: Changeable[str] = HfArg(
        help="Training images, of any source in docs/training.md; for generators also token sets."
    )
    validation_data: Changeable[str | None] = HfArg(
        default=None, help="The same, never trained on. Default: a part of the training images is held out."
    )
    validation_share: float = HfArg(default=0.1, help="Share of each class to hold out without --validation_data.")
    validation_split: str = HfArg(default="validation", help="Split of --validation_data.")
    streaming: bool = HfArg(default=False, help="Read front to back: for data that are too large or far away.")
    epoch_images: int | None = HfArg(
        default=None, help="Images, or token sequences, of an epoch of a stream that does not state it."
    )
    shuffle_buffer: int = HfArg(
        default=1000, help="Encoded images, or token sequences, of a stream that each worker draws from."
    )
    balance_power: float = HfArg(default=0.0, help="Classes of n images are drawn with weight n ** (1 - this).")
    # Run
    output: Changeable[str] = HfArg(help="Folder of the run.")
    resume: Changeable[bool] = HfArg(default=False, help="Continue from the newest checkpoint in --output.")
    accept_changed_data: Changeable[bool] = HfArg(
        default=False, help="Continue though the data are others than at the start of the run."
    )
    init_from: str | None = HfArg(default=None, help="Folder or repository of a trained model to start from.")
    model: dict[str, Any] = HfArg(
        default_factory=dict,
        help="Configuration fields of a new model, also one by one: --model.hidden_size=256. Of a trained "
        "tokenizer its *_loss_weight fields alone.",
    )
    # Optimizer
    max_steps: Changeable[int] = HfArg(default=10_000, help="Optimizer steps.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Forward passes of each optimizer step.")
    learning_rate: Changeable[float] = HfArg(default=1e-4, help="Its peak.")
    warmup_steps: int = HfArg(default=100, help="Steps in which the learning rate rises to its peak.")
    schedule: Changeable[Literal["constant", "cosine", "linear"]] = HfArg(
        default="constant", help="Learning rate after the warm-up."
    )
    final_learning_rate: Changeable[float] = HfArg(
        default=0.01, help="End of a falling schedule, as a share of the peak."
    )
    beta1: float = HfArg(default=0.9, help="Of Adam.")
    beta2: float = HfArg(default=0.95, help="Of Adam.")
    weight_decay: Changeable[float] = HfArg(default=0.0, help="Of AdamW.")
    max_gradient_norm: Changeable[float] = HfArg(default=1.0, help="Gradients of a larger norm are scaled to it.")
    ema_decay: float = HfArg(default=0.9999, help="Weight of the past in the moving average; 0: no average.")
    # System
    attention: Literal["auto", "sdpa", "eager"] = HfArg(
        default="auto", help="auto: what is fastest here, in blocks on CPUs in bfloat16 or with dropout, else sdpa."
    )
    mixed_precision: Literal["auto", "no", "bf16"] = HfArg(
        default="no", help="auto: bf16 where this machine computes it faster than float32, which the log tells."
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Less memory, more time.")
    compile: bool = HfArg(default=False, help="By torch.compile.")
    # Reports
    tracker: Changeable[list[str]] = HfArg(
        default_factory=list, help="Beside log.jsonl, any of tensorboard, trackio, wandb."
    )
    log_every: Changeable[int] = HfArg(default=20, help="Steps between lines of the log.")
    validate_every: Changeable[int] = HfArg(default=500, help="Steps between validations, which also save model/.")
    checkpoint_every: Changeable[int] = HfArg(default=500, help="Steps between checkpoints.")
    keep_checkpoints: Changeable[int] = HfArg(default=2, help="How many of the newest checkpoints stay.")


@dataclass(kw_only=True)
class TokenizerArguments(TrainingArguments):
    """Arguments of `train_tokenizer.py`."""

    cache_images: Changeable[bool] = HfArg(default=False, help="Keep decoded images in memory.")
    # Model
    vision_model: str | None = HfArg(
        default=None, help="Folder or repository of the pretrained vision model of a new tokenizer."
    )
    trainable: Literal["all", "decoder"] = HfArg(
        default="all", help="decoder: vision model, encoder and codebook stay, and with them all image tokens."
    )
    # Losses on pixels; those of features and codebook are weighted in the model's configuration (*_loss_weight). A
    # weight of 0 switches a term off.
    l1_weight: float = HfArg(default=0.0, help="Of the absolute error of pixels.")
    mse_weight: float = HfArg(default=2.0, help="Of the squared error of pixels, which the original counts twice.")
    lpips_weight: float = HfArg(default=0.0, help="Of LPIPS.")
    lpips_dropout: float = HfArg(default=0.0, help="Dropout within LPIPS; the original's is 0.5.")
    vgg_weights: Changeable[str | None] = HfArg(
        default=None, help="File of torchvision's VGG-16 for LPIPS. Default: torch's cache, or a download into it."
    )
    perceptual_weight: float = HfArg(default=1.0, help="Of the distance between features of the frozen vision model.")
    adversarial_weight: float = HfArg(default=0.0, help="Of the adversarial loss.")
    adversarial_start_step: int = HfArg(default=0, help="Steps before discriminator and adversarial loss begin.")
    adaptive_adversarial_weight: bool = HfArg(
        default=False, help="Balance the adversarial loss with the gradient of the losses on pixels."
    )
    discriminator: Literal["dino", "patch"] = HfArg(default="patch", help="dino is the original's.")
    discriminator_model: Changeable[str] = HfArg(
        default="facebook/dino-vits16", help="Folder or repository of the vision transformer under dino."
    )
    discriminator_learning_rate: Changeable[float] = HfArg(default=1e-4, help="Constant.")
    # Codebook
    codebook_warmup_steps: int = HfArg(
        default=0, help="Steps as a plain autoencoder, after which k-means on its latents fills the codebook."
    )
    kmeans_images: int = HfArg(default=512, help="Images whose latents k-means reads.")
    restart_patience: int = HfArg(default=0, help="Steps after which an idle codebook row is re-seeded; 0: never.")
    restart_until: float = HfArg(default=0.8, help="Share of the run after which rows are left alone.")
    # System
    channels_last: bool = HfArg(default=False, help="Memory format of convolutions.")
    grid_images: Changeable[int] = HfArg(default=16, help="Images in the picture of reconstructions.")


@dataclass(kw_only=True)
class GeneratorArguments(TrainingArguments):
    """Arguments of `train_generator.py`."""

    # Data
    tokenizer: str | None = HfArg(
        default=None, help="Folder or repository of a VFMTokModel or pipeline. Default: that of --init_from."
    )
    num_crops: int = HfArg(
        default=4,
        aliases=["--variants"],  # its name in commands of version 0.1
        help="Random crops of each training image that become tokens once; 0: tokens anew in every step.",
    )
    codebook_top_k: int = HfArg(
        default=1, help="Token sequences of each crop: 2 adds its second-nearest codebook rows (VFMTok-RAR)."
    )
    # Model
    generator: Literal["ar", "rar"] = HfArg(default="ar", help="Kind of a new one.")
    lora_rank: int = HfArg(default=0, help="Of low-rank adapters; 0: all weights are trained.")
    lora_alpha: float = HfArg(default=16.0, help="Adapters are scaled by this / rank.")
    lora_dropout: float = HfArg(default=0.0, help="Of the adapters' input.")
    rar_random_until: Changeable[float] = HfArg(default=0.5, help="Share of the run with random orders only (RAR).")
    rar_raster_from: Changeable[float] = HfArg(
        default=0.75, help="Share of the run after which the order is raster only; linear in between (RAR)."
    )
    # Optimizer, where it differs from the tokenizer's
    batch_size: int = HfArg(default=64, help="Images of each process and forward pass.")
    weight_decay: Changeable[float] = HfArg(default=0.05, help="Of AdamW.")
    class_learning_rate_scale: float = HfArg(
        default=1.0, help="Of class embeddings: new classes may need more (AR, and RAR with LoRA)."
    )
    # Samples
    sample_every: Changeable[int] = HfArg(default=1000, help="Steps between pictures of samples.")
    samples_per_class: Changeable[int] = HfArg(default=4, help="Samples of each class in a picture.")
    sample_classes: Changeable[int] = HfArg(default=32, help="How many classes to sample, the first ones.")
    temperature: float | None = HfArg(
        default=None, help="Of samples and of the saved generation config. Default: what that says."
    )
    top_k: int | None = HfArg(default=None, help="The same.")


@dataclass(kw_only=True)
class ExtractionArguments(ImageArguments):
    """Arguments of `extract_tokens.py`."""

    data: str = HfArg(help="Folder of class folders, or files or repository of the datasets library.")
    tokenizer: str = HfArg(help="Folder or repository of a VFMTokModel or of a pipeline.")
    output: str = HfArg(help="Folder of the token set.")
    crops: Literal["random", "ten", "center"] = HfArg(default="random", help="Views of each image.")
    num_crops: int = HfArg(
        default=4,
        aliases=["--variants"],  # its name in commands of version 0.1
        help="Random crops of each image.",
    )
    ten_crop_ranges: list[float] = HfArg(default_factory=lambda: [1.1], help="Ten crops for each of these.")
    codebook_top_k: int = HfArg(
        default=1, help="Token sequences of each view: 2 adds its second-nearest codebook rows (VFMTok-RAR)."
    )
    shard_size: int = HfArg(default=4096, help="Images of each file.")


# ---------------------------------------------------------------------------------------------------------------
# Reading


Arguments = TypeVar("Arguments", bound=ImageArguments)


class _Parser(HfArgumentParser):
    """`HfArgumentParser` that raises `ValueError` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. --help lists all arguments.")


def parse_arguments(
    arguments_class: type[Arguments], argv: list[str] | None = None, command: str | None = None
) -> Arguments:
    """
    Read `[--config FILE] [--key value | --key=value]...` into a dataclass. Entries of a dictionary are reached with a
    dot (`--model.hidden_size=128`); `--help` prints all arguments and exits.

    Args:
        argv (`list[str]`, *optional*): defaults to the command line.
        command (`str`, *optional*): how the script is called, for the help.

    Raises:
        ValueError: an unknown argument (the closest ones are named), a missing one, or a value of another type.
        FileNotFoundError: the config file does not exist.
    """
    config = {"metavar": "FILE", "default": SUPPRESS, "help": "YAML file of arguments; the command line overrides it."}
    files = _Parser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", **config)
    found, argv = files.parse_known_args(sys.argv[1:] if argv is None else argv)
    if "config" in found:
        # A file is the arguments it lists, in front of the others.
        argv = [*_command_line(arguments_class, _read_yaml(Path(found.config))), *argv]
    parser = _Parser(
        arguments_class,
        prog=command,
        usage="%(prog)s [--config FILE] [--key value]...",
        allow_abbrev=False,
    )
    parser.add_argument("--config", **config)
    parser.register("type", dict[str, Any], _dictionary)
    arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    for name, entry, value in _entries(arguments_class, rest):
        setattr(arguments, name, {**getattr(arguments, name), entry: value})
    return arguments


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"Config file {file} does not exist.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"Config file {file} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Config file {file} must hold `key: value` lines.")
    renamed = [f"{name} is now {RENAMED[name]}" for name in values if name in RENAMED]
    if renamed:
        raise ValueError(f"Config file {file} has names of an earlier version: {', '.join(renamed)}.")
    return values


def _command_line(arguments_class: type, values: dict[str, Any]) -> list[str]:
    """Values of a YAML file as one would type them."""
    types = typing.get_type_hints(arguments_class)
    argv: list[str] = []
    for name, value in values.items():
        if isinstance(value, list) and value and typing.get_origin(types.get(name)) is list:
            argv += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            argv.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, bool):
            argv.append(f"--{name}={'yes' if value else 'no'}")  # YAML takes a bare `no` for one
        elif value not in (None, []):
            argv.append(f"--{name}={value}")
    return argv


def _dictionary(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"{text!r} is no YAML") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r} is no dictionary")
    return value


def _entries(arguments_class: type, rest: list[str]) -> typing.Iterator[tuple[str, str, Any]]:
    """Field, entry and value of each `--field.entry value` of what the parser left over, which must all be such."""
    types = typing.get_type_hints(arguments_class)
    words = iter(rest)
    for word in words:
        name, equals, text = word.partition("=")
        field, _, entry = name.removeprefix("--").partition(".")
        field = field.replace("-", "_")
        if not word.startswith("--"):
            raise ValueError(f"Expected --key value or --key=value, got {word!r}.")
        if field in RENAMED:
            raise ValueError(f"The argument --{field} is now --{RENAMED[field]}.")
        if not entry or types.get(field) != dict[str, Any]:
            close = difflib.get_close_matches(field, types, n=3)
            hint = f"Did you mean {' or '.join('--' + name for name in close)}?" if close else "--help lists them all."
            raise ValueError(f"Unknown argument --{field}{'.' if entry else ''}{entry}. {hint}")
        if not equals and (text := next(words, None)) is None:
            raise ValueError(f"The argument {name} needs a value.")
        yield field, entry, yaml.safe_load(text)


# ---------------------------------------------------------------------------------------------------------------
# Continued runs


def save_arguments(arguments: ImageArguments, file: Path) -> None:
    """Write the arguments of a run as the YAML file that repeats it."""
    file.write_text(yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False), encoding="utf-8")


def check_resumed_arguments(arguments: ImageArguments, file: Path) -> None:
    """
    A continued run keeps the arguments that `save_arguments` wrote to `file`, apart from those that are [`Changeable`].

    Raises:
        ValueError: others have changed, or belong to another script or version.
    """
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    now = dataclasses.asdict(arguments)
    unknown = sorted(name for name in saved if RENAMED.get(name, name) not in now)
    if unknown:
        raise ValueError(
            f"{file.parent} is a run of another script or version, with arguments {', '.join(unknown)}: start another "
            "run in a new --output, with --init_from if it should begin at trained weights."
        )
    before = {RENAMED.get(name, name): value for name, value in saved.items()}
    types = typing.get_type_hints(type(arguments), include_extras=True)
    fixed = [name for name in before if MAY_CHANGE not in getattr(types[name], "__metadata__", ())]
    changed = [name for name in fixed if before[name] != now[name]]
    if changed:
        changes = ", ".join(f"--{name} {before[name]!r} -> {now[name]!r}" for name in changed)
        raise ValueError(
            f"A continued run keeps its arguments, but these differ from {file}: {changes}. Take them back, or start "
            "another run in a new --output, with --init_from if it should begin at trained weights."
        )
