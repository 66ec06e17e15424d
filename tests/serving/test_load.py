"""The server under load: right images, nothing lost, nothing kept."""

import asyncio

import pytest

from benchmarks.serving import load, main
from tests.serving.servers import running
from vfmtok_hf import DEFAULT_CHECKPOINT, VFMTokPipeline
from vfmtok_hf.serving.app import create_app


def test_images_are_right_among_clients_that_misbehave():
    pipe = VFMTokPipeline.from_pretrained(DEFAULT_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    with running(create_app(pipe, "emoji", max_batch_size=16, max_queue_size=16)) as url:
        figures = asyncio.run(load(url, clients=24, seconds=4, num_images=8))
    assert figures["wrong"] == []
    assert figures["images"] > 0
    assert figures["left in the server"] == [0, 0]
    assert {200, 400} <= figures["statuses"].keys() <= {200, 400, 429}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_minutes_of_load_leave_memory_as_it_was():
    (figures,) = main(["--clients", "64", "--seconds", "120"])
    assert figures["wrong"] == []
    assert figures["left in the server"] == [0, 0]
    assert figures["memory growth"] < 0.05
