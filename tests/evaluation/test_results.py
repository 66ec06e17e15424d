"""Tables of published and measured figures, which never mix."""

import csv
import io
import json

import pytest
from huggingface_hub import ModelCardData

from vfmtok_hf.evaluation.results import (
    METRIC_NAMES,
    TASKS,
    measured_results,
    model_index,
    published_results,
    results_csv,
    results_table,
    save_measurement,
)


PUBLISHED_DATA = "ImageNet-1k 256 x 256, ADM's reference batch"


@pytest.fixture
def measured(tmp_path):
    """FID 2.5 of the published quantity, on `inception`, or of another network and other data."""

    def write(features="inception", dataset=PUBLISHED_DATA):
        path = tmp_path / "results.json"
        protocol = {"features": features, "size": 256}
        save_measurement(path, "generation", "without guidance", dataset, {"fid": 2.5}, protocol, num_images=50_000)
        return measured_results(path)

    return write


def rows_with(table: str, text: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("|") and text in line]


def test_equal_quantities_share_a_row_in_columns_of_their_own(measured):
    table = results_table(published_results("vfmtok-l"), measured())
    (row,) = rows_with(table, "without guidance | FID")
    assert row.split("|")[5:7] == [" 2.15 [1], 2.11 [2] ", " 2.5 [3] "]
    assert "[3] measured: images 50000, size 256" in table
    assert "[1] README of CVMI-Lab/VFMTok" in table


@pytest.mark.parametrize("other", [{"features": "dinov2"}, {"dataset": "emoji"}])
def test_other_networks_and_other_data_never_share_a_row(measured, other):
    rows = rows_with(results_table(published_results("vfmtok-l"), measured(**other)), "without guidance | FID")
    cells = [row.split("|")[5:7] for row in rows]
    assert cells == [[" 2.15 [1], 2.11 [2] ", " — "], [" — ", " 2.5 [3] "]]


def test_sources_that_agree_are_named_together():
    (row,) = rows_with(results_table(published_results("vfmtok-dinov2-l"), []), "rFID")
    assert "0.89 [1, 3]" in row


@pytest.mark.parametrize(
    ("model", "setting", "metric", "values"),
    [
        ("vfmtok-dinov2-l", "336 -> 256", "psnr", {20.6}),
        ("vfmtok-3b", "with guidance", "sfid", {5.46, 6.23}),
        ("vfmtok-rar-xxl", "without guidance", "fid", {1.65}),
    ],
)
def test_published_figures(model, setting, metric, values):
    found = [result for result in published_results(model) if (result.setting, result.metric) == (setting, metric)]
    assert {result.value for result in found} == values
    assert all(result.url.startswith("https://") for result in found)


def test_published_figures_name_the_images_of_their_task():
    """Reconstructions are compared with the validation images themselves, samples with ADM's reference batch."""
    data = {
        result.task: result.dataset for model in ("vfmtok-dinov2-l", "vfmtok-l") for result in published_results(model)
    }
    assert "validation" in data["reconstruction"]
    assert "reference batch" in data["generation"]


def test_every_published_figure_has_a_name_a_task_and_a_source():
    with pytest.raises(ValueError, match="Known models: ") as error:
        published_results("nobody")
    models = str(error.value).split("Known models: ")[1].rstrip(".").split(", ")
    assert len(models) == 14
    for model in models:
        for result in published_results(model):
            assert result.metric in METRIC_NAMES
            assert result.task in TASKS
            assert result.source
            assert result.url


def test_csv_says_where_each_figure_comes_from(measured):
    rows = list(csv.DictReader(io.StringIO(results_csv([*published_results("vfmtok-b"), *measured()]))))
    assert {row["origin"] for row in rows} == {"published", "measured"}
    assert rows[-1]["origin"] == "measured"
    assert float(rows[-1]["value"]) == 2.5


def test_model_index_is_what_model_cards_take(measured):
    index = model_index("vfmtok-l", measured())
    (result,) = index[0]["results"]
    assert result["metrics"][0]["value"] == 2.5
    assert "source" not in result
    data = ModelCardData(**{"model-index": index}, model_name="vfmtok-l", ignore_metadata_errors=False)
    assert data.eval_results[0].metric_value == 2.5
    published = model_index("vfmtok-l", published_results("vfmtok-l"))
    assert all(result["source"]["url"].startswith("https://") for result in published[0]["results"])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"task": "generation"}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("{")
    for name in ("other", "list", "text"):
        with pytest.raises(ValueError, match="not a results file"):
            measured_results(tmp_path / f"{name}.json")
    with pytest.raises(FileNotFoundError):
        measured_results(tmp_path / "missing.json")
