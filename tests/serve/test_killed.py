"""The server is killed with SIGKILL at random moments while a queue is worked off: every video is
there in the end, made once, with the frames of a run that nobody disturbed."""

from __future__ import annotations

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

    def kill(self, within_s: float) -> None:
        """Kill the server at a moment in so many seconds, and start it again."""
        # Not a wait for something: the moment is what is drawn here
        threading.Event().wait(within_s * self._chance.random())
        videos = self._server.client.get("/v1/videos", params={"limit": 100}).json()["data"]
        running = [each for each in videos if each["status"] == "in_progress"]
        self.met[(running[0]["phase"] or "begins") if running else "between"] += 1
        done = [each["id"] for each in videos if each["status"] == "completed"]
        self._made |= {name: self._file(name) for name in done if name not in self._made}
        children = psutil.Process(self._server.process.pid).children()
        self._server.kill()
        psutil.wait_procs(children)  # their input has ended, and so do they
        self._server = Running(self._server.folder)

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


def killed(folder: Path, jobs: int, seeds: Sequence[int], kills: int, within_s: float) -> None:
    ours = Kills(folder / "killed", random.Random(kills))
    ours.ask(jobs, seeds)
    for _ in range(kills):
        ours.kill(within_s)
    ours.check(undisturbed(folder / "undisturbed", seeds))
    print(f"{kills} kills met {dict(ours.met)}")


@pytest.mark.slow
def test_three_kills(tmp_path: Path) -> None:
    killed(tmp_path, 3, [1, 2], 3, 5.0)


@pytest.mark.faults
def test_two_hundred_kills_under_fifty_jobs(tmp_path: Path) -> None:
    killed(tmp_path, 50, range(5), 200, 10.0)
