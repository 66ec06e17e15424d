"""
Run the notebooks and save their outputs, with images small enough for a repository.

    python examples/notebooks/execute.py [NOTEBOOK...]
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


FOLDER = Path(__file__).parent


def executed(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """A notebook with fresh outputs. An error in a cell raises `CellExecutionError`, which shows it."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(notebook, timeout=timeout, resources=resources, record_timing=False).execute()


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Pictures in 128 colors take a third of the bytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).convert("RGB")
                file = io.BytesIO()
                picture.quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
                output["data"]["image/png"] = base64.b64encode(file.getvalue()).decode()


def drop_chatter(notebook: nbformat.NotebookNode) -> None:
    """Progress bars and warnings on stderr, and descriptions of figures beside the figures."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output["data"].pop("text/plain", None)


def main(names: list[str]) -> None:
    paths = [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        notebook = executed(path)
        drop_chatter(notebook)
        shrink_pictures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
