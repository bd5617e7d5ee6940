"""One output, several jobs: none is lost, and each says where its video is."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.media import video
from penstock.engine.media.claim import OutputClaim
from penstock.engine.media.video import check_no_input, read_frames, write_video
from penstock.engine.store.durable import FileOps
from penstock.errors import OutputError
from tests.engine.running import Gate
from tests.faults.races import one_name

ODD = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


def flat(value: int) -> list[np.ndarray]:
    return [np.full((32, 32, 3), value, np.uint8)] * 2


def shown(path: Path) -> int:
    return round(float(next(read_frames(path)).mean()))


@pytest.fixture(params=["links", "no links"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with hard links, and one without."""
    if request.param == "no links":

        def refuse(*arguments: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


def test_a_name_is_given_in_one_step_and_never_taken_away(tmp_path: Path, system: str) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    FileOps().rename_new(tmp_path / "a", tmp_path / "c")
    with pytest.raises(FileExistsError):
        FileOps().rename_new(tmp_path / "b", tmp_path / "c")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "b", "c": "a"}
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        FileOps().rename_new(tmp_path / "b", tmp_path / "dangling")


def test_two_at_the_last_step_are_both_kept(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked at the name before either took it: a disk whose sync takes long."""
    both, flush = threading.Barrier(2), video._flush
    monkeypatch.setattr(video, "_flush", lambda *a: (flush(*a), both.wait(60)))
    wrote: dict[int, Path] = {}

    def job(value: int) -> None:
        found = write_video(tmp_path / "out.mp4", flat(value), 8, or_beside=True)
        wrote[value] = found.path

    jobs = [threading.Thread(target=job, args=(value,)) for value in (40, 200)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()
    assert sorted(path.name for path in wrote.values()) == ["out-2.mp4", "out.mp4"]
    assert all(abs(shown(path) - value) < 5 for value, path in wrote.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-2.mp4", "out.mp4"]


def test_races_of_processes_for_one_name(tmp_path: Path) -> None:
    assert one_name(tmp_path, races=20) == (20, 0)


def test_the_frames_go_beside_a_file_that_appeared(tmp_path: Path) -> None:
    def frames() -> object:
        yield from flat(90)
        (tmp_path / "out.mp4").write_bytes(b"new")
        (tmp_path / "out-2.mp4").write_bytes(b"newer")

    written = write_video(tmp_path / "out.mp4", frames(), 8, or_beside=True)
    assert written.path == tmp_path / "out-3.mp4"
    assert abs(shown(written.path) - 90) < 5
    assert (tmp_path / "out.mp4").read_bytes() == b"new"
    long = "x" * 240
    (tmp_path / f"{long}.mp4").write_bytes(b"")
    assert len(video._numbered(tmp_path / f"{long}.mp4", 2).name) < 60


def test_a_claim_is_one_jobs_until_it_ends(tmp_path: Path) -> None:
    claim = OutputClaim(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match=rf"another job.*process {os.getpid()}"):
        OutputClaim(tmp_path / "x" / ".." / "a.mp4")
    OutputClaim(tmp_path / "b.mp4").release()
    claim.release()
    claim.release()
    OutputClaim(tmp_path / "a.mp4").release()
    assert list(tmp_path.iterdir()) == []


def test_no_claim_where_no_data_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "file"))
    OutputClaim(tmp_path / "a.mp4").release()


def test_an_input_is_no_output_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("in")
    (tmp_path / "soft.mp4").symlink_to(tmp_path / "in")
    os.link(tmp_path / "in", tmp_path / "hard.mp4")
    for name in ("in", "soft.mp4", "hard.mp4"):
        with pytest.raises(OutputError, match="own inputs"):
            check_no_input(tmp_path / name, [tmp_path / "other", tmp_path / "in"])
    check_no_input(tmp_path / "new.mp4", [tmp_path / "in"])


def test_a_second_job_is_refused_and_a_file_that_came_meanwhile_stays(
    t2v_folder: Path, tmp_path: Path
) -> None:
    from tests.engine.run.test_resume import a_request, an_engine

    gate, output = Gate(), tmp_path / "out.mp4"
    with an_engine(t2v_folder) as engine, an_engine(t2v_folder) as other:
        job = engine.submit(a_request(None), output, on_step=gate)
        assert gate.reached.wait(120)
        with pytest.raises(OutputError, match="another job"):
            other.submit(a_request(None), output)
        with pytest.raises(OutputError, match="another job"):
            other.submit(a_request(None), output, job_dir=tmp_path / "job")
        assert not (tmp_path / "job").exists()
        output.write_text("mine")
        gate.open()
        report = job.result().report
    assert report.output == str(tmp_path / "out-2.mp4")
    assert any("out-2.mp4" in told for told in report.notices)
    assert output.read_text() == "mine"
    assert shown(tmp_path / "out-2.mp4") >= 0


@pytest.mark.parametrize("which", ["picture", "weights", "tokenizer"])
def test_an_input_is_not_overwritten_even_by_force(
    i2v_folder: Path, picture: Path, tmp_path: Path, which: str
) -> None:
    from tests.engine.run.test_resume import a_request, an_engine

    inputs = {
        "picture": picture,
        "weights": next((i2v_folder / "vae").glob("*.safetensors")),
        "tokenizer": next(p for p in (i2v_folder / "tokenizer").iterdir() if p.is_file()),
    }
    output = tmp_path / "out.mp4"
    output.symlink_to(inputs[which])
    before = inputs[which].read_bytes()
    with an_engine(i2v_folder) as engine, pytest.raises(OutputError, match="own inputs"):
        engine.submit(a_request(picture), output, force=True)
    assert inputs[which].read_bytes() == before


def test_a_resumed_job_replaces_only_a_file_with_its_own_bytes(
    t2v_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.engine.store.journal import Journal
    from tests.engine.run.test_resume import a_request, an_engine

    output, folder = tmp_path / "out.mp4", tmp_path / "job"
    mark = Journal.mark

    def die(self: Journal, state: str, **facts: object) -> None:
        if state == "done":
            raise KeyboardInterrupt
        mark(self, state, **facts)

    with an_engine(t2v_folder) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "mark", die)
            with pytest.raises(KeyboardInterrupt):
                engine.submit(a_request(None), output, job_dir=folder).result()
        own = output.read_bytes()
        output.write_bytes(own + b"cut by hand")
        with pytest.raises(OutputError, match="exists"):
            engine.resume(folder)
        assert output.read_bytes() == own + b"cut by hand"
        output.write_bytes(own)
        engine.resume(folder).result()
    assert output.read_bytes() == own
