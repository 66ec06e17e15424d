"""`vfmtok serve` as a process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.serving import server
from tests.serving.servers import free_port
from tests.serving.test_app import metric, post


ROOT = Path(__file__).parents[2]


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(monkeypatch):
    monkeypatch.setenv("VFMTOK_API_KEY", "sesame")
    replies = []

    def request(url):
        body = {"inputs": 1, "parameters": {"num_images_per_label": 4, "seed": 0}}
        replies.append(post(url, "/", body, Authorization="Bearer sesame"))

    with server("--max-batch-size", "2") as (url, pid):
        thread = threading.Thread(target=request, args=(url,))
        thread.start()
        while metric(url, "vfmtok_images_running") == 0:
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)
        thread.join()
        assert replies[0].status_code == 200
        assert len(replies[0].json()) == 4
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_a_taken_port_is_one_line():
    with free_port() as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "vfmtok_hf", "serve", "--port", port]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "Address already in use" in process.stderr
