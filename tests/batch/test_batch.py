"""Lists made by workers that live, die and are stopped: each output once, and the same frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.dispatch import MOST_DEATHS, WORKER_DIED, Began, Told
from penstock.batch.folder import OutputFolder
from penstock.batch.lines import read_lines
from penstock.batch.results import RESULTS_FILE, Result
from penstock.batch.run import Batch, make
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.errors import JobCancelled, JobLocked, UsageError
from penstock.profiles.options import Options
from penstock.serve import runner
from tests.batch.hands import Hands, make_list
from tests.faults.film import frames_sha

STEPS = 3


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All progress is told, however fast it comes."""
    monkeypatch.setattr(runner, "TELL_S", 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8})


def line(name: str, **more: Any) -> dict[str, Any]:
    shape = {"size": "32x32", "frames": 1, "steps": STEPS, "cfg": 1}
    return {"id": name, "prompt": f"a circle called {name}", **shape, **more}


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in (folder / RESULTS_FILE).read_text().splitlines()]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Frames of undisturbed runs, by the names of requests."""
    folder = tmp_path_factory.mktemp("whole")
    requests = write(folder, *(line(name) for name in "ab"))
    make_list(requests, folder / "out", model, Hands())
    return {name: frames_sha(folder / "out" / f"{name}.mp4") for name in "ab"}


def test_a_list_is_made_once(model: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    requests, output = write(tmp_path, line("a"), line("b")), tmp_path / "out"
    summary, told = make_list(requests, output, model, Hands({}, {}))
    assert (summary.requests, summary.made, summary.done, summary.failed) == (2, 2, 0, 0)
    assert {name: frames_sha(output / f"{name}.mp4") for name in "ab"} == whole
    assert left(output) == ["a.mp4", "b.mp4", RESULTS_FILE], "and nothing else is left there"
    noted = {each["id"]: each for each in results(output)}
    assert {each["state"] for each in noted.values()} == {"completed"}
    assert noted["a"]["report"]["frames"] == 1 and noted["a"]["began"] == "anew"
    assert {news.worker for news in told if isinstance(news, Began)} == {"hand 0", "hand 1"}
    assert any(isinstance(news, Told) and news.event["event"] == "progress" for news in told)

    (asked, _), _ = read_lines(requests, str(model))
    with OutputFolder(output) as folder:  # a process died while it tidied up
        rest = folder.place_of(asked) / "journal"
    rest.mkdir(parents=True)
    (rest / "lock").write_text("1\n")
    hands = Hands()
    again, _ = make_list(write(tmp_path, line("a"), line("b")), output, model, hands)
    assert left(output) == ["a.mp4", "b.mp4", RESULTS_FILE]
    assert (again.made, again.done) == (0, 2) and hands.ran == [] and len(results(output)) == 2


def test_one_engine_makes_all_lines_of_a_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.engine.engine import Engine

    opened: list[Any] = []
    original = Engine.open.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Engine, "open",
        classmethod(lambda cls, place, **more: (
            opened.append(place), original(cls, place, **more)
        )[1]),
    )  # fmt: skip
    link = tmp_path / "other"
    link.symlink_to(model)
    lines = [line("a", steps=1), line("b", steps=1, model=str(link)), line("c", steps=1)]
    hands = Hands()
    make_list(write(tmp_path, *lines), tmp_path / "out", model, hands)
    assert opened == [str(model), str(link)] and hands.ran == ["a", "c", "b"]


def test_nothing_is_begun_while_a_line_is_bad(model: Path, tmp_path: Path) -> None:
    bad = line("huge", size="2048x2048", frames=81), line("odd", frames=6), {"prompt": ""}
    requests, output, hands = write(tmp_path, line("a"), *bad), tmp_path / "out", Hands()
    seen: list[Any] = []
    options = Options(device="cpu", vram="200MiB", ram="200MiB")
    batch = Batch(requests, output, str(model), options=options, crowd=hands)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 of the list's lines") as refused:
        make(batch, seen.append, lambda todo, names: seen.append(todo), lambda stop: None)
    assert refused.value.exit_code == 2
    (todo,) = seen
    told = [str(each) for each in todo.bad]
    assert [text.split(":")[0] for text in told] == ["line 2", "line 3", "line 4"]
    assert "no plan fits" in told[0] and "nearest legal number of frames is" in told[1]
    assert hands.ran == [] and left(output) == []

    summary, _ = make_list(requests, output, model, hands, skip_bad=True)
    assert (summary.made, summary.failed) == (1, 3) and hands.ran == ["a"]
    codes = {each["id"]: (each["error"] or {}).get("code") for each in results(output)}
    assert codes == {"huge": "over_budget", "odd": "request", "0004": "request", "a": None}


def test_a_dying_workers_job_goes_on_from_its_last_step(
    model: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    output = tmp_path / "out"
    hands = Hands({"dies": ("a", 2)})
    _, told = make_list(write(tmp_path, line("a")), output, model, hands)
    began = [news for news in told if isinstance(news, Began)]
    assert [news.began for news in began] == ["anew", "at step 2"]
    assert began[1].death == "hand 0 was ended by signal 9"
    assert results(output)[0]["began"] == "at step 2"
    assert frames_sha(output / "a.mp4") == whole["a"]


def test_a_worker_that_sees_no_folder_says_that_it_begins_anew(
    model: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    output = tmp_path / "out"
    hands = Hands({"dies": ("a", 2), "unseen": True})
    make_list(write(tmp_path, line("a")), output, model, hands)
    assert results(output)[0]["began"] == "anew"


def test_a_request_that_kills_its_workers_is_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.serve.child import Died
    from tests.batch.hands import LocalWorker

    run = LocalWorker.run

    async def deadly(worker: LocalWorker, order: Any, tell: Any) -> Any:
        if order.id == "a":
            worker.ran.append("a")
            raise Died("was ended by signal 11")
        return await run(worker, order, tell)

    monkeypatch.setattr(LocalWorker, "run", deadly)
    hands = Hands()
    requests = write(tmp_path, line("a"), line("b", steps=1))
    summary, _ = make_list(requests, tmp_path / "out", model, hands)
    assert hands.ran == ["a"] * MOST_DEATHS + ["b"]
    assert (summary.made, summary.failed) == (1, 1)
    failed = results(tmp_path / "out")[0]
    assert failed["error"]["code"] == WORKER_DIED and "signal 11" in failed["error"]["message"]


def test_a_stopped_list_goes_on_where_it_was(
    model: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    requests, output = write(tmp_path, line("a"), line("b")), tmp_path / "out"
    options = Options(device="cpu", vram="200MiB", ram="200MiB")
    stops: list[Any] = []

    def stop_at_step(news: Any) -> None:
        told = news.event if isinstance(news, Told) else {}
        if (told.get("unit"), told.get("step")) == ("step", 2):
            stops[0]()

    batch = Batch(requests, output, str(model), options=options, crowd=Hands())  # type: ignore[arg-type]
    with pytest.raises(JobCancelled, match="stopped"):
        make(batch, stop_at_step, lambda todo, names: None, stops.append)
    assert left(output) == ["jobs"]
    _, told = make_list(requests, output, model, Hands())
    assert [news.began for news in told if isinstance(news, Began)][0].startswith("at step ")
    assert {name: frames_sha(output / f"{name}.mp4") for name in "ab"} == whole


def test_a_video_that_nobody_noted_is_noted_and_not_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, output = write(tmp_path, line("a")), tmp_path / "out"

    def killed(*_: Any) -> Result:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "_note", killed)
        with pytest.raises(KeyboardInterrupt):
            make_list(requests, output, model, Hands())
    assert (output / "a.mp4").exists() and not (output / RESULTS_FILE).exists()
    hands = Hands()
    summary, _ = make_list(requests, output, model, hands)
    assert (summary.done, summary.made) == (1, 0) and hands.ran == []
    assert [each["began"] for each in results(output)] == ["done"]
    assert left(output) == ["a.mp4", RESULTS_FILE]


def test_a_strangers_file_and_a_changed_line_are_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "b.mp4").write_bytes(b"somebody's")
    requests = write(tmp_path, line("a", steps=1), line("b"))
    make_list(requests, output, model, Hands(), skip_bad=True)
    assert (output / "b.mp4").read_bytes() == b"somebody's"
    assert results(output)[0]["error"]["code"] == "output"
    changed = write(tmp_path, line("a", steps=2))
    noted, hands = results(output), Hands()
    summary, _ = make_list(changed, output, model, hands, skip_bad=True)
    assert (summary.failed, hands.ran) == (1, []) and results(output) == noted
    with pytest.raises(UsageError, match="1 of the list's lines"):
        make_list(changed, output, model, hands)


def test_two_processes_do_not_work_on_one_folder(model: Path, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"), pytest.raises(JobLocked):
        make_list(write(tmp_path, line("a")), tmp_path / "out", model, Hands())


def test_a_line_goes_on_from_a_video(model: Path, tmp_path: Path) -> None:
    requests = write(tmp_path, line("a", steps=1, frames=5, fps=8))
    make_list(requests, tmp_path / "one", model, Hands())
    before = str(tmp_path / "one" / "a.mp4")
    further = write(tmp_path, {"id": "b", "continue": before, "prompt": "on", "frames": 5})
    with pytest.raises(UsageError):  # a model of text alone takes no frame to start from
        make_list(further, tmp_path / "two", model, Hands())
