"""The log of a run: one JSON object per line, with `kind`, `step`, `time` and named numbers."""

import json
from pathlib import Path
from typing import Any

from vfmtok_hf.data.output_files import whole_file


LOG_FILE = "log.jsonl"


def read_log(file: Path) -> list[dict[str, Any]]:
    """
    Its lines. A last line that a killed run left incomplete does not count.

    Raises:
        ValueError: another line is damaged.
    """
    lines = file.read_text().splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is not JSON: {line[:80]}") from error
    return entries


def drop_lines_after(file: Path, step: int) -> None:
    """Forget the steps after `step`, which come again."""
    if file.is_file():
        kept = [entry for entry in read_log(file) if entry["step"] <= step]
        with whole_file(file) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
