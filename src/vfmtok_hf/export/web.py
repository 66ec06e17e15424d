"""
A pipeline as a web page that generates, encodes and edits images in the visitor's browser, by onnxruntime-web.

The page is `spaces/vfmtok_web`, which comes with this package; beside it go the ONNX files and onnxruntime-web itself, so
that the folder is a static Hugging Face Space, or any web server's folder, that fetches nothing from elsewhere.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from vfmtok_hf.data.output_files import whole_folder
from vfmtok_hf.export.onnx import onnx_graph
from vfmtok_hf.export.parts import ExportPart, pipeline_parts
from vfmtok_hf.export.pipeline import INFO_FILE, ExportedPart, check_export, export_pipeline
from vfmtok_hf.pipelines import VFMTokPipeline


# Where a wheel has the page, and where a clone has it.
PAGE_FOLDERS = (Path(__file__).with_name("web_page"), Path(__file__).parents[3] / "spaces" / "vfmtok_web")
RUNTIME = "onnxruntime-web"
# For browsers without and with WebGPU; each brings its WebAssembly.
RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
# A file is one protobuf message, which holds less than 2 GiB, and weights are written in float32 first.
MAX_PARAMETERS = 2**29
# Smaller tensors are not worth a node of the graph.
LEAST_HALVED_SIZE = 1024


def export_web_page(pipe: VFMTokPipeline, output: str | Path) -> list[ExportedPart]:
    """
    Write a folder with a page that runs a pipeline in the browser.

    Computation is in float32. Tensors whose values float16 holds exactly, which are all weights of checkpoints saved in
    float16, are stored in it, so that the tokens stay those of the model. `generation_config` gives the page's settings.

    Args:
        pipe ([`VFMTokPipeline`]): with a generator, or without one to encode and edit alone.
        output (`str` or `Path`): folder to write, which must not exist or be empty.

    Returns:
        `list[ExportedPart]`: the graphs in it, and how they compared with the models.

    Raises:
        ValueError: a graph differs from its model; a checkpoint without vision weights; a model too large for a browser.
        ImportError, RuntimeError: ONNX packages are missing, or npm, or a connection to its registry.
        FileExistsError, OSError: the output cannot be written.
    """
    output = Path(output)
    check_web_export(output)
    check_sizes(pipe)
    blank_tokens = pipe.tokenize(PIL.Image.new("RGB", (64, 64), "white"))[0].tolist()
    with whole_folder(output) as folder:
        shutil.copytree(page_folder(), folder, dirs_exist_ok=True)
        fetch_runtime(folder / "onnxruntime")
        models = folder / "models"
        parts = pipeline_parts(pipe)
        exported = [
            store_in_half(part, parts[part.name]) for part in export_pipeline(pipe, models, "onnx", batch_size=1)
        ]
        info = json.loads((models / INFO_FILE).read_text(encoding="utf-8"))
        info |= page_info(pipe, blank_tokens)
        for part in exported:
            content = part.file.read_bytes()
            info["parts"][part.name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (models / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return [replace(part, file=output / "models" / part.file.name) for part in exported]


def check_web_export(output: Path) -> None:
    """
    Check whether a page can be written, before a model is loaded.

    Raises:
        ImportError: ONNX packages are missing.
        RuntimeError: npm is missing.
        FileExistsError, OSError: the output cannot be written.
    """
    check_export(output, "onnx")
    if shutil.which("npm") is None:
        raise RuntimeError(f"The page needs {RUNTIME} from npm: install Node.js, which brings npm.")


def check_sizes(pipe: VFMTokPipeline) -> None:
    """Raise ValueError if a part of a pipeline is too large for a browser."""
    for part in pipeline_parts(pipe).values():
        size = sum(parameter.numel() for parameter in part.parameters())
        if size >= MAX_PARAMETERS:
            raise ValueError(
                f"The {part.name} has {size / 1e6:.0f} million parameters; browsers open models of up to "
                f"{MAX_PARAMETERS / 1e6:.0f} million. Export to ONNX instead."
            )


def page_folder() -> Path:
    """The sources of the page."""
    return next(folder for folder in PAGE_FOLDERS if folder.is_dir())


def fetch_runtime(folder: Path) -> None:
    """Write the files of onnxruntime-web that the page uses, in the version in its package.json, into a new folder."""
    package = json.loads((page_folder() / "package.json").read_text(encoding="utf-8"))
    name = f"{RUNTIME}@{package['dependencies'][RUNTIME]}"
    with tempfile.TemporaryDirectory() as download:
        options = ["--loglevel=error", "--prefer-offline", "--pack-destination", download]
        # The full path, because on Windows npm is a script, which cannot be started by name.
        result = subprocess.run([str(shutil.which("npm")), "pack", *options, name], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"npm could not fetch {name}: {result.stderr.strip() or 'is there a connection?'}")
        folder.mkdir()
        (archive,) = Path(download).glob("*.tgz")
        with tarfile.open(archive) as files:
            for file_name in RUNTIME_FILES:
                with files.extractfile(f"package/dist/{file_name}") as source, (folder / file_name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def store_in_half(exported: ExportedPart, part: ExportPart) -> ExportedPart:
    """Rewrite an ONNX file with the tensors that float16 holds exactly in float16, and compare it with its model again."""
    import onnx

    model = onnx.load(exported.file)
    graph = model.graph
    for tensor in [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]:
        values = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if values.size < LEAST_HALVED_SIZE or not np.array_equal(halves.astype(np.float32), values):
            continue
        stored = onnx.numpy_helper.from_array(halves, f"{tensor.name}.float16")
        # onnxruntime casts it once, when it opens the file.
        graph.node.insert(0, onnx.helper.make_node("Cast", [stored.name], [tensor.name], to=onnx.TensorProto.FLOAT))
        graph.initializer.remove(tensor)
        graph.initializer.append(stored)
    onnx.save(model, exported.file)
    with torch.no_grad():
        found = part.check(onnx_graph(exported.file), batch_size=1)
    return replace(exported, size=exported.file.stat().st_size, check=found)


def page_info(pipe: VFMTokPipeline, blank_tokens: list[int]) -> dict[str, Any]:
    """Metadata for the page. `blank_tokens` fill positions that are not sampled yet."""
    name = Path(pipe.config.get("_name_or_path") or "").name
    info: dict[str, Any] = {"name": name, "blank_tokens": blank_tokens}
    generator = pipe.transformer
    if generator is not None:
        info["sampling"] = asdict(generator.sampling_settings.resolve({}, generator.generation_config))
    return info


__all__ = ["export_web_page"]
