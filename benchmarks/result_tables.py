"""Tables of results, as CSV and as Markdown. Uses only the standard library."""

import csv
import io
import os
from pathlib import Path


RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def show_table(name: str, rows: list[dict[str, object]]) -> None:
    """Print the rows and save them with `write_table`."""
    for row in rows:
        print(*row.values(), sep="  ", flush=True)
    write_table(name, rows)


def write_table(name: str, rows: list[dict[str, object]]) -> None:
    """
    Add rows to results/NAME.csv, replacing earlier rows of the same measurement, and write results/NAME.md from all.

    Columns up to and including `side` say what was measured. The environment variable BENCHMARK_RESULTS names another
    folder.
    """
    keys = list(rows[0])[: list(rows[0]).index("side") + 1]
    path = RESULTS / f"{name}.csv"
    kept = read_table(path) if path.exists() else []
    rows = [{key: str(value) for key, value in row.items()} for row in rows]
    measured = {tuple(row[key] for key in keys) for row in rows}
    rows = [row for row in kept if tuple(row[key] for key in keys) not in measured] + rows
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, file.getvalue())
    write_whole(path.with_suffix(".md"), markdown(rows))


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, so an interrupted process leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, newline="")
    partial.replace(path)
