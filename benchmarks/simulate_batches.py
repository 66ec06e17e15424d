"""
Simulate how much latency joining a running batch saves, compared with batches that run to their end.

    python benchmarks/simulate_batches.py

Images arrive as a Poisson process, and each takes the same number of steps. The time of a step is AR-B's in float32 with packed
weights from docs/performance.md, for 1, 8 and 32 images, and interpolated linearly in between.
"""

import argparse
import heapq
import random


STEP_SECONDS = {1: 1 / 39.9, 8: 8 / 271.0, 32: 32 / 511.6}
NUM_STEPS = 256
LIMIT = max(STEP_SECONDS)


def step_seconds(num_images: int) -> float:
    """Seconds of a step of a batch."""
    low = max(size for size in STEP_SECONDS if size <= num_images)
    high = min(size for size in STEP_SECONDS if size >= num_images)
    share = (num_images - low) / max(high - low, 1)
    return STEP_SECONDS[low] + share * (STEP_SECONDS[high] - STEP_SECONDS[low])


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Times of `count` arrivals, `rate` a second on average."""
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def whole_batches(times: list[float]) -> list[float]:
    """Latencies if all waiting images form the next batch when a batch ends."""
    latencies, now, first = [], 0.0, 0
    while first < len(times):
        now = max(now, times[first])
        last = first + 1
        while last < len(times) and last - first < LIMIT and times[last] <= now:
            last += 1
        now += NUM_STEPS * step_seconds(last - first)
        latencies += [now - time for time in times[first:last]]
        first = last
    return latencies


def joined_batches(times: list[float], interval: int) -> list[float]:
    """Latencies if images join a running batch every `interval` steps. They start at once if none is running."""
    latencies, now, first, step = [], 0.0, 0, 0
    running: list[tuple[int, float]] = []  # the step at which an image ends, and when it arrived
    while first < len(times) or running:
        if not running:
            now = max(now, times[first])
        if step % interval == 0 or not running:
            while first < len(times) and times[first] <= now and len(running) < LIMIT:
                heapq.heappush(running, (step + NUM_STEPS, times[first]))
                first += 1
        now += step_seconds(len(running))
        step += 1
        while running and running[0][0] <= step:
            latencies.append(now - heapq.heappop(running)[1])
    return latencies


def percentile(latencies: list[float], share: float) -> float:
    """In units of the latency of a single image. The first tenth, while the queue fills, is excluded."""
    settled = sorted(latencies[len(latencies) // 10 :])
    return settled[int(share * (len(settled) - 1))] / (NUM_STEPS * STEP_SECONDS[1])


def main(argv: list[str] | None = None) -> None:
    """Print p50 and p95 of each policy by load, as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--images", type=int, default=3000)
    arguments = parser.parse_args(argv)
    capacity = LIMIT / (NUM_STEPS * step_seconds(LIMIT))
    print("| load | whole images | every 16 steps | every step |\n|---|---|---|---|")
    for load in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
        times = arrivals(load * capacity, arguments.images)
        policies = (whole_batches(times), joined_batches(times, 16), joined_batches(times, 1))
        cells = [f"{percentile(found, 0.5):.2f} / {percentile(found, 0.95):.2f}" for found in policies]
        print(f"| {load:.0%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
