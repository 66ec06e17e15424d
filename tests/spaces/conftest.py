"""The Space as a visitor meets it: its own process, with folders of its own."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.modeling.generators import tiny_ar
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline

from .browsing import FLAGS


ROOT = Path(__file__).parents[2]
SPACE = ROOT / "spaces" / "vfmtok"
START_SECONDS = 280


@dataclass(frozen=True)
class RunningSpace:
    """Where the page is, and the folders in which its process may write or must not."""

    url: str
    temp_folder: Path
    other_folders: tuple[Path, ...]  # the working folder and the home


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The Space did not start:\n{log.read_text()}") from None
            time.sleep(0.2)


@contextmanager
def running_space(folder: Path, **variables: str) -> Iterator[RunningSpace]:
    """`python app.py`, started from an empty folder."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'vfmtok-hf[space]'")
    working_folder, home, temp_folder, log = (folder / name for name in ("working", "home", "temp", "log.txt"))
    working_folder.mkdir()
    home.mkdir()
    port = free_port()
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(temp_folder),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(folder / "caches"),  # libraries' own, which they fill when they like
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **variables,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py"], cwd=working_folder, env=environment, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(url, process, log)
        yield RunningSpace(url, temp_folder, (working_folder, home))
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """The page with the emoji checkpoint."""
    with running_space(tmp_path_factory.mktemp("space")) as running:
        yield running


@pytest.fixture(scope="session")
def ar_space(tmp_path_factory):
    """The page with a random generator that samples tokens only in raster order."""
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    config = pipe.transformer.config
    sizes = {name: getattr(config, name) for name in ("codebook_size", "num_image_tokens", "num_classes", "id2label")}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ar_space")
    VFMTokPipeline(pipe.vq_model, tiny_ar(**sizes), pipe.image_processor).save_pretrained(folder / "pipeline")
    with running_space(folder, VFMTOK_MODEL=str(folder / "pipeline")) as running:
        yield running


@pytest.fixture(scope="session")
def parts():
    """The Space's modules, importable by their names as in the Space itself."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'vfmtok-hf[space]'")
    sys.path.insert(0, str(SPACE))
    yield
    sys.path.remove(str(SPACE))


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()
