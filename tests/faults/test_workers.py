"""Lists and servers whose workers and processes are killed: on devices, and on Ray."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.batch.dispatch import Began, Told
from penstock.batch.run import Batch, make
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.profiles.options import Options
from penstock.serve import runner
from penstock.serve.cluster import RayWorker
from penstock.serve.workers import Crowd
from tests.faults.film import frames_sha
from tests.serve.running import Running

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.name == "nt", reason="signals of another kind"),
]
LINES, KILLS = 100, 12
SMALL = {"size": "32x32", "frames": 1, "steps": 2, "cfg": 1}
BUDGETS = ("--vram", "200MiB", "--ram", "200MiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8})


def write(folder: Path, count: int, **more: Any) -> Path:
    path = folder / "list.jsonl"
    lines = [
        SMALL | {"prompt": f"circle {number}", "id": f"c{number}"} | more for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def results(output: Path) -> list[dict[str, Any]]:
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def waited(found: Callable[[], Any]) -> Any:
    while not (there := found()):
        time.sleep(0.02)
    return there


def test_a_hundred_lines_killed_at_any_moment_are_each_made_once(
    model: Path, tmp_path: Path
) -> None:
    """The whole family of processes dies, as with the machine."""
    requests, output = write(tmp_path, LINES), tmp_path / "out"
    command = [sys.executable, "-m", "penstock", "batch", str(requests), "-o", str(output),
               "--model", str(model), "--devices", "cpu,cpu", *BUDGETS]  # fmt: skip
    chance, made = random.Random(5), {}
    for attempt in range(KILLS + 1):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if attempt < KILLS:
            wanted = (attempt + 1) * LINES // (KILLS + 2)
            while child.poll() is None and noted(output) < wanted:
                time.sleep(0.02)
            time.sleep(chance.random() / 4)
            family = [*psutil.Process(child.pid).children(recursive=True), child]
            chance.shuffle(family)
            for each in family:
                each.kill()
        code = child.wait()
        for path in output.glob("*.mp4"):  # a video that was there stays as it was
            stamp = path.stat().st_mtime_ns, path.stat().st_ino
            assert made.setdefault(path.name, stamp) == stamp
    assert code == 0
    ids = [each["id"] for each in results(output)]
    assert sorted(ids) == sorted(f"c{number}" for number in range(LINES))
    assert {each["state"] for each in results(output)} == {"completed"}
    assert len(made) == LINES and {p.name for p in output.iterdir()} == {*made, "results.jsonl"}
    print(f"{LINES} lines, {KILLS} kills: each noted once, no video written twice")


def noted(output: Path) -> int:
    """Lines of the results, one that is being written among them."""
    path = output / "results.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray, with one token for all tests: each has a home of its own, where Ray keeps it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        yield pytest.importorskip("ray")


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TELL_S", 0.0)


def on_ray(
    requests: Path, output: Path, model: Path, ray: Any, monkeypatch: pytest.MonkeyPatch,
    kill: str | None = None,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Make a list on two actors, of which the one that makes ``kill`` dies after its third step."""
    actors: dict[str, Any] = {}
    original = RayWorker._made

    def noting(worker: RayWorker) -> Any:
        actors[worker.name] = original(worker)
        return actors[worker.name]

    monkeypatch.setattr(RayWorker, "_made", noting)
    told: list[Any] = []
    killed: list[str] = []

    def hear(news: Any) -> None:
        told.append(news)
        if not isinstance(news, Told) or news.name != kill or killed:
            return
        if news.event.get("unit") == "step" and news.event["step"] >= 3:
            killed.append(news.worker)
            ray.kill(actors[news.worker])

    options = Options(device="cpu", vram="200MiB", ram="200MiB")
    batch = Batch(requests, output, str(model), options=options, crowd=Crowd.of("cpu,cpu", "local"))
    summary = make(batch, hear, lambda todo, names: None, lambda stop: None)
    assert bool(killed) == (kill is not None)
    return summary, told


@pytest.mark.parametrize("shared", [True, False])
def test_a_lost_actors_request_is_made_by_another(
    model: Path, tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Where its folder is shared from the last step, elsewhere anew; the frames are the same."""
    requests = write(tmp_path, 4, steps=60, size="64x64", frames=9)
    on_ray(requests, tmp_path / "whole", model, ray, monkeypatch)

    async def never(*_: Any) -> bool:
        return False

    if not shared:
        monkeypatch.setattr(RayWorker, "_shares", never)
    summary, told = on_ray(requests, tmp_path / "out", model, ray, monkeypatch, kill="c1")
    assert (summary.made, summary.failed) == (4, 0)
    began = [news.began for news in told if isinstance(news, Began) and news.name == "c1"]
    found = {each["id"]: each["began"] for each in results(tmp_path / "out")}
    assert len(began) == 2 and sorted(found) == ["c0", "c1", "c2", "c3"]
    assert found["c1"].startswith("at step ") if shared else found["c1"] == "anew"
    for number in range(4):
        name = f"c{number}.mp4"
        assert frames_sha(tmp_path / "out" / name) == frames_sha(tmp_path / "whole" / name)


@pytest.mark.parametrize(
    "flags", [["--devices", "cpu,cpu"], ["--devices", "cpu,cpu", "--ray", "local"]]
)
def test_a_servers_worker_is_killed_and_nothing_is_lost(tmp_path: Path, flags: list[str]) -> None:
    if "--ray" in flags:
        pytest.importorskip("ray")
    server = Running(tmp_path / "serve", *flags)
    try:
        made = [server.create(num_inference_steps=str(40), seed=str(seed)) for seed in range(4)]
        names = [each["id"] for each in made]
        waited(lambda: len(server.client.get("/v1/queue").json()["running"]) == 2)
        waited(lambda: (server.get(names[0])["step"] or 0) >= 3)
        lock = tmp_path / "serve" / "jobs" / names[0] / "journal" / "lock"
        owner = int(lock.read_text())
        assert owner != server.process.pid
        os.kill(owner, signal.SIGKILL)
        ended = [server.ended(name) for name in names]
        assert [each["status"] for each in ended] == ["completed"] * 4
        text = server.client.get("/metrics").text
        assert "penstock_worker_deaths 1.0" in text, text
    finally:
        server.close()
