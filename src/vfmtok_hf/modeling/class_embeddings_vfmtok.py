"""Classes of a generator: checks and dropout of labels, and new classes for a trained generator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .class_names_vfmtok import match_class_names


def check_tensor(name: str, value: Any) -> None:
    """
    Check that `value`, which the error calls `name`, is a tensor.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: use torch.as_tensor.")


def check_ids(name: str, ids: torch.Tensor, num_ids: int, wait_for_device: bool = False) -> None:
    """
    Check that `ids`, which errors call `name`, are int64 in 0 to `num_ids - 1`.

    Reading values from an accelerator synchronizes with it, so there the range is checked only with `wait_for_device`.

    Raises:
        TypeError, ValueError: they are not.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}: convert with .long().")
    if (ids.is_cpu or wait_for_device) and not torch.compiler.is_compiling() and ids.numel():
        smallest, largest = ids.aminmax()
        if smallest < 0 or largest >= num_ids:
            outlier = int(smallest if smallest < 0 else largest)
            raise ValueError(f"{name} must lie in 0 to {num_ids - 1}, got {outlier}.")


def drop_labels(class_labels: torch.Tensor, probability: float, null_class: int) -> torch.Tensor:
    """Replace each of `class_labels` with `null_class` with the given `probability`, which guidance requires."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return class_labels.masked_fill(dropped, null_class)


class ClassEmbeddingsMixin:
    """`resize_class_embeddings` for generators whose embedding table ends with the classes and the null class."""

    config: Any

    def class_embedding_table(self) -> tuple[nn.Embedding, int]:
        """The table, and the row of class 0. The other classes and the null class follow until the end of the table."""
        raise NotImplementedError

    @torch.no_grad()
    def resize_class_embeddings(self, class_names: Sequence[str]) -> list[int | None]:
        """
        Replace the classes and set `config.id2label`. A class whose name exists in the model keeps its embedding. A new one
        starts as a copy of the null class, which stands for an image of any class.

        Call it before you create the optimizer, because the table becomes a new parameter.

        Args:
            class_names (`Sequence[str]`): names of the new classes 0, 1, ...; synonyms are separated by commas.

        Returns:
            `list[int | None]`: for each new class, the old class whose embedding it keeps, or None for the null class.

        Raises:
            TypeError: `class_names` is not a list of strings.
            ValueError: there are no names, a name occurs twice, or the embeddings are offloaded.
        """
        if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
            raise TypeError(f"class_names are strings, one a class, got {class_names!r}.")
        class_names = list(class_names)
        if not class_names or len(set(class_names)) < len(class_names):
            raise ValueError(f"A generator needs distinct class names, got {class_names}.")
        old_names = [name for _, name in sorted((self.config.id2label or {}).items())]
        origins = match_class_names(class_names, old_names)
        table, first = self.class_embedding_table()
        if table.weight.is_meta:  # its hook would keep loading the old table
            raise ValueError(
                "The class embeddings are offloaded: resize them before you pass the model to accelerate."
            )
        null_row = len(table.weight) - 1
        rows = [*range(first), *(null_row if origin is None else first + origin for origin in origins), null_row]
        table.weight = nn.Parameter(table.weight[rows], requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(rows)
        self.config.num_classes = len(class_names)
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = None
        return origins


__all__ = ["ClassEmbeddingsMixin", "check_ids", "check_tensor", "drop_labels"]
