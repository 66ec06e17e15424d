"""Inspect folders written by `save_pretrained` without loading their weights."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from vfmtok_hf.conversion.convert import PROVENANCE_FILE
from vfmtok_hf.data.output_files import PICTURE_SUFFIXES
from vfmtok_hf.modeling.image_processing_vfmtok import VFMTokImageProcessor
from vfmtok_hf.pipelines.component_vfmtok import AUTOENCODERS, MODEL_TYPES
from vfmtok_hf.pipelines.portable_vfmtok import INDEX_FILE, class_name, saved_components


MODELS_BY_TYPE = {model_type: MODEL_MAPPING[CONFIG_MAPPING[model_type]] for model_type in MODEL_TYPES.values()}
CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
DEFAULT_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
WHOLE_WEIGHTS = re.compile(r"model(\.\w+)?\.safetensors")
WEIGHTS_INDEX = re.compile(r"model\.safetensors\.index(\.\w+)?\.json")


@dataclass(frozen=True)
class SavedModel:
    """
    A complete saved model or pipeline.

    Args:
        folder: where it is.
        kind: the class of a pipeline, or the `model_type` of a model.
        configs: config.json of the model (under `""`) or of each of a pipeline's models (under its name).
        index: model_index.json of a pipeline, otherwise empty.
        files: the model's files by their path in the folder: configurations, the weights that loading reads, and
            documents in the folder itself, but not training states.
        num_weights: elements of all tensors, including buffers and excluding variants.
    """

    folder: Path
    kind: str
    configs: dict[str, dict[str, Any]]
    index: dict[str, Any]
    files: dict[str, Path]
    num_weights: int

    def other_files(self) -> list[str]:
        """Paths of the folder's other files, except hidden ones and code."""
        paths = [path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return [
            path.as_posix()
            for path in paths
            if path.as_posix() not in self.files
            and path.suffix != ".py"
            and not any(part.startswith((".", "__")) for part in path.parts)
        ]


def read_saved_model(folder: str | Path) -> SavedModel:
    """
    Read a folder without loading its weights.

    Raises:
        FileNotFoundError: the folder does not exist, or a file of the model is missing.
        ValueError: a file is damaged or truncated, or the model is not a VFMTok model.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
        parts = saved_components(index)
    elif (folder / "config.json").is_file():
        index, parts = {}, {"": ""}
    else:
        raise FileNotFoundError(
            f"{folder} has neither {INDEX_FILE} nor config.json: pass the folder of a saved model."
        )
    if "scheduler" in index and not (folder / SCHEDULER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder / SCHEDULER_CONFIG} is missing.")
    processors = [part for part, class_name in parts.items() if class_name == VFMTokImageProcessor.__name__]
    models = [part for part in parts if part not in processors]
    configs = {part: read_config(folder / part / "config.json") for part in models}
    if not index and configs[""]["model_type"] in AUTOENCODERS:
        processors = [""]
    for part in processors:
        if not (folder / part / "preprocessor_config.json").is_file():
            raise FileNotFoundError(
                f"{folder / part} has no preprocessor_config.json: save a VFMTokImageProcessor there as well."
            )
    weights = [file for part in models for file in weight_files(folder / part)]
    elements = {file: count_elements(file) for file in weights if file.suffix == ".safetensors"}
    settings = [folder / part / name for part in parts for name in CONFIG_FILES]
    belongs = [
        *filter(is_document, folder.iterdir()),
        folder / INDEX_FILE,
        folder / SCHEDULER_CONFIG,
        *settings,
        *weights,
    ]
    return SavedModel(
        folder=folder,
        kind=class_name(index) if index else configs[""]["model_type"],
        configs=configs,
        index=index,
        files={file.relative_to(folder).as_posix(): file for file in sorted(belongs) if file.is_file()},
        num_weights=sum(count for file, count in elements.items() if DEFAULT_WEIGHTS.fullmatch(file.name)),
    )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a VFMTok model."""
    config = read_json(path)
    if config.get("model_type") not in MODELS_BY_TYPE:
        known = ", ".join(MODELS_BY_TYPE)
        raise ValueError(
            f"{path} belongs to a model of type {config.get('model_type')!r}; VFMTok models have the types {known}."
        )
    return config


def is_document(path: Path) -> bool:
    """Whether a file is documentation: Markdown, a license, an image, or provenance."""
    return (
        path.suffix.lower() in (".md", *PICTURE_SUFFIXES)
        or path.name.upper().startswith(("LICENSE", "NOTICE", "CITATION"))
        or path.name == PROVENANCE_FILE
    )


def weight_files(folder: Path) -> list[Path]:
    """
    The files that loading reads, of every variant (such as `fp16`). If there is an unsharded file, an index next to it is
    stale. Shards are included if an index names them.

    Raises:
        FileNotFoundError: there are no weights without a variant.
    """
    names = [file.name for file in folder.iterdir()]
    whole = {match[1]: [name] for name in names if (match := WHOLE_WEIGHTS.fullmatch(name))}
    sharded = {
        match[1]: [name, *sorted(set(read_json(folder / name)["weight_map"].values()))]
        for name in names
        if (match := WEIGHTS_INDEX.fullmatch(name)) and match[1] not in whole
    }
    variants = whole | sharded
    if None not in variants:
        raise FileNotFoundError(f"{folder / 'model.safetensors'} is missing.")
    return [folder / name for files in variants.values() for name in files]


def count_elements(weights: Path) -> int:
    try:
        with safe_open(weights, framework="pt") as file:
            # Shapes come from the header; opening compares the file's size with it.
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{weights} is missing.") from error
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or truncated ({error}).") from error


__all__ = ["SavedModel", "read_saved_model"]
