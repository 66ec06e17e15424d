"""Names of classes, and which class a name means."""

import difflib
from collections.abc import Sequence


class ClassNames:
    """
    Class ids by name. A class answers to its whole name and to each of its comma-separated synonyms, in any case.

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
        """The classes of that name, else those with that synonym."""
        normalized = _normalized(name)
        return self.whole_names.get(normalized) or self.synonyms.get(normalized) or []

    def find(self, name: str) -> int:
        """
        The class of that name, or of that number written out.

        Raises:
            ValueError: no class or several have that name.
        """
        class_ids = self.ids(name)
        if not class_ids and name.strip().isdecimal():
            return int(name)
        if not class_ids:
            raise ValueError(f"There is no class {name!r}. {self._suggestion(name)}")
        if len(class_ids) > 1:
            candidates = ", ".join(f"{class_id} ({self.id2label[class_id]})" for class_id in class_ids)
            raise ValueError(f"{name!r} names several classes: {candidates}. Pass the number of one.")
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
    For each class of `new_names` the number of the one of `old_names` that it continues, or None.

    A class continues the one with its name, else the one with the first of its synonyms that is known. A name that fits
    several old classes, as "crane" does in ImageNet, continues none of them.
    """
    known = ClassNames(dict(enumerate(old_names)))

    def match(name: str) -> int | None:
        candidates = next(filter(None, map(known.ids, [name, *name.split(",")])), [])
        return candidates[0] if len(candidates) == 1 else None

    return [match(name) for name in new_names]


def short_class_name(id2label: dict[int, str], class_id: int) -> str:
    """The first synonym of the name that `id2label` gives to `class_id`; that number if it has no name."""
    return id2label.get(class_id, str(class_id)).partition(",")[0].strip()


def _normalized(name: str) -> str:
    return " ".join(name.casefold().split())


__all__ = ["ClassNames", "match_class_names", "short_class_name"]
