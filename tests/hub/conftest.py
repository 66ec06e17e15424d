"""A fake Hub, what is published on it, and processes that talk to it."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.pipelines.tiny_pipeline import tiny_pipeline

from .fake_hub import FakeHub
from .published import publish


ROOT = Path(__file__).parents[2]

# Hides the package from a process as if it were not installed, however it is installed.
WITHOUT_PACKAGE = """
import importlib.machinery, importlib.util, sys

class PathFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "vfmtok_hf" else super().find_spec(name, path, target)

sys.meta_path[:] = [PathFinder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
                    if "editable" not in getattr(finder, "__name__", type(finder).__name__)]
assert importlib.util.find_spec("vfmtok_hf") is None
"""

# Runs the code of each line of its input, and answers with a line: what the code printed, and its traceback if it failed.
SERVE = """
import contextlib, io, json, sys, time, traceback

time.sleep = lambda seconds: None  # between huggingface_hub's retries
for line in sys.stdin:
    printed, failure = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), {"__name__": "__main__"})
    except BaseException:
        failure = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failure]), flush=True)
"""


class Client:
    """A fresh Python process in a foreign folder, with caches of its own in `home`. Calling it runs code there."""

    def __init__(
        self, hub: FakeHub, home: Path, packaged: bool = True, offline: bool = False, python: str = sys.executable
    ):
        folder = home / "elsewhere"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (home / "log").open("w+")
        self.process = subprocess.Popen(
            [python, "-c", (("" if packaged else WITHOUT_PACKAGE) + SERVE)],
            cwd=folder,
            # The tests' own helpers come from here; the package does not lie in this folder.
            env={
                **hub.environment(home),
                "HF_HUB_OFFLINE": str(int(offline)),
                "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def __call__(self, code: str) -> str:
        """What the code prints. It fails as the code does."""
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        printed, failure = json.loads(self.process.stdout.readline())
        assert failure is None, failure
        return printed

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="session")
def hub():
    with FakeHub() as fake_hub:
        yield fake_hub


@pytest.fixture(scope="session")
def published(hub, tmp_path_factory):
    """Folder of what lies on the fake Hub (`published.py`)."""
    folder = tmp_path_factory.mktemp("published")
    publish(hub, folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("pipe")
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Caches of the clients that have the package."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def client(hub, home):
    """A process that has the package and the Hub, shared to save time."""
    with Client(hub, home) as shared:
        yield shared


@pytest.fixture
def faults(hub):
    """The fake Hub's faults, which end with the test."""
    yield hub.faults
    hub.faults.clear()
