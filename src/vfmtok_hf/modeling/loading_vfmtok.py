"""
Strict loading: where transformers would continue with a warning, with random weights or with a model of another type, this
raises a one-line error that says what is wrong and what to do.
"""

import difflib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import HTTPError  # of the HTTP client that the Hub's library uses
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file


@cache
def field_types(config_class: type) -> type:
    """Types of a configuration's fields as a `TypedDict`."""
    return TypedDict(config_class.__name__, inspect.get_annotations(config_class))  # type: ignore[operator]


@contextmanager
def errors_naming(source: str) -> Iterator[None]:
    """
    Convert errors of reading `source`, a folder or repository, in this block to one line.

    Raises:
        OSError: the repository, revision or file does not exist or is not accessible.
        ValueError: it is damaged.
    """
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not os.path.exists(source):
        raise FileNotFoundError(f"There is no folder {source}.")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{source} has a damaged or truncated weights file ({error}): download it again.") from error
    except (OSError, HTTPError) as error:
        reason = f"{error} {answer_of_the_hub(error)}"
        if source not in reason:
            reason = f"{source} cannot be read: {reason}"
        raise OSError(" ".join(reason.split())) from error


@contextmanager
def subfolder_named(
    source: str, class_name: str, file: str, field: str, value: str, kwargs: dict[str, Any]
) -> Iterator[None]:
    """
    Say in which folder of a pipeline a component is, when what is read in this block is the whole pipeline.

    Args:
        source (`str`): folder or repository.
        class_name (`str`): of the component.
        file, field, value (`str`): what tells the component: a file of settings, and the value that it has in a field.
        kwargs (`dict`): those of `from_pretrained`.

    Raises:
        ValueError: `source` is such a pipeline; names the folder. Any other error passes unchanged.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        subfolder = None if "subfolder" in kwargs else component_folder(source, file, field, value, kwargs)
        if subfolder is None:
            raise
        raise ValueError(
            f"{source} is a whole pipeline: load its {class_name} with subfolder={subfolder!r}, or the pipeline with "
            "from_pretrained of its own class."
        ) from error


def component_folder(source: str, file: str, field: str, value: str, kwargs: dict[str, Any]) -> str | None:
    """Where a pipeline has a component, told as in [`subfolder_named`]. None if `source` is no pipeline with one."""
    where = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "revision", "token") if name in kwargs}

    def read(file: str, subfolder: str = "") -> dict[str, Any]:
        try:
            path = cached_file(source, file, subfolder=subfolder, **where)
            return json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
        except (OSError, ValueError):  # there is none, or it is damaged
            return {}

    names = [name for name, entry in read("model_index.json").items() if isinstance(entry, list) and name[0] != "_"]
    return next((name for name in names if read(file, name).get(field) == value), None)


def answer_of_the_hub(error: BaseException) -> str:
    """The Hub's error behind `error`, which transformers omits; empty if `error` contains it."""
    message, cause = str(error), error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__ or cause.__context__
    return "" if cause is None or str(cause) in message else f"The cause: {cause}"


# Entries that transformers adds to a configuration.
KEPT_BY_TRANSFORMERS = {"auto_map", "custom_pipelines", "quantization_config"}


