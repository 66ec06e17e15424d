"""`vfmtok export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vfmtok_hf.cli.options import (
    Dtype,
    ModelOption,
    load_pipeline,
    one_line_errors,
    output_console,
    report_written,
    resolve_model,
)


class GraphFormat(str, Enum):
    """What to write graphs as."""

    onnx = "onnx"
    torch = "torch"


class GraphPart(str, Enum):
    """The graphs of a pipeline."""

    encoder = "encoder"
    decoder = "decoder"
    decode_step = "decode_step"


def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path("export"),
    format: Annotated[
        GraphFormat, typer.Option("--format", "-f", help="ONNX files, or `torch.export` programs (`.pt2`).")
    ] = GraphFormat.onnx,
    parts: Annotated[
        list[GraphPart] | None, typer.Option("--part", "-p", help="May be repeated. *Default: all there are.*")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="The graphs' only batch size. *Default: any.*")] = None,
    model: ModelOption = None,
) -> None:
    """
    Models as graphs that run without this package, compared with the models before they appear.

    `vfmtok export --format onnx --output emoji-onnx`
    """
    with one_line_errors("export"):
        from transformers.utils.hub import has_file

        from vfmtok_hf.export.pipeline import check_export, export_pipeline

        check_export(output, format.value)
        names = parts and [part.value for part in parts]
        is_pipeline = not has_file(resolve_model(model), "config.json")
        pipe = load_pipeline(
            model,
            "cpu",
            Dtype.float32,
            generates=is_pipeline and (parts is None or GraphPart.decode_step in parts),
            encodes=parts is None or GraphPart.encoder in parts,
        )
        exported = export_pipeline(pipe, output, format.value, names, batch_size)
        for part in exported:
            text = f"{part.file.name}  {part.size / 1e6:.1f} MB  {part.check}"
            output_console.print(text, markup=False, highlight=False, soft_wrap=True)
        report_written(len(exported), "graph", output)
