"""The Space's folder is complete on its own."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import vfmtok_hf


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces" / "vfmtok"
MODULES = {path.stem for path in SPACE.glob("*.py")}
API_PAGES = (ROOT / "docs" / "api").glob("*.md")
# The rule of threads for small models is the package's own, and nothing that a page of the API tells users of.
ALLOWED_MODULES = {"vfmtok_hf.cpu.threads"} | {
    name for page in API_PAGES for name in re.findall(r"^::: (vfmtok_hf\.[\w.]+)", page.read_text(), re.MULTILINE)
}


def front_matter() -> dict:
    return yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])


def test_front_matter_is_what_the_hub_reads():
    fields = front_matter()
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60
    assert fields["license"] == "apache-2.0"


def test_gradio_version_is_the_newest_tested():
    page = (ROOT / "docs" / "installation.md").read_text()
    [newest] = re.findall(r"^\| gradio \| \S+ \| (\S+) \|$", page, flags=re.MULTILINE)
    assert front_matter()["sdk_version"] == newest


def test_requirements_name_this_version_of_the_package():
    assert (SPACE / "requirements.txt").read_text() == f"vfmtok-hf[space]=={vfmtok_hf.__version__}\n"


@pytest.mark.parametrize("path", sorted(SPACE.glob("*.py")), ids=lambda path: path.name)
def test_modules_import_the_public_api_only(path):
    allowed = {"gradio", "torch", "PIL", "spaces"} | MODULES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vfmtok_hf":
            assert {alias.name for alias in node.names} <= set(vfmtok_hf.__all__)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("vfmtok_hf"):
            assert node.module in ALLOWED_MODULES
        elif isinstance(node, ast.Import):
            tops = {alias.name.split(".")[0] for alias in node.names}
            assert tops <= allowed | {
                "base64",
                "difflib",
                "html",
                "io",
                "math",
                "os",
                "queue",
                "secrets",
                "threading",
                "time",
            }


def test_every_style_of_the_examples_is_attributed():
    examples = sorted((SPACE / "examples").glob("*.png"))
    styles = {path.stem.split("_")[1] for path in examples}
    attributed = set(re.findall(r"^\| `(\w+)`", (SPACE / "examples" / "ATTRIBUTION.md").read_text(), re.MULTILINE))
    assert styles == attributed
    assert sum(path.stat().st_size for path in examples) < 700_000
