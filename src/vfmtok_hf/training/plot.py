"""Curves of training runs, from their logs."""

import math
from collections import defaultdict
from pathlib import Path

from vfmtok_hf.data.output_files import whole_file
from vfmtok_hf.training.log_file import LOG_FILE, read_log


COLUMNS = 3

# Name of a quantity -> kind of log line ("train" or "validation") -> step -> value.
Curves = dict[str, dict[str, dict[int, float]]]


def read_curves(run: Path) -> Curves:
    """
    The numbers that a run logged. Of a step logged twice the later line counts.

    Raises:
        FileNotFoundError: the folder has no log.
        ValueError: the log is damaged, or no step was logged yet.
    """
    file = run / LOG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no training run: it has no {LOG_FILE}.")
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for entry in read_log(file):
        for name in entry.keys() - {"kind", "step", "time"}:
            curves[name][entry["kind"]][entry["step"]] = entry[name]
    if not curves:
        raise ValueError(f"{file} has no losses yet.")
    return curves


def plot_runs(runs: list[Path], output: Path) -> int:
    """
    One panel for each quantity, one colour for each run; validation is dashed.

    Returns:
        `int`: how many curves were drawn.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError, ValueError: as [`read_curves`].
    """
    curves_by_run = [read_curves(run) for run in runs]
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plotting needs matplotlib: pip install "vfmtok-hf[plot]"') from error

    names = sorted({name for curves in curves_by_run for name in curves})
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3 * rows + 0.5), layout="constrained")
    count = 0
    for panel, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, COLUMNS, panel, title=name, xlabel="step")
        for number, curves in enumerate(curves_by_run):
            for kind, values in curves[name].items():
                style = "-" if kind == "train" else "--"
                marker = "o" if kind != "train" or len(values) == 1 else None
                steps = sorted(values)
                heights = [values[step] for step in steps]
                axes.plot(steps, heights, style, marker=marker, markersize=3, linewidth=1, color=f"C{number % 10}")
                count += 1
        axes.grid(alpha=0.3)
    for number, run in enumerate(runs):
        figure.axes[0].plot([], [], color=f"C{number % 10}", label=run.resolve().name)
    figure.axes[0].plot([], [], "--o", color="grey", markersize=3, linewidth=1, label="validation")
    figure.legend(loc="outside upper center", ncols=len(runs) + 1)
    with whole_file(output) as file:
        figure.savefig(file, dpi=100)
    return count
