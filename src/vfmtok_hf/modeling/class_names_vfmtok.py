"""Class names, and the class of a name."""

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import Any


SHOWN_AT_MOST = 20  # names in an error


class ClassNames:
    """
    Class ids by name. A class has its whole name and each of its comma-separated synonyms, case-insensitive.

    Args:
        id2label (`dict`): class id (JSON makes it a string) to name, such as `"tench, Tinca tinca"`.
    """

    def __init__(self, id2label: dict[int | str, str]):
        self.id2label = {int(class_id): name for class_id, name in id2label.items()}
        self.whole_names: dict[str, list[int]] = {}
        self.synonyms: dict[str, list[int]] = {}
        for class_id, name in self.id2label.items():
            self.whole_names.setdefault(_normalized(name), []).append(class_id)
            for synonym in dict.fromkeys(map(_normalized, name.split(","))):
                self.synonyms.setdefault(synonym, []).append(class_id)

    def ids(self, name: str) -> list[int]:
        """The classes with that name, otherwise those with that synonym."""
        normalized = _normalized(name)
        return self.whole_names.get(normalized) or self.synonyms.get(normalized) or []

    def find(self, name: str) -> int:
        """
        The class with that name or number.

        Raises:
            ValueError: no class or several classes have that name.
        """
        class_ids = self.ids(name)
        if not class_ids and name.strip().isdecimal():
            return int(name)
        if not class_ids:
            raise ValueError(f"There is no class {name!r}. {self._suggestion(name)}")
        if len(class_ids) > 1:
            candidates = ", ".join(f"{class_id} ({self.id2label[class_id]})" for class_id in class_ids)
            raise ValueError(f"{name!r} is the name of several classes: {candidates}. Pass a class number.")
        return class_ids[0]

    def find_all(self, class_labels: Any, num_classes: int) -> list[int]:
        """
        Class ids of ids and names, one or several.

        Args:
            class_labels (`int`, `str` or a list of them): an iterable or a scalar of another library will do.
            num_classes (`int`): ids are below it.

        Raises:
            ValueError: an unknown or ambiguous name, an id that is not below `num_classes`, or no label.
            TypeError: a label that is neither a name nor an integer.
        """
        # Scalars of torch and numpy are iterable by type, and single by shape.
        is_scalar = not isinstance(class_labels, Iterable) or getattr(class_labels, "shape", None) == ()
        if isinstance(class_labels, str) or is_scalar:
            class_labels = [class_labels]
        try:
            class_ids = [
                self.find(label) if isinstance(label, str) else operator.index(label) for label in class_labels
            ]
        except TypeError as error:
            raise TypeError(f"Class labels are names or integers, one or several; got {class_labels!r}.") from error
        if not class_ids:
            raise ValueError("There are no class labels: pass at least one.")
        for class_id in class_ids:
            if not 0 <= class_id < num_classes:
                raise ValueError(f"Class labels must be in 0 to {num_classes - 1}, got {class_id}.")
        return class_ids

    def _suggestion(self, name: str) -> str:
        if not self.id2label:
            return "This pipeline has no class names: pass class numbers."
        closest = difflib.get_close_matches(_normalized(name), self.synonyms, n=5)
        if closest:
            return f"Did you mean {', '.join(map(repr, closest))}?"
        names = [short_class_name(self.id2label, class_id) for class_id in self.id2label]
        shown = names if len(names) <= SHOWN_AT_MOST else [*names[:5], "..."]
        return f"The {len(names)} classes are {', '.join(shown)}."


def match_class_names(new_names: Sequence[str], old_names: Sequence[str]) -> list[int | None]:
    """
    For each class of `new_names`, the number of the matching class of `old_names`, or None.

    A class matches the one with its name, otherwise the one with its first known synonym. A name of several old classes,
    such as "crane" in ImageNet, matches none of them.
    """
    known = ClassNames(dict(enumerate(old_names)))

    def match(name: str) -> int | None:
        candidates = next(filter(None, map(known.ids, [name, *name.split(",")])), [])
        return candidates[0] if len(candidates) == 1 else None

    return [match(name) for name in new_names]


def short_class_name(id2label: dict[int, str], class_id: int) -> str:
    """The first synonym of the name of `class_id` in `id2label`, or its number if it has no name."""
    return id2label.get(class_id, str(class_id)).partition(",")[0].strip()


def _normalized(name: str) -> str:
    return " ".join(name.casefold().split())


__all__ = ["ClassNames", "match_class_names", "short_class_name"]
