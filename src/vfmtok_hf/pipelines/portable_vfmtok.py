"""Pipeline folders that load where this package is not installed: their code goes along with them."""

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files


INDEX_FILE = "model_index.json"
ENTRY_MODULE = "pipeline"
COMPONENT_MODULE = "vfmtok_component"


def code_files(classes: Iterable[type]) -> set[Path]:
    """The files that define classes, and the siblings that those import."""
    files = {inspect.getfile(cls) for cls in classes}
    return {Path(file) for file in files.union(*map(get_relative_import_files, files))}


def copy_flat(source: Path, folder: Path) -> None:
    """Copy a module into a folder that holds all the modules it imports."""
    code = source.read_text(encoding="utf-8")
    code = re.sub(r"^from vfmtok_hf\.\w+\.", "from .", code, flags=re.MULTILINE)
    (folder / source.name).write_text(code, encoding="utf-8")


def write_portable_code(folder: str | os.PathLike, component_classes: Iterable[type]) -> None:
    """
    Turn what diffusers has saved into `folder` into a folder that brings its own code.

    Args:
        folder: holds model_index.json and a folder per component.
        component_classes: all classes that a component of this pipeline may have.
    """
    folder, here = Path(folder), Path(__file__).parent
    for source in code_files(component_classes) | set(here.glob("*_vfmtok.py")) | {here / f"{ENTRY_MODULE}.py"}:
        copy_flat(source, folder)
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    for name, class_name in saved_components(index).items():
        index[name] = [COMPONENT_MODULE, class_name]
        shutil.copyfile(here / f"{COMPONENT_MODULE}.py", folder / name / f"{COMPONENT_MODULE}.py")
    index["_class_name"] = [ENTRY_MODULE, index["_class_name"]]
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def saved_components(index: dict[str, Any]) -> dict[str, str]:
    """Class name of each component that a model_index.json has."""
    return {
        name: entry[1]
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and entry[1] is not None
    }


def use_this_code(index: dict[str, Any], component_classes: Iterable[type]) -> None:
    """Make a model_index.json, changed in place, name the classes at hand and not the copies in its folder."""
    modules = {cls.__name__: cls.__module__ for cls in component_classes}
    for name, class_name in saved_components(index).items():
        index[name] = [modules.get(class_name, index[name][0]), class_name]
    if isinstance(index["_class_name"], list):
        index["_class_name"] = index["_class_name"][1]
