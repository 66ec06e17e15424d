"""A fake Hub, and processes that talk to it."""

import subprocess
import sys
import textwrap

import pytest

from .fake_hub import FakeHub


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


@pytest.fixture(scope="session")
def hub():
    with FakeHub() as fake_hub:
        yield fake_hub


@pytest.fixture
def client(hub, tmp_path):
    """
    Runs Python code in a fresh process and a foreign folder: `client(code, packaged=True, home="home")`. Processes with
    the same `home`, empty at first, share their caches.
    """

    def run(code: str, packaged: bool = True, home: str = "home", **environment: str) -> str:
        code = textwrap.dedent(code)
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        result = subprocess.run(
            [sys.executable, "-c", code if packaged else WITHOUT_PACKAGE + code],
            cwd=folder,
            env={**hub.environment(tmp_path / home), **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-4000:] + result.stdout[-1000:]
        return result.stdout

    return run
