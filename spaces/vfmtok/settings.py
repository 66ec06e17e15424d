"""The settings of a generation. The form, the API and links are checked by the same rules."""

import difflib
import html
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache

import gradio as gr

from model import CODEBOOK_SIZE, IS_DEFAULT_CHECKPOINT, PIPE, SAMPLING


# Name -> lowest value, highest value, step of the slider. Integer steps make integers.
RANGES = {
    "images": (1, 8, 1),
    "seed": (0, 2**31 - 1, 1),
    "temperature": (0.1, 2.0, 0.05),
    "top_k": (0, CODEBOOK_SIZE, 1),
    "top_p": (0.05, 1.0, 0.05),
    "guidance": (1.0, 4.0, 0.05),
}


@cache
def class_choices() -> list[tuple[str, str]]:
    """(all names, shortest text that identifies this class) for each class."""
    choices = []
    for class_id, names in PIPE.id2label.items():
        short = names.split(",")[0].strip()
        choices.append((names, short if means_class(short, class_id) else str(class_id)))
    return choices


def means_class(name: str, class_id: int) -> bool:
    """Whether a name identifies this class and no other."""
    try:
        return PIPE.get_label_ids(name) == [class_id]
    except ValueError:
        return False


@dataclass(frozen=True)
class Settings:
    """Settings of one generation. `top_k` 0, `top_p` 1 and `guidance` 1 are off."""

    label: str
    images: int = 4
    seed: int = 1
    temperature: float = SAMPLING.temperature
    top_k: int = SAMPLING.top_k
    top_p: float = SAMPLING.top_p
    guidance: float = 1.0

    @classmethod
    def checked(cls, label: str, **numbers: float) -> "Settings":
        """
        Settings from the form or from an API call.

        Raises:
            gr.Error: a value is invalid.
        """
        try:
            return cls(check_label(label), **{name: check_number(name, number) for name, number in numbers.items()})
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    @classmethod
    def from_link(cls, parameters: Mapping[str, str]) -> "Settings":
        """Settings from a page's query parameters. Missing values are defaults; invalid ones too, with a warning."""
        usable = {"label": DEFAULT_LABEL}
        for name in ("label", *RANGES):
            if name in parameters:
                try:
                    text = parameters[name]
                    usable[name] = check_label(text) if name == "label" else check_number(name, text)
                except ValueError as error:
                    gr.Warning(f"The link's value of {name} is ignored. {error}")
        return cls(**usable)

    def values(self) -> list:
        """The values in the order of the form."""
        return list(asdict(self).values())

    @property
    def class_id(self) -> int:
        """The class that `label` names."""
        return PIPE.get_label_ids(self.label)[0]


def check_label(label: str) -> str:
    """
    The text in the class picker for a name or number of a class.

    Raises:
        ValueError: there is no such class. The page shows the message as HTML, so user input is escaped.
    """
    label = str(label or "")[:100]
    try:
        (class_id,) = PIPE.get_label_ids(label)
    except ValueError:
        closest = difflib.get_close_matches(label.casefold(), [short for _, short in class_choices()], n=1)
        cure = f"Did you mean {closest[0]!r}?" if closest else "Choose a class from the list."
        raise ValueError(html.escape(f"There is no class {label!r}. {cure}")) from None
    return dict(zip(PIPE.id2label, class_choices(), strict=True))[class_id][1]


def check_number(name: str, value: float | str | None) -> float | int:
    """
    A number within its range.

    Raises:
        ValueError: not a number, or out of range. The message does not contain user input.
    """
    low, high, step = RANGES[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name.replace('_', '-').capitalize()} must be a number from {low} to {high}.")
    return int(number) if step == 1 else number


def random_seed() -> int:
    """A random seed of at most six digits."""
    return secrets.randbelow(1_000_000)


# The page opens with this class. For other checkpoints it is the first one.
DEFAULT_LABEL = "heart" if IS_DEFAULT_CHECKPOINT else class_choices()[0][1]
