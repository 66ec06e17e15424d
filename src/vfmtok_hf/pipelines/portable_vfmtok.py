"""Write pipeline folders that include their code and load without this package."""

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_MAPPING

from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor

from .component_vfmtok import MODEL_TYPES


INDEX_FILE = "model_index.json"
# Of each pipeline the module that diffusers enters.
ENTRY_MODULES = {"VFMTokPipeline": "pipeline", "VFMTokDiTPipeline": "dit_pipeline"}
COMPONENT_MODULE = "component_vfmtok"

# Requirements of a saved pipeline's code, for containers with other versions: the `dependencies` in pyproject.toml that a
# model needs, and `pipeline`.
REQUIREMENTS_FILE = "requirements.txt"
REQUIREMENTS = """\
torch>=2.9
torchvision>=0.24
transformers>=5.0
huggingface-hub>=1.3
timm>=1.0.23
safetensors>=0.6
numpy>=2.1
pillow>=11.3
diffusers>=0.36
"""

OWN_IMPORT = re.compile(r"^(\s*)from (?:vfmtok_hf\.\w+)?\.(\w+) import", re.MULTILINE)


def portable_code(*modules: str) -> dict[str, str]:
    """
    Sources of modules and everything they import from this package, for a flat folder.

    Args:
        modules: names without their packages, such as `"modeling_vfmtok"`.

    Returns:
        `dict[str, str]`: source by file name.
    """
    # Two folders in this package, one in a saved pipeline.
    folders = {Path(__file__).parent, Path(inspect.getfile(VFMTokImageProcessor)).parent}
    sources: dict[str, str] = {}
    pending = list(modules)
    while pending:
        file_name = f"{pending.pop()}.py"
        if file_name not in sources:
            (file,) = (folder / file_name for folder in folders if (folder / file_name).is_file())
            sources[file_name] = OWN_IMPORT.sub(r"\1from .\2 import", file.read_text(encoding="utf-8"))
            pending += [module for _, module in OWN_IMPORT.findall(sources[file_name])]
    return sources


def portable_pipeline(index: dict[str, Any]) -> dict[str, str]:
    """
    The files with which diffusers loads a saved pipeline with its own code, and Inference Endpoints serve it, by path in the
    folder.

    Args:
        index: model_index.json as saved by diffusers.
    """
    entry_module = ENTRY_MODULES.get(class_name(index), "pipeline")
    files = portable_code(entry_module)
    components = saved_components(index)
    index = {name: value for name, value in index.items() if name != "_name_or_path"}  # a local folder
    index["_class_name"] = [entry_module, class_name(index)]
    for name, component_class in components.items():
        index[name] = [COMPONENT_MODULE, component_class]
        files[f"{name}/{COMPONENT_MODULE}.py"] = files[f"{COMPONENT_MODULE}.py"]
    return {**files, INDEX_FILE: json.dumps(index, indent=2) + "\n", REQUIREMENTS_FILE: REQUIREMENTS}


def write_portable_code(folder: str | os.PathLike) -> None:
    """Add a pipeline's own code to the folder that diffusers has saved."""
    folder = Path(folder)
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    for path, text in portable_pipeline(index).items():
        (folder / path).write_text(text, encoding="utf-8")


def use_this_code(index: dict[str, Any]) -> None:
    """Change model_index.json in place, so that it names the package's classes instead of the copies in its folder."""
    modules = component_modules()
    for name, component_class in saved_components(index).items():
        index[name] = [modules.get(component_class, index[name][0]), component_class]
    index["_class_name"] = class_name(index)


def component_modules() -> dict[str, str]:
    """Module of each class of components that is at hand, by the class's name."""
    model_types = [model_type for model_type in MODEL_TYPES.values() if model_type in CONFIG_MAPPING]
    classes: list[Any] = [
        *(MODEL_MAPPING[CONFIG_MAPPING[model_type]] for model_type in model_types),
        VFMTokImageProcessor,
    ]
    return {cls.__name__: cls.__module__ for cls in classes}


def saved_components(index: dict[str, Any]) -> dict[str, str]:
    """Class name of each component in a model_index.json that is a class of this package."""
    known = {*MODEL_TYPES, VFMTokImageProcessor.__name__}
    return {
        name: entry[1]
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and entry[1] in known
    }


def class_name(index: dict[str, Any]) -> str:
    """Name of the pipeline's class in a model_index.json, with or without its module."""
    name = index.get("_class_name")
    return name[1] if isinstance(name, list) else str(name)
