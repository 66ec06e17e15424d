"""The notebooks run, and are committed with the outputs of a run."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.test_repo_rules import ROOT


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
QUICK = ("01_tokenize_and_reconstruct",)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_whole_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert path.stat().st_size < 512 * 1024
    assert "/tmp" not in path.read_text()


def execute(path: Path) -> None:
    """In a process of its own, as in a Jupyter server; the notebook's folder stays as it is."""
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r}); from pathlib import Path; import execute; "
    code += f"execute.executed(Path({str(path)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem in QUICK], ids=lambda path: path.stem)
def test_quick_notebooks_run(path):
    execute(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in QUICK], ids=lambda path: path.stem)
def test_long_notebooks_run(path):
    execute(path)
