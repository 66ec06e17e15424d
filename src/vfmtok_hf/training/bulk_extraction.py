"""
Token extraction with [datatrove](https://github.com/huggingface/datatrove), on one machine, Slurm or Ray.

A task writes the shards `rank`, `rank + tasks`, ... The content of a shard depends only on its number, and its file appears
when it is complete. A repeated task, or a repeated extraction, therefore writes only the missing shards.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from vfmtok_hf.training.arguments import ExtractionArguments
from vfmtok_hf.training.logs import logger
from vfmtok_hf.training.token_extraction import TokenExtraction, open_extraction


EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
# Next to the shards, on a file system that all nodes see.
LOGS = ".datatrove"


class ExtractionStep(PipelineStep):
    """
    A datatrove step that loads the tokenizer and opens the images in its own process.

    Args:
        arguments (`ExtractionArguments`): tokenizer, images, output and settings.
        device (`str`, *optional*): device of the tokenizer. Defaults to the accelerator, if available.
    """

    type = "VFMTok"

    def __init__(self, arguments: ExtractionArguments, device: str | None = None):
        super().__init__()
        self.arguments, self.device = arguments, device

    def open(self) -> TokenExtraction:
        """Open the extraction, with its tokenizer on the device."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        extraction = open_extraction(self.arguments, torch.device(self.device or accelerator or "cpu"))
        extraction.tokenizer.eval()
        return extraction


class WriteShards(ExtractionStep):
    """Write the missing shards of a task."""

    name = "write token shards"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Called by datatrove for task `rank` of `world_size`, with `data` of the step before."""
        extraction = self.open()
        for number in range(rank, extraction.num_shards, world_size):
            if extraction.is_missing(number):
                extraction.write_shard(number)
                self.stat_update("shards")
        return data


class WriteIndex(ExtractionStep):
    """Write the index after all shards."""

    name = "write token index"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Called by datatrove for task `rank` of `world_size`, with `data` of the step before."""
        self.open().write_index()
        return data


def extract_with_datatrove(
    arguments: ExtractionArguments,
    executor: Literal["local", "slurm", "ray"],
    tasks: int,
    workers: int = -1,
    device: str | None = None,
    **options: Any,
) -> None:
    """
    Extract tokens, or submit the Slurm jobs that do. The files are byte-identical to those of [`extract_tokens`].

    Args:
        arguments (`ExtractionArguments`): tokenizer, images, output and settings.
        executor (`str`): `"local"`, `"slurm"` or `"ray"`.
        tasks (`int`): number of tasks that share the shards.
        workers (`int`): tasks that run at the same time. -1 means all.
        device (`str`, *optional*): device of the tokenizers. Defaults to the accelerator, if available.
        options: more arguments of datatrove's executor, such as `partition` and `time` for Slurm.

    Raises:
        ValueError: `output` contains other tokens, or no image can be decoded.
    """
    step = WriteShards(arguments, device)
    extraction = step.open()
    if extraction.finished() is not None:
        logger.info("%s is complete", arguments.output)
        return
    extraction.prepare()
    logs = Path(arguments.output).absolute() / LOGS
    # Files show which shards exist. datatrove's notes of an earlier run may be out of date.
    options = {**options, "workers": workers, "skip_completed": False}
    if executor == "slurm":
        options |= {"job_name": "vfmtok-tokens", "cpus_per_task": 8, "slurm_logs_folder": str(logs / "slurm")}
    shards = EXECUTORS[executor](pipeline=[step], tasks=tasks, logging_dir=str(logs / "shards"), **options)
    index = EXECUTORS[executor](
        pipeline=[WriteIndex(arguments, device)], tasks=1, logging_dir=str(logs / "index"), depends=shards, **options
    )
    index.run()


__all__ = ["WriteIndex", "WriteShards", "extract_with_datatrove"]
