"""The server is killed with SIGKILL at random moments while a queue is worked off: every video is
there in the end, made once, with the frames of a run that nobody disturbed."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from penstock.engine.media.video import read_frames
from tests.serve.running import Running

STEPS = {"num_inference_steps": "6"}

BETWEEN_S = 0.1
"""From the event that a kill follows, at most: steps are nearer to each other."""


def video(server: Running, name: str) -> list[bytes]:
    """The frames of a finished video."""
    path = server.folder / "jobs" / name / "video.mp4"
    return [frame.tobytes() for frame in read_frames(path)]


def undisturbed(folder: Path, seeds: Sequence[int]) -> dict[int, list[bytes]]:
    """What is made of each seed without a kill."""
    server = Running(folder)
    try:
        names = {seed: server.create(seed=str(seed), **STEPS)["id"] for seed in seeds}
        for name in names.values():
            assert server.ended(name)["status"] == "completed"
        return {seed: video(server, name) for seed, name in names.items()}
    finally:
        server.close()


class Kills:
    """Asks for videos, and kills the server while they are made.

    Args:
        folder: for the server's own.
        chance: draws the moments.

    Attributes:
        met: what the server was at when it was killed, and how often.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._chance, self._server = chance, Running(folder)
        self._asked: dict[str, int] = {}
        self._made: dict[str, tuple[int, int]] = {}
        self.met: Counter[str] = Counter()

    def ask(self, jobs: int, seeds: Sequence[int]) -> None:
        """Ask for so many videos, of these seeds in turn."""
        for index in range(jobs):
            seed = seeds[index % len(seeds)]
            self._asked[self._server.create(seed=str(seed), **STEPS)["id"]] = seed

    def kill(self, events: int) -> None:
        """Kill the server after so many events at most, or a moment later, and start it again."""
        met = self._watched(self._chance.randrange(events))
        # Not a wait for something: the moment itself is what is drawn here
        threading.Event().wait(BETWEEN_S * self._chance.random())
        self.met[met] += 1
        page = self._server.client.get("/v1/videos", params={"limit": 100}).json()
        done = [each["id"] for each in page["data"] if each["status"] == "completed"]
        self._made |= {name: self._file(name) for name in done if name not in self._made}
        children = psutil.Process(self._server.process.pid).children()
        self._server.kill()
        psutil.wait_procs(children)  # their input has ended, and so do they
        self._server = Running(self._server.folder)

    def _watched(self, events: int) -> str:
        """Where the work is after so many events; sooner, where there is nothing left to do."""
        met = "between"
        with self._server.client.stream("GET", "/v1/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    told, events = json.loads(line[6:]), events - 1
                    if told.get("object") == "queue" and not told["running"] + told["waiting"]:
                        return "nothing left"
                    met = told.get("phase") or told.get("status") or met
                    if events < 0:
                        return met
        return met

    def check(self, frames: Mapping[int, list[bytes]]) -> None:
        """Every video is there, made once, and as it should be."""
        try:
            for name, seed in self._asked.items():
                done = self._server.ended(name)
                assert (done["status"], done["error"]) == ("completed", None)
                assert video(self._server, name) == frames[seed]
            assert {name: self._file(name) for name in self._made} == self._made
            answer = self._server.client.get("/v1/videos", params={"limit": 100, "order": "asc"})
            assert [each["id"] for each in answer.json()["data"]] == list(self._asked)
            folders = [path.name for path in (self._server.folder / "jobs").iterdir()]
            assert sorted(folders) == sorted(self._asked)
        finally:
            self._server.close()

    def _file(self, name: str) -> tuple[int, int]:
        """Which file a video is: one that is made again is another."""
        status = (self._server.folder / "jobs" / name / "video.mp4").stat()
        return status.st_ino, status.st_mtime_ns


def killed(folder: Path, jobs: int, seeds: Sequence[int], kills: int, events: int) -> None:
    ours = Kills(folder / "killed", random.Random(kills))
    ours.ask(jobs, seeds)
    for number in range(kills):
        ours.kill(events)
        print(f"{number + 1} kills met {dict(ours.met)}", flush=True)
    ours.check(undisturbed(folder / "undisturbed", seeds))


@pytest.mark.slow
def test_three_kills(tmp_path: Path) -> None:
    killed(tmp_path, 2, [1, 2], 3, 12)


@pytest.mark.faults
@pytest.mark.timeout(4 * 3600)
def test_two_hundred_kills_under_fifty_jobs(tmp_path: Path) -> None:
    killed(tmp_path, 50, range(5), 200, 14)
