"""
Load test of `vfmtok serve` from this machine: checks images, latencies and memory while some clients misbehave.

    python benchmarks/serving.py --clients 64 --seconds 120
    python benchmarks/serving.py --clients 1 2 4 8 16 32 64 --seconds 25 --only-images
    python benchmarks/serving.py --url http://127.0.0.1:8000

Each client sends requests in turn: images, streams that it reads slowly, malformed bodies, and requests that it disconnects
from. Each image is compared byte for byte with the image that the idle server generated for the same request.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import httpx
import psutil


ROUTE = "/v1/images/generations"
# The actions of a client, in turn. Most of them are ordinary requests.
TURNS = ("image", "image", "stream", "image", "malformed", "image", "gone", "image")
ONLY_IMAGES = ("image",)
SETTINGS = ({}, {"top_k": 50}, {"guidance_scale": 1.5}, {"temperature": 0.9, "top_p": 0.95})
MALFORMED = (b"", b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "no such class"}', b"\x00" * 1000)
PATIENCE = httpx.Timeout(600)


@dataclass
class Tally:
    """Counts of what the clients received."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, once a second


def requests(num_images: int) -> list[dict]:
    """Bodies of the images that clients ask for."""
    return [{"prompt": str(seed % 8), "seed": seed, **SETTINGS[seed % len(SETTINGS)]} for seed in range(num_images)]


async def draw(client: httpx.AsyncClient, body: dict, tally: Tally) -> str | None:
    """An image, asked for again as long as the queue is full."""
    started = time.perf_counter()
    while True:
        reply = await client.post(ROUTE, json=body)
        tally.statuses[reply.status_code] += 1
        if reply.status_code != 429:
            break
        await asyncio.sleep(float(reply.headers["Retry-After"]))
    if reply.status_code != 200:
        tally.wrong.append(f"{reply.status_code}: {reply.text[:200]}")
        return None
    tally.seconds.append(time.perf_counter() - started)
    return reply.json()["data"][0]["b64_json"]


async def read_slowly(client: httpx.AsyncClient, body: dict, tally: Tally) -> str | None:
    """The image of a stream, whose events are read with pauses."""
    async with client.stream("POST", ROUTE, json={**body, "stream": True, "partial_images": 2}) as reply:
        tally.statuses[reply.status_code] += 1
        if reply.status_code == 429:
            return None
        text = ""
        async for part in reply.aiter_text(chunk_size=2048):
            text += part
            await asyncio.sleep(0.05)
    events = [json.loads(data) for data in re.findall(r"^data: (.*)$", text, re.MULTILINE)]
    if [event["type"].partition(".")[2] for event in events] != ["partial_image", "partial_image", "completed"]:
        tally.wrong.append(f"events {[event['type'] for event in events]}")
        return None
    return events[-1]["b64_json"]


async def leave_early(client: httpx.AsyncClient, body: dict, rng: random.Random) -> None:
    """Close the connection before the answer comes."""
    try:
        await client.post(ROUTE, json={**body, "n": 2}, timeout=httpx.Timeout(600, read=rng.uniform(0.01, 0.5)))
    except httpx.ReadTimeout:
        pass


async def send_malformed(client: httpx.AsyncClient, content: bytes, tally: Tally) -> None:
    """What has to be refused."""
    reply = await client.post(ROUTE, content=content, headers={"Content-Type": "application/json"})
    tally.statuses[reply.status_code] += 1
    if reply.status_code != 400:
        tally.wrong.append(f"{content[:20]!r} was answered {reply.status_code}")


async def one_client(
    number: int, url: str, end: float, alone: list[tuple[dict, str]], tally: Tally, turns: tuple[str, ...]
) -> None:
    """A client that goes on until `end`."""
    rng, turn = random.Random(number), number
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        while time.monotonic() < end:
            body, expected = rng.choice(alone)
            kind, turn, image = turns[turn % len(turns)], turn + 1, None
            if kind == "image":
                image = await draw(client, body, tally)
            elif kind == "stream":
                image = await read_slowly(client, body, tally)
            elif kind == "gone":
                await leave_early(client, body, rng)
            else:
                await send_malformed(client, rng.choice(MALFORMED), tally)
            if image not in (None, expected):
                tally.wrong.append(f"another image of {body}")


