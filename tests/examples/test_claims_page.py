"""docs/claims.md shows what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "claims"))
    yield {name: importlib.import_module(name) for name in ("measure", "compare")}
    for module in ("measure", "compare", "train", "vqgan"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("script", "file", "shown"),
    [
        ("measure", "claims.json", range(4)),
        ("measure", "claims_seed_1.json", range(2)),
        ("compare", "claims_vqgan.json", range(6)),
    ],
)
def test_the_tables_of_the_page_are_those_of_the_measurements(scripts, script, file, shown):
    page = (ROOT / "docs" / "claims.md").read_text()
    measured = scripts[script].tables(json.loads((ROOT / "docs" / "assets" / file).read_text()))
    for number in shown:
        assert measured[number].count("\n") >= 3
        assert measured[number] in page
