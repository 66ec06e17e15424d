"""Typed training arguments: dataclass defaults < YAML file < `--key value` on the command line."""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml


Arguments = TypeVar("Arguments")

# What a continued run may change: how long and how fast it learns from here on, where its files lie, what it reports.
FREE_WHEN_RESUMED = {
    *("max_steps", "learning_rate", "discriminator_learning_rate", "schedule", "final_learning_rate"),
    *("max_gradient_norm", "weight_decay", "rar_random_until", "rar_raster_from"),
    *("train_data", "validation_data", "output", "vgg_weights", "discriminator_model"),
    *("num_workers", "cache_images", "resume", "tracker"),
    *("log_every", "validate_every", "sample_every", "checkpoint_every", "keep_checkpoints", "grid_images"),
    *("samples_per_class", "sample_classes"),
}


def parse_arguments(arguments_class: type[Arguments], argv: list[str]) -> Arguments:
    """
    Read `[--config FILE] [--key value]...` into a dataclass. Keys of a dictionary field are reached with a dot
    (`--model.hidden_size 128`); values are YAML (`true`, `0.5`, `[1, 2]`).

    Raises:
        ValueError: an unknown key (the closest ones are named), a missing or wrongly typed value.
        FileNotFoundError: the config file does not exist.
    """
    overrides = _pairs(argv)
    config_file = overrides.pop("config", None)
    values = _read_yaml(config_file) if config_file else {}
    for key, text in overrides.items():
        field, _, entry = key.partition(".")
        value = yaml.safe_load(text)
        if entry:
            values[field] = {**(values.get(field) or {}), entry: value}
        else:
            values[field] = value
    return from_values(arguments_class, values)


def from_values(arguments_class: type[Arguments], values: dict[str, Any]) -> Arguments:
    """A dataclass from a dictionary, each value checked against its field's type."""
    types = typing.get_type_hints(arguments_class)
    for key in values:
        if key not in types:
            close = difflib.get_close_matches(key, types, n=3) or sorted(types)
            raise ValueError(f"Unknown argument {key!r}. Did you mean one of {close}?")
    required = [
        field.name
        for field in dataclasses.fields(arguments_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"Missing arguments: {', '.join('--' + name for name in missing)}.")
    return arguments_class(**{key: _typed(key, value, types[key]) for key, value in values.items()})


def save_arguments(arguments: Any, file: Path) -> None:
    """Write the arguments of a run as the YAML file that repeats it."""
    file.write_text(yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False))


def check_resumed_arguments(arguments: Any, file: Path) -> None:
    """
    A continued run keeps the arguments that `save_arguments` wrote to `file`, apart from [`FREE_WHEN_RESUMED`].

    Raises:
        ValueError: others have changed, or belong to another script.
    """
    before, now = _read_yaml(str(file)), dataclasses.asdict(arguments)
    unknown = sorted(before.keys() - now.keys())
    if unknown:
        raise ValueError(f"{file.parent} is a run of another script or version, with arguments {', '.join(unknown)}.")
    fixed = [name for name in before if name not in FREE_WHEN_RESUMED and before[name] != now[name]]
    if fixed:
        changes = ", ".join(f"--{name} {before[name]!r} -> {now[name]!r}" for name in fixed)
        raise ValueError(
            f"A continued run keeps its arguments, but these differ from {file}: {changes}. Take them back, or start "
            "another run in a new --output, with --init_from if it should begin at trained weights."
        )


def _pairs(argv: list[str]) -> dict[str, str]:
    if len(argv) % 2 or not all(key.startswith("--") for key in argv[::2]):
        raise ValueError(f"Arguments must be `--key value` pairs, got: {' '.join(argv)}")
    return {key[2:].replace("-", "_"): value for key, value in zip(argv[::2], argv[1::2], strict=True)}


def _read_yaml(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"Config file {file} does not exist.")
    values = yaml.safe_load(Path(file).read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"Config file {file} must hold `key: value` lines.")
    return values


def _typed(key: str, value: Any, expected: Any) -> Any:
    options = typing.get_args(expected)
    if typing.get_origin(expected) is typing.Literal:
        value = "no" if value is False else value  # what YAML makes of a bare `no`
        if value not in options:
            raise ValueError(f"--{key} must be one of {list(options)}, got {value!r}.")
        return value
    if type(None) in options:
        if value is None:
            return None
        expected = next(option for option in options if option is not type(None))
    if expected is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 1e-3 as text and 1 as an integer.
        try:
            return float(value)
        except ValueError:
            pass
    expected = typing.get_origin(expected) or expected
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"--{key} must be {expected.__name__}, got {value!r}.")
    return value
