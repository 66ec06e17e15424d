"""
Export a pipeline to graphs that run without this package: `torch.export` programs, or ONNX files for onnxruntime.

Every graph is run and compared with its model before the output folder is written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vfmtok_hf.cpu.packing import unpack_weights
from vfmtok_hf.data.output_files import check_model_folder, whole_folder
from vfmtok_hf.export.onnx import REQUIRED_PACKAGES, write_onnx
from vfmtok_hf.export.parts import DecodeStep, ExportPart, PartName, pipeline_parts
from vfmtok_hf.export.torch_programs import write_torch
from vfmtok_hf.hub_kernels import disable_kernels
from vfmtok_hf.pipelines import VFMTokPipeline


Format = Literal["onnx", "torch"]

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
WRITERS = {"onnx": write_onnx, "torch": write_torch}
INFO_FILE = "export.json"
CHECK_BATCH_SIZE = 4


@dataclass(frozen=True)
class ExportedPart:
    """A written graph: its file, its size in bytes including external data, and the result of its check."""

    name: str
    file: Path
    size: int
    check: str


def export_pipeline(
    pipe: VFMTokPipeline,
    output: str | Path,
    format: Format = "onnx",
    parts: Sequence[PartName] | None = None,
    batch_size: int | None = None,
) -> list[ExportedPart]:
    """
    Export a pipeline's models as graphs, one file per part, with their metadata in `export.json`.

    Each file is loaded and run on random inputs before the folder is written. The graphs use float32 on the CPU
    (`torch.export` programs can be moved, onnxruntime has its own devices). The pipeline is moved to the CPU, its compiled
    kernels are disabled and packed weights unpacked, because graphs cannot contain them.

    Args:
        pipe ([`VFMTokPipeline`]): with a generator or without.
        output (`str` or `Path`): folder to write, which must be new or empty.
        format (`str`): `"onnx"`, or `"torch"` for `torch.export` programs (`.pt2`).
        parts (`list[str]`, *optional*): some of `"encoder"`, `"decoder"`, `"decode_step"`. Defaults to all.
        batch_size (`int`, *optional*): the only batch size of the graphs. Defaults to any.

    Returns:
        `list[ExportedPart]`: the written files and their comparisons with the models.

    Raises:
        ValueError: an unknown format or part, a part that the pipeline lacks, or a graph that differs from its model.
        ImportError: ONNX packages are missing.
        FileExistsError, OSError: the output cannot be written.
    """
    output = Path(output)
    check_export(output, format)
    for model in filter(None, (pipe.vq_model, pipe.transformer)):
        unpack_weights(disable_kernels(model))
    pipe.to("cpu", torch.float32)
    available = pipeline_parts(pipe)
    chosen = [available[name] for name in check_parts(parts, available)]
    with whole_folder(output) as folder, torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exported = [export_part(part.eval(), folder, format, batch_size) for part in chosen]
        info = export_info(pipe, chosen, format, batch_size)
        (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return [ExportedPart(part.name, output / part.file.name, part.size, part.check) for part in exported]


def export_program(part: ExportPart, batch_size: int | None) -> torch.export.ExportedProgram:
    """Trace a part with `torch.export`, for one batch size or for any."""
    dynamic_shapes = None
    if batch_size is None:
        batch = torch.export.Dim("batch", min=1)
        dynamic_shapes = tuple({} if dim is None else {dim: batch} for dim in part.batch_dims)
    return torch.export.export(part, part.example(batch_size or 2), dynamic_shapes=dynamic_shapes, strict=False)


def export_part(part: ExportPart, folder: Path, format: Format, batch_size: int | None) -> ExportedPart:
    """Trace, write, load and compare one part."""
    file = folder / f"{part.name}{SUFFIXES[format]}"
    graph = WRITERS[format](part, export_program(part, batch_size), file)
    check_size = batch_size or CHECK_BATCH_SIZE
    found = part.check(graph, check_size)
    if batch_size is None:
        part.check(graph, 1)
    size = sum(written.stat().st_size for written in folder.glob(f"{file.name}*"))
    return ExportedPart(part.name, file, size, f"{found} (batch of {check_size})")


def check_parts(parts: Sequence[str] | None, available: dict[str, ExportPart]) -> list[str]:
    """The selected parts, in data-flow order, or all."""
    for name in parts or ():
        if name not in get_args(PartName):
            raise ValueError(f"There is no part {name!r}: the parts are {', '.join(get_args(PartName))}.")
        if name == "encoder" and name not in available:
            raise ValueError("This checkpoint has no vision weights: call load_vision_model() to export its encoder.")
        if name not in available:
            raise ValueError("This pipeline has no generator: there is no decode_step to export.")
    return [name for name in available if parts is None or name in parts]


def check_export(output: Path, format: str) -> None:
    """
    Validate format and output path before loading the model.

    Raises:
        ValueError: an unknown format.
        ImportError: ONNX packages are missing.
        FileExistsError, OSError: the output cannot be written.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format must be 'onnx' or 'torch', got {format!r}.")
    missing = [name for name in REQUIRED_PACKAGES if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX export needs {", ".join(missing)}: pip install "vfmtok-hf[export]".')
    check_model_folder(output)


def export_info(
    pipe: VFMTokPipeline, parts: list[ExportPart], format: Format, batch_size: int | None
) -> dict[str, Any]:
    """Metadata for programs that run the graphs."""
    config = pipe.vq_model.config
    info: dict[str, Any] = {
        "format": format,
        "batch_size": batch_size,
        "image_size": config.image_size,
        "num_image_tokens": config.num_anchors,
        "codebook_size": config.codebook_size,
        "parts": {
            part.name: {
                "file": part.name + SUFFIXES[format],
                "inputs": list(part.input_names),
                "outputs": list(part.output_names),
            }
            for part in parts
        },
    }
    for part in parts:
        if isinstance(part, DecodeStep):
            generator = part.model.config
            info["generator"] = {
                "num_classes": generator.num_classes,
                "id2label": {str(class_id): name for class_id, name in pipe.id2label.items()},
                "condition_positions": part.condition_positions,
                "cache_shape": [
                    generator.num_hidden_layers,
                    "batch",
                    generator.num_attention_heads,
                    part.num_positions,
                    generator.head_dim,
                ],
            }
    return info


__all__ = ["ExportedPart", "export_pipeline"]
