"""`vfmtok export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from vfmtok_hf.cli.options import (
    Dtype,
    ModelOption,
    load_pipeline,
    one_line_errors,
    output_console,
    output_option,
    report_written,
    resolve_model,
)


# Typer reads no lists of literals.
class GraphPart(str, Enum):
    """The graphs of a pipeline."""

    encoder = "encoder"
    decoder = "decoder"
    decode_step = "decode_step"


def export(
    output: Annotated[Path, output_option("Folder to write.")] = Path("export"),
    format: Annotated[
        Literal["onnx", "torch", "web"],
        typer.Option(
            "--format", "-f", help="ONNX files, `torch.export` programs (`.pt2`), or a web page that runs the models."
        ),
    ] = "onnx",
    parts: Annotated[
        list[GraphPart] | None, typer.Option("--part", "-p", help="Part to export; may be repeated. *Default: all.*")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Fixed batch size of the graphs. *Default: any.*")
    ] = None,
    model: ModelOption = None,
) -> None:
    """
    Export models to graphs that run without this package. Each graph is compared with its model first.

    `vfmtok export --format onnx --output emoji-onnx`
    """
    with one_line_errors("export"):
        from transformers.utils.hub import has_file

        from vfmtok_hf.export.pipeline import check_export, export_pipeline
        from vfmtok_hf.export.web import check_web_export, export_web_page

        is_page = format == "web"
        if is_page:
            if parts or batch_size:
                raise ValueError(
                    "A web page has all parts, for one image at a time: leave --part and --batch-size out."
                )
            check_web_export(output)
        else:
            check_export(output, format)
        names = parts and [part.value for part in parts]
        is_pipeline = not has_file(resolve_model(model), "config.json")
        pipe = load_pipeline(
            model,
            "cpu",
            Dtype.float32,
            generates=is_pipeline and (parts is None or GraphPart.decode_step in parts),
            encodes=parts is None or GraphPart.encoder in parts,
        )
        if is_page:
            exported = export_web_page(pipe, output)
        else:
            exported = export_pipeline(pipe, output, format, names, batch_size)
        for part in exported:
            text = f"{part.file.name}  {part.size / 1e6:.1f} MB  {part.check}"
            output_console.print(text, markup=False, highlight=False, soft_wrap=True)
        report_written(len(exported), "graph", output)
        if is_page:
            output_console.print(f"Show the page: python {output / 'serve.py'}", markup=False, soft_wrap=True)