class CheckedConfigMixin:
    """
    Configurations that refuse unknown fields, values of wrong types, and configurations of other models.

    The fields are the annotated attributes of a class. Whether `PreTrainedConfig` is a data class depends on transformers'
    version; it never touches classes with their own `__init__`, so each of ours defines one.
    """

    model_type: ClassVar[str]
    attribute_map: ClassVar[dict[str, str]]

    def __init__(self, **kwargs):
        """
        Raises:
            huggingface_hub.errors.StrictDataclassError: a field's value has the wrong type.
            ValueError: a field is unknown, or fields contradict each other.
        """
        kwargs = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        values = {name: kwargs.pop(name, default) for name, default in self.default_fields().items()}
        validate_typed_dict(field_types(type(self)), values)
        # Before the base class, which passes the attention implementation to nested configurations, and after it,
        # because some versions add labels.
        self._set(values)
        super().__init__(**kwargs)
        self._refuse_unknown(kwargs)
        self._set(values)
        self.complete()
        self.validate_architecture()

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        # transformers sets unknown arguments as attributes.
        known = KEPT_BY_TRANSFORMERS | vars(PreTrainedConfig()).keys()
        unknown = sorted(name for name in kwargs.keys() & vars(self).keys() - known if not hasattr(type(self), name))
        if unknown:
            close = difflib.get_close_matches(unknown[0], vars(self).keys() - set(unknown), n=3)
            suggestion = f" Did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"{type(self).__name__} has no field {unknown[0]!r}.{suggestion}")

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def default_fields(cls) -> dict[str, Any]:
        """The model's own fields with their defaults."""
        return {name: getattr(cls, name) for name in inspect.get_annotations(cls)}

    def complete(self) -> None:
        """Derive fields from other fields."""

    def validate_architecture(self) -> None:
        """Validate relations between fields."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in transformers.

        Raises:
            OSError: the folder, repository, revision or file does not exist or is not accessible.
            ValueError: it is of another model type, a whole pipeline, or has unknown fields.
        """
        source = str(pretrained_model_name_or_path)
        with (
            errors_naming(source),
            subfolder_named(source, cls.__name__, "config.json", "model_type", cls.model_type, kwargs),
        ):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As in transformers.

        Raises:
            ValueError: `config_dict` is of another model type.
        """
        model_type = config_dict.get("model_type")
        if model_type is None:  # transformers returns an empty configuration for a missing file
            raise ValueError(f"There is no config.json, or it has no model_type; expected {cls.model_type!r}.")
        if model_type != cls.model_type:
            raise ValueError(
                f"The checkpoint is a model of type {model_type!r}, not {cls.model_type!r}: pass another one, or load it "
                "with AutoModel.from_pretrained."
            )
        return super().from_dict(config_dict, **kwargs)


class CheckedModelMixin:
    """Models that load in float32 by default, raise unless the checkpoint covers every weight, and save all weights."""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers derives it from the source text, differently in each version.
        return True

    def unread_weights(self, names: list[str]) -> set[str]:
        """Select the names of weights that make no difference if the model or a checkpoint lacks them."""
        return set()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """
        As in transformers, with two differences.

        - Weights are loaded in float32 by default; `dtype="auto"` keeps the precision of the files. Half precision saves
          disk space, but it is many times slower on CPUs, changes image tokens, and loses small updates in training.
        - A checkpoint that does not cover every weight is an error, except with `output_loading_info`, to inspect the
          missing weights, or `ignore_mismatched_sizes`, to train them.

        Raises:
            OSError: the folder, repository, revision or file does not exist or is not accessible.
            ValueError: the checkpoint is damaged, of another model type or a whole pipeline, or has missing, unknown or
                mis-shaped weights.
        """
        source = str(pretrained_model_name_or_path)
        if "torch_dtype" not in kwargs:  # the older name, which transformers also accepts
            kwargs.setdefault("dtype", torch.float32)
        model_type = cls.config_class.model_type  # type: ignore[attr-defined]
        with (
            errors_naming(source),
            subfolder_named(source, cls.__name__, "config.json", "model_type", model_type, kwargs),
        ):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        if not ignore_mismatched_sizes:
            check_shapes(source, info)
            if not output_loading_info:
                check_keys(source, info, model)
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.get_state_dict_and_metadata = partial(quantized_state_dict, model.hf_quantizer)
        return (model, info) if output_loading_info else model

    @wraps(PreTrainedModel.save_pretrained)  # diffusers inspects the signature
    def save_pretrained(self, *args, **kwargs):
        """
        As in transformers.

        Raises:
            ValueError: weights are offloaded, for example by `accelerate.cpu_offload`.
        """
        has_all_weights = not any(weight.is_meta for weight in self.parameters())  # type: ignore[attr-defined]
        # transformers loads weights that are offloaded by a device map.
        if not has_all_weights and not hasattr(self, "hf_device_map"):
            raise ValueError(
                "The weights are offloaded: call accelerate.hooks.remove_hook_from_module(model, recurse=True) before "
                "saving the model."
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def quantized_state_dict(quantizer: Any, model: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """
    The tensors and metadata that transformers' quantizer writes in `save_pretrained`.

    torchao's reader fails on names without a dot, such as RAR's `cls_token`, and does not need them, because only weights
    of layers are quantized.
    """
    state_dict, metadata = type(quantizer).get_state_dict_and_metadata(quantizer, model)
    if "tensor_names" in metadata:
        names = json.loads(metadata["tensor_names"])
        metadata["tensor_names"] = json.dumps([name for name in names if "." in name])
    return state_dict, metadata


def check_shapes(source: str, info: dict[str, Any]) -> None:
    """
    Raise if weights of `source` had other shapes than those of the model.

    Args:
        info: returned by `from_pretrained` with `output_loading_info`.
    """
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise ValueError(
            f"{source} does not match its configuration: {name!r} has shape {tuple(stored)} instead of {tuple(expected)} (of "
            f"{len(mismatched)} such weights). To train them from scratch, pass ignore_mismatched_sizes=True."
        )


def check_keys(source: str, info: dict[str, Any], model: CheckedModelMixin) -> None:
    """Raise if weights that `model` reads were missing or left over; arguments as in `check_shapes`."""
    for problem, names in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        names = names and set(names) - model.unread_weights(list(names))
        if names:
            raise ValueError(
                f"{source} {problem} weights: {min(names)!r} (of {len(names)} such weights). Its files do not belong "
                "together: download them again."
            )


__all__ = ["CheckedConfigMixin", "CheckedModelMixin", "errors_naming", "subfolder_named"]
