"""
Smaller weights of exported graphs: what they save, and what they change.

    python benchmarks/export_weights.py

Exports the emoji checkpoint to ONNX, stores the weights in several ways, and compares onnxruntime with the models: the greedy
tokens of all classes, and the tokens and reconstructions of `examples/images`. Needs the extra `export`.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from PIL import Image
from result_tables import show_table

from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.export.onnx import onnx_graph
from vfmtok_hf.export.parts import DecodeStep, ExportPart, Graph, pipeline_parts
from vfmtok_hf.export.pipeline import ExportedPart, export_pipeline
from vfmtok_hf.export.web import store_in_half


IMAGES = Path(__file__).parents[1] / "examples" / "images"
LEAST_SIZE = 1024  # smaller tensors stay as they are
# What a tensor is stored as, and the node that restores it; None keeps it.
Storage = Callable[[np.ndarray, str], tuple[list[onnx.TensorProto], onnx.NodeProto] | None]


def in_float16(values: np.ndarray, name: str) -> tuple[list[onnx.TensorProto], onnx.NodeProto]:
    stored = numpy_helper.from_array(values.astype(np.float16), f"{name}.stored")
    return [stored], helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)


def in_int8(values: np.ndarray, name: str) -> tuple[list[onnx.TensorProto], onnx.NodeProto] | None:
    """One scale per entry of the first dimension."""
    if values.ndim < 2:
        return None
    scales = np.abs(values).reshape(len(values), -1).max(axis=1).clip(1e-12) / 127
    rounded = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
    stored = [numpy_helper.from_array(rounded, f"{name}.stored"), numpy_helper.from_array(scales, f"{name}.scales")]
    return stored, helper.make_node("DequantizeLinear", [tensor.name for tensor in stored], [name], axis=0)


def store(file: Path, storage: Storage) -> None:
    """Rewrite a graph with its large float32 tensors in another format."""
    model = onnx.load(file)
    graph = model.graph
    for tensor in [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]:
        values = numpy_helper.to_array(tensor)
        if values.size >= LEAST_SIZE and (replacement := storage(values, tensor.name)):
            stored, node = replacement
            graph.initializer.remove(tensor)
            graph.initializer.extend(stored)
            graph.node.insert(0, node)
    onnx.save(model, file)


# What rewrites the file of a part.
WRITERS: dict[str, Callable[[ExportedPart, ExportPart], object]] = {
    "float32": lambda exported, part: None,
    "float16 where exact (what is written)": store_in_half,
    "all in float16": lambda exported, part: store(exported.file, in_float16),
    "int8 by channel": lambda exported, part: store(exported.file, in_int8),
}


def greedy_tokens(graph: Graph, part: DecodeStep) -> torch.Tensor:
    """`(num_classes, num_image_tokens)` tokens of all classes by a RAR's decode step in onnxruntime."""
    config = part.model.config
    labels = torch.arange(config.num_classes)
    orders = torch.arange(config.num_image_tokens).expand(len(labels), -1)
    cache = [torch.zeros_like(part.example(len(labels))[index]) for index in (3, 4)]
    token, drawn = torch.zeros_like(labels), []
    for position in range(part.num_positions):
        logits, *cache = graph(labels, token, torch.tensor(position), *cache, orders)
        token = logits.argmax(-1)
        drawn.append(token)
    return torch.stack(drawn[part.condition_positions - 1 :], dim=1)


def equal(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{(found == expected).sum()} of {expected.numel()}"


@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    pictures = [Image.open(file) for file in sorted(IMAGES.glob("*.png"))]
    pixel_values = pipe.image_processor(pictures, return_tensors="pt").pixel_values
    greedy = pipe.transformer.generate(range(pipe.transformer.config.num_classes), do_sample=False)
    tokens = pipe.vq_model.encode(pixel_values).image_tokens
    reconstruction = pipe.vq_model.decode(image_tokens=tokens).reconstruction
    with tempfile.TemporaryDirectory() as folder:
        exported = export_pipeline(pipe, Path(folder) / "exported")
        parts = pipeline_parts(pipe)
        for name, write in WRITERS.items():
            files = {part.name: Path(folder) / part.file.name for part in exported}
            for part in exported:
                copy = shutil.copy(part.file, files[part.name])
                write(replace(part, file=copy), parts[part.name])
            graphs = {part: onnx_graph(file) for part, file in files.items()}
            difference = graphs["decoder"](tokens)[0] - reconstruction
            row = {
                "side": name,
                "MB": f"{sum(file.stat().st_size for file in files.values()) / 1e6:.1f}",
                "greedy tokens equal": equal(greedy_tokens(graphs["decode_step"], parts["decode_step"]), greedy),
                "encoder tokens equal": equal(graphs["encoder"](pixel_values)[0], tokens),
                "largest pixel difference": f"{difference.abs().max():.0e}",
            }
            show_table("export_weights", [row])


if __name__ == "__main__":
    main()
