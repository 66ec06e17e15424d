"""
Token extraction with [datatrove](https://github.com/huggingface/datatrove), on one machine, Slurm or Ray.

A task writes the shards `rank`, `rank + tasks`, ... The content of a shard depends only on its number, and its file appears
when it is complete. A repeated task, or a repeated extraction, therefore writes only the missing shards.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from vfmtok_hf.training.arguments import ExtractionArguments
from vfmtok_hf.training.logs import logger
from vfmtok_hf.training.token_extraction import open_extraction


EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
# Next to the shards, on a file system that all nodes see.
LOGS = ".datatrove"
# Main memory of a task on Slurm.
MIN_MEMORY_GB = 16


class ExtractionStep(PipelineStep):
    """
    A datatrove step that loads the tokenizer and opens the images in its own process.

    Args:
        arguments (`ExtractionArguments`): tokenizer, images, output and settings.
        device (`str`, *optional*): device of the tokenizers. Defaults to the accelerator, if available. Tasks on one machine
            share its devices, unless a number such as in `"cuda:1"` chooses one.
    """

    type = "VFMTok"

    def __init__(self, arguments: ExtractionArguments, device: str | None = None):
        super().__init__()
        self.arguments, self.device = arguments, device

    def device_of(self, rank: int) -> torch.device:
        """The device of task `rank`."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device(self.device or accelerator or "cpu")
        if device.type == "cpu" or device.index is not None:
            return device
        return torch.device(device.type, rank % torch.accelerator.device_count())


class WriteShards(ExtractionStep):
    """Write the missing shards of a task."""

    name = "write token shards"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Called by datatrove for task `rank` of `world_size`, with `data` of the step before."""
        extraction = open_extraction(self.arguments, self.device_of(rank))
        extraction.tokenizer.eval()
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
        open_extraction(self.arguments, torch.device("cpu")).write_index()
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
        device (`str`, *optional*): device of the tokenizers, as for [`WriteShards`]. This process needs none.
        options: more arguments of datatrove's executor, such as `partition` and `time` for Slurm.

    Raises:
        ValueError: `output` contains other tokens, or no image can be decoded.
    """
    step = WriteShards(arguments, device)
    extraction = open_extraction(arguments, torch.device("cpu"))
    if extraction.finished() is not None:
        logger.info("%s is complete", arguments.output)
        return
    extraction.prepare()
    logs = Path(arguments.output).absolute() / LOGS
    # Files show which shards exist. datatrove's notes of an earlier run may be out of date.
    options = {**options, "workers": workers, "skip_completed": False}
    num_cpus = arguments.num_workers + 1
    if executor != "local":
        options["cpus_per_task"] = num_cpus
    if executor == "slurm":
        options["mem_per_cpu_gb"] = max(math.ceil(MIN_MEMORY_GB / num_cpus), 2)
        options |= {"job_name": "vfmtok-tokens", "slurm_logs_folder": str(logs / "slurm")}
    shards = EXECUTORS[executor](pipeline=[step], tasks=tasks, logging_dir=str(logs / "shards"), **options)
    options.pop("gpus_per_task", None)  # the index needs none
    index = EXECUTORS[executor](
        pipeline=[WriteIndex(arguments)], tasks=1, logging_dir=str(logs / "index"), depends=shards, **options
    )
    index.run()


__all__ = ["WriteIndex", "WriteShards", "extract_with_datatrove"]
