"""The log of a run: one JSON object per line, with `kind`, `step`, `time` and named numbers."""

import json
from collections import defaultdict
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


def read_curves(run: Path) -> dict[str, dict[str, dict[int, float]]]:
    """
    The numbers that a run logged: quantity -> kind of line (`train` or `validation`) -> step -> value. Of a step logged
    twice the later line counts.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: the log is damaged, or no step was logged yet.
    """
    file = run / LOG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no training run: it has no {LOG_FILE}.")
    curves: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in read_log(file):
        for name in entry.keys() - {"kind", "step", "time"}:
            curves[name][entry["kind"]][entry["step"]] = entry[name]
    if not curves:
        raise ValueError(f"{file} has no losses yet.")
    return curves


def drop_lines_after(file: Path, step: int) -> None:
    """Forget the steps after `step`, which come again."""
    if file.is_file():
        kept = [entry for entry in read_log(file) if entry["step"] <= step]
        with whole_file(file) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