async def watch_memory(process: psutil.Process, tally: Tally) -> None:
    """Note the server's memory once a second."""
    while True:
        tally.memory.append(process.memory_info().rss)
        await asyncio.sleep(1)


async def images_left(client: httpx.AsyncClient) -> list[float]:
    """Images that wait and run after the clients have left: none, once the server has noticed the last disconnects."""
    for _ in range(50):
        metrics = (await client.get("/metrics")).text
        found = re.findall(r"^vfmtok_images_(?:waiting|running) (\S+)", metrics, re.MULTILINE)
        left = [float(value) for value in found]
        if not any(left):
            break
        await asyncio.sleep(0.2)
    return left


async def load(
    url: str,
    clients: int,
    seconds: float,
    num_images: int,
    pid: int | None = None,
    turns: tuple[str, ...] = TURNS,
) -> dict:
    """
    Put a server under load.

    Args:
        url: its address.
        clients: how many at once.
        seconds: for how long.
        num_images: different images that they ask for.
        pid: the server's process, to watch its memory.
        turns: what each client does.

    Returns:
        `dict` of figures. `wrong` lists every answer that was not the right one.
    """
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        alone = [(body, await draw(client, body, Tally())) for body in requests(num_images)]
        started = time.monotonic()
        process = psutil.Process(pid) if pid else None
        cpu_seconds = sum(process.cpu_times()[:2]) if process else 0
        watch = asyncio.create_task(watch_memory(process, tally)) if process else None
        end = started + seconds
        await asyncio.gather(*(one_client(number, url, end, alone, tally, turns) for number in range(clients)))
        elapsed = time.monotonic() - started
        if watch:
            watch.cancel()
            cpu_seconds = sum(process.cpu_times()[:2]) - cpu_seconds
        left = await images_left(client)
    latencies = sorted(tally.seconds)
    figures = {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "images": len(latencies),
        "images/s": round(len(latencies) / elapsed, 2),
        "p50 s": round(statistics.median(latencies), 2),
        "p95 s": round(latencies[int(0.95 * (len(latencies) - 1))], 2),
        "statuses": dict(tally.statuses),
        "left in the server": left,
        "wrong": tally.wrong,
    }
    if tally.memory:
        # The first quarter fills caches and allocators.
        settled = tally.memory[len(tally.memory) // 4 :]
        figures["memory MB, after a quarter and at the end"] = [settled[0] // 10**6, settled[-1] // 10**6]
        figures["cores that the server got"] = round(cpu_seconds / elapsed, 2)
        figures["memory growth"] = round(settled[-1] / settled[0] - 1, 4)
    return figures


@contextmanager
def server(*options: str) -> Iterator[tuple[str, int]]:
    """Address and process of `vfmtok serve` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "vfmtok_hf", "serve", "--port", str(port), *options])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise RuntimeError("The server ended.") from None
                time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def main(argv: list[str] | None = None) -> list[dict]:
    """Put a server under load, print the figures for each number of clients, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--url", help="a server that runs already; otherwise one is started")
    parser.add_argument("--model", help="pipeline folder or repository; the embedded checkpoint by default")
    parser.add_argument("--clients", type=int, nargs="+", default=[64])
    parser.add_argument("--seconds", type=float, default=120, help="for each number of clients")
    parser.add_argument("--images", type=int, default=64, help="different images that clients ask for")
    parser.add_argument("--only-images", action="store_true", help="clients behave")
    arguments = parser.parse_args(argv)
    options = ["--model", arguments.model] if arguments.model else []
    turns = ONLY_IMAGES if arguments.only_images else TURNS
    started = nullcontext((arguments.url, None)) if arguments.url else server(*options)
    results = []
    with started as (url, pid):
        for clients in arguments.clients:
            results.append(asyncio.run(load(url, clients, arguments.seconds, arguments.images, pid, turns)))
            print(json.dumps(results[-1], indent=1), flush=True)
    return results


if __name__ == "__main__":
    main()
