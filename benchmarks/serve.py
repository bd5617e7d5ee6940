"""What a server answers to many clients while a job denoises.

    python -m benchmarks.serve [--clients N] [--requests N] [--rounds N] [--pause S]

The last line on stdout is JSON. A server of its own, with the small trained model, makes a video of
many steps; meanwhile clients in another process, each on a connection of its own, ask one request
after the other: three of four are GETs (a video, the list, the queue), the fourth is a plan. A
request counts as lost when its answer is not 200. Memory is the server process's resident bytes
after each round. ``--pause`` is how long a client waits between two requests on average; 0 is as
fast as it can, where seconds count the queue of the other clients too.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from penstock.engine.request.demo import MINI, demo_picture

STEPS = 1000


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and its process."""
    command = [
        sys.executable, "-m", "penstock", "serve", "--model", f"mini={MINI}", "--port", "0",
        "--folder", str(folder), "--vram", "256MiB", "--ram", "512MiB", "--device", "cpu",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split(" at ")[1].strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


def cpu_seconds(process: psutil.Process) -> float:
    """That a process has computed so far, which other load does not change."""
    times = process.cpu_times()
    return float(times.user + times.system)


def begun(client: httpx.Client) -> str:
    """The id of a video that is being denoised."""
    picture = {"input_reference": demo_picture().read_bytes()}
    data = {"prompt": "a green square moves", "num_inference_steps": str(STEPS), "seed": "1"}
    name = str(client.post("/v1/videos", data=data, files=picture).json()["id"])
    with client.stream("GET", f"/v1/videos/{name}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and json.loads(line[6:]).get("phase") == "denoise":
                return name
    raise SystemExit("the job has ended before it was denoised")


def requests(name: str, number: int) -> tuple[str, bytes]:
    """The kind and the bytes of a client's request."""
    if number % 4 == 3:
        body = json.dumps({"size": "64x64", "num_frames": 5 + 4 * (number % 5)}).encode()
        head = f"POST /v1/videos/plan HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
        return (
            "plan",
            f"{head}Content-Type: application/json\r\nHost: localhost\r\n\r\n".encode() + body,
        )
    path = (f"/v1/videos/{name}", "/v1/videos?limit=20", "/v1/queue")[number % 4]
    return "get", f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


async def ask(
    address: tuple[str, int], name: str, first: int, count: int, pause_s: float
) -> list[tuple[str, float, bool]]:
    """One client: the kind, the seconds and whether it was answered, of each of its requests."""
    reader, writer = await asyncio.open_connection(*address)
    chance, found = random.Random(first), []
    for number in range(first, first + count):
        await asyncio.sleep(2 * pause_s * chance.random())
        kind, sent = requests(name, number)
        began = time.perf_counter()
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
        found.append((kind, time.perf_counter() - began, head.startswith(b"HTTP/1.1 200")))
    writer.close()
    return found


def clients(url: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All clients at once, in this process: what they saw."""

    async def all_of_them() -> list[tuple[str, float, bool]]:
        host, port = url.removeprefix("http://").split(":")
        each = args.requests // args.clients
        work = [
            ask((host, int(port)), name, index * each, each, args.pause)
            for index in range(args.clients)
        ]
        return [one for some in await asyncio.gather(*work) for one in some]

    gc.collect()
    gc.freeze()  # what the clients' process does besides is no answer's time
    began = time.perf_counter()
    seen = asyncio.run(all_of_them())
    seconds = {kind: sorted(s for each, s, _ in seen if each == kind) for kind in ("get", "plan")}
    return {
        "seconds": time.perf_counter() - began,
        "answered": sum(ok for *_, ok in seen),
        **{
            f"{kind}_{label}_ms": 1e3 * found[min(len(found) - 1, int(share * len(found)))]
            for kind, found in seconds.items()
            for label, share in (("median", 0.5), ("p99", 0.99), ("most", 1.0))
        },
    }


def main() -> None:
    """Measure, and print a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.1)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder) / "own") as (url, process),
        httpx.Client(base_url=url, timeout=None) as client,
    ):
        name = begun(client)
        rounds, resident, before_s = [], [], cpu_seconds(process)
        for _ in range(args.rounds):
            rounds.append(clients(url, name, args))
            resident.append(process.memory_info().rss)
        cpu_s = cpu_seconds(process) - before_s
        video = client.get(f"/v1/videos/{name}").json()
        still = (video["status"], video["phase"]) == ("in_progress", "denoise")
        client.delete(f"/v1/videos/{name}")
    row = {
        "benchmark": "serve",
        "clients": args.clients,
        "requests": args.requests,
        "rounds": args.rounds,
        "pause_s": args.pause,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "denoised_throughout": still,
        "lost": sum(args.requests - each["answered"] for each in rounds),
        **{
            key: statistics.median(each[key] for each in rounds)
            for key in rounds[0]
            if key != "answered"
        },
        "server_cpu_ms_a_request": 1e3 * cpu_s / (args.rounds * args.requests),
        "resident_bytes": resident,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
