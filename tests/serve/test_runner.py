"""What a worker does with its orders, in this process, with the model in the box."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.engine import Engine
from penstock.engine.request.demo import MINI, demo_picture
from penstock.profiles.options import Options
from penstock.serve.order import COMPLETED, FAILED, STOPPED, Order
from penstock.serve.runner import Runner


@pytest.fixture
def runner() -> Iterator[Runner]:
    models = {"one": str(MINI), "two": str(MINI)}
    with Runner(models, Options(vram="256MiB", ram="512MiB", device="cpu")) as runner:
        yield runner


def order(folder: Path, model: str) -> Order:
    made = folder / model
    made.mkdir()
    shutil.copy(demo_picture(), made / "image")
    settings = {"prompt": "it moves", "size": "32x32", "frames": 5, "steps": 2, "seed": 3}
    return Order(f"of {model}", model, settings | {"image": True}, str(made))


def silent(told: Mapping[str, Any]) -> None:
    return


def test_models_take_turns_and_what_is_done_is_not_done_again(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    close, real = Engine.close, Engine.open

    def closed(engine: Engine) -> None:
        opened.append("closed")
        close(engine)

    def noted(place: str, **said: Any) -> Engine:
        opened.append("opened")
        return real(place, **said)

    monkeypatch.setattr(Engine, "close", closed)
    monkeypatch.setattr(Engine, "open", noted)
    told: list[Mapping[str, Any]] = []
    first, second = order(tmp_path, "one"), order(tmp_path, "two")
    assert runner.run(first, told.append)["state"] == COMPLETED
    assert runner.run(second, silent)["state"] == COMPLETED
    assert opened == ["opened", "closed", "opened"]  # one at a time
    assert first.video.read_bytes() == second.video.read_bytes()
    steps = [each for each in told if each.get("phase") == "denoise" and each["preview"]]
    assert [each["step"] for each in steps] == [1, 2]
    shares = [each["progress"] for each in told if each["event"] == "progress"]
    assert shares == sorted(shares)
    made = first.video.stat()
    told.clear()
    again = runner.run(first, told.append)
    assert told == []
    assert (again["state"], again["size_bytes"]) == (COMPLETED, made.st_size)
    assert first.video.stat().st_mtime_ns == made.st_mtime_ns


def test_a_job_that_is_cancelled_before_it_begins_stops_and_goes_on(
    runner: Runner, tmp_path: Path
) -> None:
    ours = order(tmp_path, "one")
    runner.cancel(ours.id)
    assert runner.run(ours, silent) == {"state": STOPPED}
    assert runner.run(ours, silent)["state"] == COMPLETED


def test_a_model_that_is_gone_fails_its_jobs_and_no_path_is_told(
    runner: Runner, tmp_path: Path
) -> None:
    ours = order(tmp_path, "three")
    failed = runner.run(ours, silent)
    assert (failed["state"], failed["error"]["code"]) == (FAILED, "usage")
    assert str(tmp_path) not in str(failed)
