"""
The scripts for Slurm, Hugging Face Jobs and Inference Endpoints. `srun`, `hf` and the like are replaced by commands that note
their arguments, which the parsers of the real ones then read. Options of `sbatch` and `srun` themselves are not checked.
"""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import click
import pytest
import typer
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from huggingface_hub.cli.hf import app as hf

from vfmtok_hf.cli import app
from vfmtok_hf.training.arguments import ExtractionArguments, GeneratorArguments, parse_arguments


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("slurm/*")) + sorted((ROOT / "examples").glob("jobs/*"))
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
}
JOBS = {"DATASET": "you/images", "BUCKET": "you/bucket", "TOKENIZER": "you/vfmtok-pipeline"}
ENDPOINT = {"REPO": "you/vfmtok-pipeline", "IMAGE": "you/vfmtok-serve:latest"}


class Stubs:
    """Commands that note their arguments."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, name: str, script: str = "") -> None:
        command = self.folder / name
        command.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > "{self.folder}/{name}.$BASHPID.calls"\n{script}\n')
        command.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        files = sorted(self.folder.glob(f"{name}.*.calls"), key=lambda file: file.stat().st_mtime_ns)
        return [file.read_text().split("\0")[:-1] for file in files]

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, **variables, "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.Popen(["bash", script, *arguments], cwd=ROOT, env=environment)


@pytest.fixture
def stubs(tmp_path):
    stubs = Stubs(tmp_path)
    for name in ("vfmtok", "hf", "docker"):
        stubs.add(name)
    stubs.add("scontrol", 'if [ "$1" = show ]; then printf "node%s\\n" 1 2 3 4; fi')
    return stubs


def launched(arguments: list[str]):
    """Options of an `accelerate launch`."""
    assert arguments[:2] == ["accelerate", "launch"]
    options = _validate_launch_command(launch_command_parser().parse_args(arguments[2:]))[0]
    assert options.module
    return options


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_reads_the_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert len(script.read_text().splitlines()) < 60


def test_slurm_starts_a_launcher_per_node(stubs, tmp_path):
    stubs.add("srun")
    (tmp_path / "run.yaml").write_text("train_data: images\ntokenizer: tokenizer\noutput: run\n")
    script = stubs.start("examples/slurm/train.sbatch", "generator", str(tmp_path / "run.yaml"), **SLURM)
    assert script.wait() == 0
    ((flag, num_cpus, *arguments),) = stubs.calls("srun")
    assert (flag, num_cpus) == ("--cpus-per-task", "64")
    options = launched(arguments)
    assert (options.num_machines, options.num_processes, options.rdzv_backend) == (4, 32, "c10d")
    assert options.main_process_ip == "node1"
    assert options.training_script == "vfmtok_hf.training.train_generator"
    assert parse_arguments(GeneratorArguments, options.training_script_args).resume


def test_slurm_job_is_queued_again_when_its_time_is_over(stubs):
    started, stopped = stubs.folder / "started", stubs.folder / "stopped"
    stubs.add("srun", f'trap "touch {stopped}; exit 1" TERM\ntouch {started}\nwhile true; do sleep 0.05; done')
    script = stubs.start("examples/slurm/train.sbatch", "tokenizer", "run.yaml", **SLURM)
    while not started.exists():
        time.sleep(0.01)
    script.send_signal(signal.SIGUSR1)
    assert script.wait() == 0
    assert stopped.exists()
    assert stubs.calls("scontrol")[-1] == ["requeue", "7"]


def test_slurm_job_that_fails_is_not_queued_again(stubs):
    stubs.add("srun", "exit 3")
    assert stubs.start("examples/slurm/train.sbatch", "tokenizer", "run.yaml", **SLURM).wait() == 3
    assert [call[0] for call in stubs.calls("scontrol")] == ["show"]


def test_slurm_submits_the_extraction(stubs):
    script = stubs.start("examples/slurm/extract_tokens.sh", "data", "tokens", "model")
    assert script.wait() == 0
    ((command, *arguments),) = stubs.calls("vfmtok")
    options = typer.main.get_command(app).commands[command].make_context(command, arguments).params
    assert (options["data"], str(options["output"]), options["model"]) == ("data", "tokens", "model")
    assert (options["executor"], options["partition"], options["tasks"]) == ("slurm", "gpu", 64)


def parsed_by_hf(arguments: list[str]) -> dict:
    """Values of the options of an `hf` command."""
    command, context = hf, click.Context(hf)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(context, name)
    return command.make_context(name, arguments).params


def job(stubs, script: str) -> list[str]:
    """The last command that a job runs in its container."""
    assert stubs.start(f"examples/jobs/{script}", **JOBS).wait() == 0
    (arguments,) = stubs.calls("hf")
    options = parsed_by_hf(arguments)
    assert "hf://buckets/you/bucket" in str(options)
    shell, flag, commands = options["command"]
    assert (shell, flag) == ("bash", "-c")
    subprocess.run(["bash", "-n", "-c", commands], check=True)
    return shlex.split(commands.partition("&&")[2])


def test_a_job_trains_a_generator(stubs):
    options = launched(job(stubs, "train.sh"))
    assert (options.multi_gpu, options.num_processes) == (True, 8)
    arguments = parse_arguments(GeneratorArguments, options.training_script_args)
    assert (arguments.resume, arguments.output, arguments.train_data) == (True, "/runs/generator", "/data")


def test_a_job_extracts_tokens(stubs):
    launcher, *options = job(stubs, "extract_tokens.sh")
    assert (launcher, *options[:4]) == (
        "torchrun", "--nproc_per_node", "8", "--module", "vfmtok_hf.training.extract_tokens",
    )  # fmt: skip
    arguments = parse_arguments(ExtractionArguments, options[4:])
    assert (arguments.data, arguments.output) == ("/data", "/tokens/train")


def test_an_endpoint_serves_the_mounted_repository(stubs):
    assert stubs.start("examples/jobs/deploy_endpoint.sh", **ENDPOINT).wait() == 0
    assert [call[0] for call in stubs.calls("docker")] == ["build", "push"]
    options = parsed_by_hf(stubs.calls("hf")[0])
    assert (options["repo"], options["custom_image"]) == (ENDPOINT["REPO"], ENDPOINT["IMAGE"])
    assert (options["port"], options["health_route"]) == (8000, "/health")
