"""Joining a running batch, as the server does, is never later than waiting for its end."""

import pytest

from benchmarks.simulate_batches import (
    LIMIT,
    NUM_STEPS,
    arrivals,
    joined_batches,
    percentile,
    step_seconds,
    whole_batches,
)


@pytest.mark.parametrize("load", [0.02, 0.3, 0.8])
def test_joining_is_never_later_than_whole_batches(load):
    times = arrivals(load * LIMIT / (NUM_STEPS * step_seconds(LIMIT)), 600)
    whole, joined = whole_batches(times), joined_batches(times, 16)
    assert len(whole) == len(joined) == 600
    for share in (0.5, 0.95):
        assert percentile(joined, share) <= percentile(whole, share) + 1e-9


def test_an_image_alone_takes_its_steps():
    for latencies in (whole_batches([1.0]), joined_batches([1.0], 16)):
        assert latencies == pytest.approx([NUM_STEPS * step_seconds(1)])
