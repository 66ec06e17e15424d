"""
Tables of published and measured results, each figure with its source.

`published.json` contains all published figures. `vfmtok evaluate` writes measured ones, one JSON file per measurement. A
table row is one quantity: task, setting, metric, feature network and data. A published and a measured figure share a row only
if all of these are the same.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from vfmtok_hf.data.output_files import whole_file


METRIC_NAMES = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "inception_score": "IS ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "rfid": "rFID ↓",
    "rsfid": "rsFID ↓",
    "ris": "rIS ↑",
    "psnr": "PSNR (dB) ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "codebook_usage": "codebook usage ↑",
    "codebook_perplexity": "codebook perplexity ↑",
    "top1": "linear probe top-1 ↑",
    "mean_class_accuracy": "linear probe, mean over classes ↑",
}
OF_FEATURES = {"fid", "sfid", "inception_score", "precision", "recall", "rfid", "rsfid", "ris"}
TASKS = {
    "reconstruction": "image-to-image",
    "generation": "unconditional-image-generation",
    "linear_probe": "image-classification",
}


@dataclass(frozen=True)
class Result:
    """
    One figure.

    Args:
        task (`str`): `reconstruction`, `generation` or `linear_probe`.
        setting (`str`): distinguishes figures of one metric, such as "without guidance".
        metric (`str`): a key of `METRIC_NAMES`.
        value (`float`): the measured or published value.
        features (`str`): the feature network, or empty.
        dataset (`str`): the images.
        source (`str`): publication, or the protocol of the measurement.
        url (`str`): URL of the publication; empty for measured figures.
    """

    task: str
    setting: str
    metric: str
    value: float
    features: str
    dataset: str
    source: str
    url: str = ""

    @property
    def quantity(self) -> tuple[str, str, str, str, str]:
        """The key of a table row."""
        return self.task, self.setting, self.metric, self.features, self.dataset


def published_results(model: str) -> list[Result]:
    """
    The authors' published figures of a model, such as `"vfmtok-l"`.

    Raises:
        ValueError: the model is unknown; the error lists the known ones.
    """
    data = json.loads(files("vfmtok_hf.evaluation").joinpath("published.json").read_text(encoding="utf-8"))
    entries = [entry for entry in data["results"] if entry["model"] == model]
    if not entries:
        known = sorted({entry["model"] for entry in data["results"]})
        raise ValueError(f"There are no published figures of {model!r}. Known models: {', '.join(known)}.")
    return [
        Result(
            entry["task"],
            entry["setting"],
            metric,
            value,
            data["features"] if metric in OF_FEATURES else "",
            data["datasets"][entry["task"]],
            entry["source"]["name"],
            entry["source"]["url"],
        )
        for entry in entries
        for metric, value in entry["values"].items()
    ]


def save_measurement(
    path: Path, task: str, setting: str, dataset: str, values: dict[str, float], protocol: dict[str, Any], **more: Any
) -> None:
    """
    Write a measurement atomically to a JSON file for `measured_results`.

    Args:
        protocol (`dict`): protocol of the measurement; `features` names the network.
        more: further entries, such as `num_images` and `remarks`.
    """
    measurement = {
        "task": task,
        "setting": setting,
        "dataset": dataset,
        "values": values,
        "protocol": protocol,
        **more,
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(measurement, indent=1) + "\n", encoding="utf-8")


def measured_results(path: Path) -> list[Result]:
    """
    Read the figures in a file by `save_measurement`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a results file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no results file {path}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        protocol = dict(data["protocol"])
        features = protocol.pop("features", "")
        conditions = {"images": data["num_images"], **protocol}
        source = "measured: " + ", ".join(f"{name} {value}" for name, value in conditions.items() if value is not None)
        return [
            Result(
                data["task"],
                data["setting"],
                metric,
                value,
                features if metric in OF_FEATURES else "",
                data["dataset"],
                source,
            )
            for metric, value in data["values"].items()
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a results file of `vfmtok evaluate`: {error!r}.") from error


def results_table(published: Iterable[Result], measured: Iterable[Result]) -> str:
    """
    Markdown table with one row per quantity and separate columns for published and measured figures. If sources
    contradict each other, all values are listed with the numbers of their footnotes.
    """
    published, measured = list(published), list(measured)
    sources = list(dict.fromkeys(result.source for result in [*published, *measured]))
    rows = [
        "| task | setting | metric | data | published | measured |",
        "|---|---|---|---|---|---|",
    ]
    for quantity in dict.fromkeys(result.quantity for result in [*published, *measured]):
        task, setting, metric, features, dataset = quantity
        name = METRIC_NAMES.get(metric, metric) + (f" ({features})" if features else "")
        cells = [
            _cell([result for result in side if result.quantity == quantity], sources)
            for side in (published, measured)
        ]
        rows.append(f"| {task.replace('_', ' ')} | {setting} | {name} | {dataset} | {' | '.join(cells)} |")
    urls = {result.source: result.url for result in published}
    notes = [f"[{number}] {source}{_link(urls.get(source))}" for number, source in enumerate(sources, start=1)]
    return "\n".join(rows) + "\n\n" + "  \n".join(notes) + "\n"


def published_and_measured(results: Iterable[Result]) -> tuple[list[Result], list[Result]]:
    """Split figures into published and measured ones."""
    results = list(results)
    return [result for result in results if result.url], [result for result in results if not result.url]


def _link(url: str | None) -> str:
    return f", <{url}>" if url else ""


def _cell(results: Sequence[Result], sources: list[str]) -> str:
    """Values with the numbers of their sources; equal values are written once."""
    numbers: dict[str, list[str]] = {}
    for result in results:
        numbers.setdefault(f"{result.value:.4g}", []).append(str(sources.index(result.source) + 1))
    return ", ".join(f"{value} [{', '.join(found)}]" for value, found in numbers.items()) or "—"


def results_csv(results: Iterable[Result]) -> str:
    """CSV with a header and one line per figure; `origin` is `published` or `measured`."""
    text = io.StringIO()
    columns = ["origin", *Result.__dataclass_fields__]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow({"origin": "published" if result.url else "measured", **asdict(result)})
    return text.getvalue()


def card_metrics(results: Iterable[Result]) -> list[EvalResult]:
    """Figures in the format of the Hub's model cards: published ones with their source, measured ones without."""
    return [
        EvalResult(
            task_type=TASKS[result.task],
            task_name=f"{result.task.replace('_', ' ')}, {result.setting}",
            dataset_type=re.sub(r"\W+", "-", result.dataset.lower()).strip("-"),
            dataset_name=result.dataset,
            # The Hub's library groups figures by task and data, and uses the source of the first one for all.
            dataset_config=result.setting + (f", {result.source}" if result.url else ""),
            metric_type=result.metric,
            metric_name=METRIC_NAMES.get(result.metric, result.metric)
            + (f" ({result.features})" if result.features else ""),
            metric_value=result.value,
            metric_args=None if result.url else {"protocol": result.source},
            source_name=result.source if result.url else None,
            source_url=result.url or None,
        )
        for result in results
    ]


def model_index(model_name: str, results: Iterable[Result]) -> list[dict[str, Any]]:
    """
    The `model-index` entry of a model card's metadata.

    Args:
        results: published or measured figures. Usually a card contains only measured ones.
    """
    return eval_results_to_model_index(model_name, card_metrics(results))
