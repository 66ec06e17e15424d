"""docs/claims.md shows what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "claims"))
    yield importlib.import_module("measure").tables
    for module in ("measure", "train"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(("file", "shown"), [("claims.json", range(4)), ("claims_seed_1.json", range(2))])
def test_the_tables_of_the_page_are_those_of_the_measurements(tables, file, shown):
    page = (ROOT / "docs" / "claims.md").read_text()
    measured = tables(json.loads((ROOT / "docs" / "assets" / file).read_text()))
    for number in shown:
        assert measured[number].count("\n") >= 5
        assert measured[number] in page
