"""Export graphs to ONNX files for onnxruntime."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vfmtok_hf.export.parts import ExportPart, Graph


REQUIRED_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def write_onnx(part: ExportPart, program: torch.export.ExportedProgram, file: Path) -> Graph:
    """Convert a program to ONNX, write it, and open it in onnxruntime."""
    with quiet_exporter():
        onnx_program = torch.onnx.export(
            program,
            part.example(2),
            input_names=part.input_names,
            output_names=part.output_names,
            dynamo=True,
            verbose=False,
        )
    onnx_program.save(file)
    return onnx_graph(file)


def onnx_graph(file: Path) -> Graph:
    """An ONNX file as a function of tensors, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        feed = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress warnings of torch's exporter about packages and versions. The result is checked."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
