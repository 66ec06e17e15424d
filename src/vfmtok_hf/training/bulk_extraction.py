"""
Extract tokens by the tasks of [datatrove](https://github.com/huggingface/datatrove): on this machine, Slurm or Ray.

A task writes the shards `rank`, `rank + tasks`, ... Shards depend on nothing but their number and appear whole, so that a
task that is repeated, or an extraction that is started again, goes on with what is missing.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from vfmtok_hf.training.arguments import ExtractionArguments
from vfmtok_hf.training.extract_tokens import TokenExtraction, open_extraction
from vfmtok_hf.training.logs import logger


EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
# Beside the shards, where every node sees it.
LOGS = ".datatrove"


class ExtractionStep(PipelineStep):
    """
    A step that opens the extraction where it runs.

    Args:
        arguments (`ExtractionArguments`).
        device (`str`, *optional*): the accelerator, if there is one.
    """

    type = "VFMTok"

    def __init__(self, arguments: ExtractionArguments, device: str | None = None):
        super().__init__()
        self.arguments, self.device = arguments, device

    def open(self) -> TokenExtraction:
        """The extraction, with its tokenizer on the device."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        extraction = open_extraction(self.arguments, torch.device(self.device or accelerator or "cpu"))
        extraction.tokenizer.eval()
        return extraction


class WriteShards(ExtractionStep):
    """Writes the missing ones of this task's shards."""

    name = "write token shards"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Called by datatrove in each task."""
        extraction = self.open()
        for number in range(rank, extraction.num_shards, world_size):
            if extraction.is_missing(number):
                extraction.write_shard(number)
                self.stat_update("shards")
        return data


class WriteIndex(ExtractionStep):
    """Writes the index of a token set whose shards are complete."""

    name = "write token index"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Called by datatrove once all tasks have ended."""
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
    Extract tokens, or with Slurm submit the jobs that do. The files equal those of [`extract_tokens`].

    Args:
        arguments (`ExtractionArguments`).
        executor (`str`): whose tasks.
        tasks (`int`): number of tasks that share the shards.
        workers (`int`): tasks that run at the same time; -1 is all.
        device (`str`, *optional*): where tokenizers run; the accelerator, if there is one.
        options: more arguments of the executor, such as `partition` and `time` of Slurm.

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
    # Whether a shard is there, its file says; what datatrove noted of an earlier run does not.
    options = {**options, "workers": workers, "skip_completed": False}
    if executor == "slurm":
        options |= {"job_name": "vfmtok-tokens", "cpus_per_task": 8, "slurm_logs_folder": str(logs / "slurm")}
    shards = EXECUTORS[executor](pipeline=[step], tasks=tasks, logging_dir=str(logs / "shards"), **options)
    index = EXECUTORS[executor](
        pipeline=[WriteIndex(arguments, device)], tasks=1, logging_dir=str(logs / "index"), depends=shards, **options
    )
    index.run()


__all__ = ["WriteIndex", "WriteShards", "extract_with_datatrove"]
