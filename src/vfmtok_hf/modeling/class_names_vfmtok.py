"""Class names, and the class of a name."""

import difflib
from collections.abc import Sequence


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

    def _suggestion(self, name: str) -> str:
        if not self.id2label:
            return "This pipeline has no class names: pass class numbers."
        closest = difflib.get_close_matches(_normalized(name), self.synonyms, n=5)
        if closest:
            return f"Did you mean {', '.join(map(repr, closest))}?"
        return f"The names are pipe.id2label.values(), such as {', '.join(map(repr, list(self.synonyms)[:5]))}."


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
    """The first synonym of a class's name in `id2label`, or its number if it has no name."""
    return id2label.get(class_id, str(class_id)).partition(",")[0].strip()


def _normalized(name: str) -> str:
    return " ".join(name.casefold().split())


__all__ = ["ClassNames", "match_class_names", "short_class_name"]
