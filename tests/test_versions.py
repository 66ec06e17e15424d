"""What pyproject.toml and saved pipelines ask of other libraries."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vfmtok_hf.pipelines.portable_vfmtok import REQUIREMENTS, portable_code


tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Versions that machines with GPUs have: the package has to go in between without moving them.
INSTALLED = {
    "torch": "2.11.0",
    "torchvision": "0.26.0",
    "transformers": "5.17.0",
    "huggingface-hub": "1.33.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
}


def floors_of(lines: list[str]) -> dict[str, SpecifierSet]:
    """Of other libraries, each of which has one."""
    requirements = [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]
    floors = {}
    for requirement in requirements:
        assert {specifier.operator for specifier in requirement.specifier} <= {">=", "=="}, requirement
        assert floors.setdefault(requirement.name, requirement.specifier) == requirement.specifier, requirement
    return floors


# Extras whose libraries raise the versions of others.
RAISING = ("kernel", "quantization")
FLOORS = floors_of(
    [*PROJECT["dependencies"], *(line for extra in EXTRAS.keys() - set(RAISING) for line in EXTRAS[extra])]
)
RAISED = floors_of([line for extra in RAISING for line in EXTRAS[extra]])


@pytest.mark.parametrize("extra", ["", "pipeline", "train", "kernel", "eval", "export", "space", "quantization"])
def test_installing_moves_nothing_that_is_installed(extra):
    wanted = [Requirement(line) for line in (EXTRAS[extra] if extra else PROJECT["dependencies"])]
    assert wanted
    for requirement in wanted:
        if requirement.name in INSTALLED:
            assert requirement.specifier.contains(INSTALLED[requirement.name]), requirement


def test_every_library_has_one_floor():
    """What the raising extras ask of a library that others ask for too is more."""
    for name in RAISED.keys() & FLOORS.keys():
        assert Version(str(RAISED[name]).removeprefix(">=")) > Version(str(FLOORS[name]).removeprefix(">=")), name


def test_documented_floors_are_those_of_the_project():
    floors = RAISED | FLOORS
    page = (ROOT / "docs" / "installation.md").read_text()
    documented = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, flags=re.MULTILINE))
    assert PROJECT["requires-python"] == f">={documented.pop('Python')}"
    assert {*documented} >= {*INSTALLED}
    assert documented == {name: str(floors[name]).removeprefix(">=") for name in documented}


def test_saved_pipelines_require_what_their_code_imports():
    required = REQUIREMENTS.splitlines()
    assert {*PROJECT["dependencies"], *EXTRAS["pipeline"]}.issuperset(required)
    nodes = [node for source in portable_code("pipeline").values() for node in ast.walk(ast.parse(source))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    imported = (
        {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {PROJECT["name"].replace("-", "_")}
    )
    distributions = {Requirement(line).name.replace("-", "_") for line in required}
    # transformers brings packaging; Pillow is imported by another name.
    assert {{"PIL": "pillow"}.get(name, name) for name in imported} - {"packaging"} <= distributions
