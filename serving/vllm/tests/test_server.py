"""The server that `vfmtok serve --engine` talks to."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import run_with_vfmtok


@pytest.fixture
def server(references):
    """URL of a vLLM server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", references["emoji"]["folder"]]
    options = ["--tokens-only", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, *options])
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not answers(f"{url}/health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_tokens_over_http(server, references):
    printed = run_with_vfmtok("draw_over_http.py", references["emoji"]["folder"], server)
    assert json.loads(printed) == references["emoji"]["tokens"]
