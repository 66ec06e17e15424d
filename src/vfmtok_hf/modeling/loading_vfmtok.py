"""
Loading that is total: where transformers would go on with a warning, with random weights for those that a checkpoint
lacks or in a model of another type, this stops with one line that names the cause and the cure.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HTTPError  # of whichever HTTP client the Hub's library uses
from safetensors import SafetensorError


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """
    Say in one line what is wrong with `source`, a folder or repository that is read in this block.

    Raises:
        OSError: it cannot be had: no such repository, revision or file, no access, no connection.
        ValueError: it is damaged.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{source} has a damaged or truncated weights file ({error}): fetch it again.") from error
    except (OSError, HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(reason if source in reason else f"{source} cannot be read: {reason}") from error


class CheckedConfigMixin:
    """Configurations that are not made from those of other models."""

    model_type: str

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As in transformers.

        Raises:
            ValueError: `config_dict` is of another model type.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"The checkpoint is a model of type {model_type!r}, not {cls.model_type!r}: name another one, or load it "
                "with AutoModel.from_pretrained."
            )
        return super().from_dict(config_dict, **kwargs)


class CheckedModelMixin:
    """Models that are filled by their checkpoint, or not loaded."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers, but a checkpoint that does not fill the model is an error, unless the caller asks for
        `output_loading_info`, to look at what is missing, or for `ignore_mismatched_sizes`, to train it anew.

        Raises:
            OSError: there is no such folder, repository, revision or file, or no access or connection to it.
            ValueError: the checkpoint is damaged, of another model type, or has missing, unknown or mis-shaped weights.
        """
        with one_line_errors(str(pretrained_model_name_or_path)):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        if output_loading_info:
            return model, info
        if not kwargs.get("ignore_mismatched_sizes"):
            check_loading_info(str(pretrained_model_name_or_path), info)
        return model


def check_loading_info(source: str, info: dict[str, Any]) -> None:
    """
    Raise unless the weights of `source` were exactly those of the model.

    Args:
        info: what `from_pretrained` returns with `output_loading_info`.
    """
    for problem, keys in (("lacks", info["missing_keys"]), ("has unknown", info["unexpected_keys"])):
        if keys:
            first, more = min(keys), len(keys) - 1
            listing = f"{first!r}" + (f" and {more} more" if more else "")
            raise ValueError(
                f"{source} {problem} weights: {listing}. Its files do not belong together: fetch it again."
            )


__all__ = ["CheckedConfigMixin", "CheckedModelMixin", "check_loading_info", "one_line_errors"]
