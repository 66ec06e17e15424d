"""Export graphs to `torch.export` programs, which need only torch."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vfmtok_hf.export.parts import ExportPart, Graph


def write_torch(part: ExportPart, program: torch.export.ExportedProgram, file: Path) -> Graph:
    """Write a program and load it again."""
    torch.export.save(program, file)
    module = torch.export.load(file).module()

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        outputs = module(*inputs)
        return list(outputs) if isinstance(outputs, Sequence) else [outputs]

    return run
