"""
Rules of the tree that nobody would notice breaking. The directions of imports are in pyproject.toml, for import-linter.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vfmtok_hf"
MODELING = sorted((PACKAGE / "modeling").glob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth of nesting."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_kernel_and_package_do_not_know_each_other():
    for path in (ROOT / "kernel").rglob("*.py"):
        assert not any(name.startswith("vfmtok_hf") for name in imported_modules_outside(path)), path


def imported_modules_outside(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {*imports, *(node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))}


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
def test_modeling_files_can_be_exported_to_the_hub(path):
    """transformers copies siblings by a line regex that follows nothing but `from .name import ...`."""
    source = path.read_text()
    tree = ast.parse(source)
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in relative)
    assert not any(name.split(".")[0] == "vfmtok_hf" for name in imported_modules_outside(path) - {""} if "." in name)
    # The regex also reads prose: a docstring line that looks like a relative import breaks the export.
    import_lines = {line for node in relative for line in range(node.lineno, node.end_lineno + 1)}
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line):
            assert number in import_lines, f"{path.name}:{number} looks like a relative import"


def siblings_of(path: Path) -> set[str]:
    """Names of the files that a file of `modeling/` imports."""
    return set(re.findall(r"^\s*from \.(\w+) import", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("kind", ["configuration", "image_processing", "modeling"])
def test_files_that_the_hub_starts_from_name_all_that_they_need(kind):
    """From a folder transformers 5.0 copies the siblings that such a file names, but not those that they name in turn."""
    paths = sorted((PACKAGE / "modeling").glob(f"{kind}_*.py"))
    assert paths
    for path in paths:
        named = siblings_of(path)
        indirect = set().union(*(siblings_of(path.with_name(f"{name}.py")) for name in named))
        assert indirect <= named, f"{path.name} must import {indirect - named} too, if for nothing else"


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
def test_modeling_imports_are_light(path):
    allowed = {"torch", "torchvision", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
    tops = {name.split(".")[0] for name in imported_modules(path)} - {"vfmtok_hf"}
    assert tops - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.name)
def test_no_class_is_called_tokenizer(path):
    """Hub export takes such a class for a text tokenizer, and the repository no longer loads."""
    names = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert not [name for name in names if "Tokenizer" in name]


def test_component_module_paths_are_frozen():
    """model_index.json of every saved pipeline names these modules."""
    from vfmtok_hf import VFMTokARForImageGeneration, VFMTokImageProcessor, VFMTokModel, VFMTokRARForImageGeneration

    assert VFMTokModel.__module__ == "vfmtok_hf.modeling.modeling_vfmtok"
    assert VFMTokARForImageGeneration.__module__ == "vfmtok_hf.modeling.modeling_vfmtok_ar"
    assert VFMTokRARForImageGeneration.__module__ == "vfmtok_hf.modeling.modeling_vfmtok_rar"
    assert VFMTokImageProcessor.__module__ == "vfmtok_hf.modeling.image_processing_vfmtok"


@pytest.mark.parametrize(
    "name", ["VFMTokConfig", "VFMTokARConfig", "VFMTokRARConfig", "VFMAEConfig", "VFMTokDiTConfig"]
)
def test_configurations_check_types(name):
    """Postponed annotations would silently switch it off."""
    import vfmtok_hf

    with pytest.raises(StrictDataclassError, match="hidden_size"):
        getattr(vfmtok_hf, name)(hidden_size="wide")


@pytest.mark.parametrize("name", ["vfmtok", "vfmtok_ar", "vfmtok_rar", "vfmae", "vfmtok_dit"])
def test_every_configuration_field_has_a_reader(name):
    source = "\n".join(path.read_text() for path in (PACKAGE).rglob("*.py"))
    tree = ast.parse((PACKAGE / "modeling" / f"configuration_{name}.py").read_text())
    fields = [
        statement.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
    ]
    assert len(fields) > 5
    unread = [field for field in fields if not re.search(rf"(config|self)\.{field}\b|\"{field}\"", source)]
    assert unread == []


def test_the_page_on_the_architecture_names_every_part():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = {path.stem for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == parts - {"__init__", "__main__"}
