"""Lets the reference show this package's docstrings, which are laid out as in transformers, as Markdown lists."""

import re
import textwrap
from typing import Any

import griffe


SECTION = re.compile(
    r"^(Args|Returns|Raises|Raises \(on call\)|Example|Examples):[ \t]*\n((?:[ \t]+.*\n|\n)+)", re.MULTILINE
)

REFERENCE = re.compile(r"\[(`[^`]+`)\](?!\()")


class HuggingFaceDocstrings(griffe.Extension):
    """Turns `Args:` and its like, whose items are indented lines, into headed lists."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            plain = REFERENCE.sub(r"\1", obj.docstring.value + "\n")
            obj.docstring.value = SECTION.sub(section, plain).rstrip()


def section(match: re.Match) -> str:
    title, body = match.group(1), textwrap.dedent(match.group(2)).strip("\n")
    if title.startswith("Example"):
        return f"**{title}**\n\n{body}\n\n"
    if title == "Returns":
        return f"**Returns**\n\n{body}\n\n"
    return f"**{title.replace('Args', 'Arguments')}**\n\n{items(body)}\n\n"


def items(body: str) -> str:
    """Each line that is not indented begins an item; the name before its colon or bracket stands out."""
    entries: list[str] = []
    for line in body.splitlines():
        if line[:1].strip() and not (entries and entries[-1].endswith(",")):
            entries.append(line)
        elif entries:
            entries[-1] += " " + line.strip()
    return "\n".join("- " + re.sub(r"^(\w+(?:, \w+)*)", r"**\1**", entry) for entry in entries)
