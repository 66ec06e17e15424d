"""Graphs as `torch.export` programs, which torch alone runs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vfmtok_hf.export.parts import ExportPart, Graph


def write_torch(part: ExportPart, program: torch.export.ExportedProgram, file: Path) -> Graph:
    """Write a program, and read it back for running."""
    torch.export.save(program, file)
    module = torch.export.load(file).module()

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        outputs = module(*inputs)
        return list(outputs) if isinstance(outputs, Sequence) else [outputs]

    return run
