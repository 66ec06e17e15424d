"""Classes of a generator: labels dropped in training, and new classes for a trained one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .class_names_vfmtok import match_class_names


def drop_labels(class_labels: torch.Tensor, probability: float, null_class: int) -> torch.Tensor:
    """Replace each of `class_labels` by `null_class` with the given `probability`, which teaches the model what guidance needs."""
    dropped = torch.rand(class_labels.shape, device=class_labels.device) < probability
    return class_labels.masked_fill(dropped, null_class)


class ClassEmbeddingsMixin:
    """`resize_class_embeddings` for generators whose embedding table ends with one row a class and the null class."""

    config: Any

    def class_embedding_table(self) -> tuple[nn.Embedding, int]:
        """The table, and the row of class 0. The rows of the other classes and of the null class follow, to the end."""
        raise NotImplementedError

    @torch.no_grad()
    def resize_class_embeddings(self, class_names: Sequence[str]) -> list[int | None]:
        """
        Replace the classes, which become `config.id2label`. A class whose name the model knows keeps its embedding,
        wherever it was; a new one starts as a copy of the null class, that is, as an image of any class.

        Call it before the optimizer is made: the table becomes another parameter.

        Args:
            class_names (`Sequence[str]`): names of the new classes 0, 1, ...; synonyms are separated by commas.

        Returns:
            `list[int | None]`: for each new class the old class whose embedding it has; None for the null class.

        Raises:
            ValueError: there are no names, one occurs twice, or accelerate has put the embeddings elsewhere.
        """
        class_names = list(class_names)
        if not class_names or len(set(class_names)) < len(class_names):
            raise ValueError(f"A generator needs classes of different names, got {class_names}.")
        old_names = [name for _, name in sorted((self.config.id2label or {}).items())]
        origins = match_class_names(class_names, old_names)
        table, first = self.class_embedding_table()
        if table.weight.is_meta:  # its hook would go on loading the old table
            raise ValueError(
                "The class embeddings are offloaded: resize them before the model is given to accelerate."
            )
        null_row = len(table.weight) - 1
        rows = [*range(first), *(null_row if origin is None else first + origin for origin in origins), null_row]
        table.weight = nn.Parameter(table.weight[rows], requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(rows)
        self.config.num_classes = len(class_names)
        self.config.id2label = dict(enumerate(class_names))
        self.config.label2id = None
        return origins


__all__ = ["ClassEmbeddingsMixin", "drop_labels"]
