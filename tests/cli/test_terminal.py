"""What is shown is text as it is, and whether anybody sees it decides nothing."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.cli.progress import Display
from penstock.cli.terminal import Screen, asks_a_person, printable
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.run.events import Notice
from tests.cli.test_jobs import request

posix = pytest.mark.skipif(os.name == "nt", reason="pipes, terminals and signals of POSIX")


@pytest.fixture(autouse=True)
def of_a_shell() -> Iterator[None]:
    """Signals as a shell gives them to a program: what runs these tests may ignore some (nohup),
    and the programs that they start would inherit that."""
    if os.name == "nt":
        yield
        return
    before = {each: signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), vae={"base_dim": 8})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PENSTOCK_DATA_DIR": str(tmp_path / "data")}
    return os.environ | own | more


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "penstock", *arguments]


def test_control_characters_are_escaped_and_everything_else_is_shown() -> None:
    assert printable("a\x1b[2Jb\x07\x9bc") == r"a\x1b[2Jb\x07\x9bc"
    assert printable("caf\udce9") == r"caf\udce9"
    assert printable("one\ntwo\t\u202eeno") == r"one\ntwo\t\u202eeno"
    assert printable("one\ntwo", lines=True) == "one\ntwo"
    assert printable("猫 é [red]x[/] :smile:") == "猫 é [red]x[/] :smile:"


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/]", "a[red", ":smile: [link=x]y[/link]"])
def test_markup_is_text_wherever_it_is_shown(text: str) -> None:
    from rich.table import Table

    screen = Screen(stderr=True)
    screen.file = io.StringIO()
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    screen.print(text)
    screen.print(table)
    Display(screen, None).show(Notice(text))  # type: ignore[arg-type]
    assert screen.file.getvalue().count(text) == 5
    screen.print("\x1b[2J")
    assert "\x1b[2J" not in screen.file.getvalue()


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a\x1b[31m[bold]": torch.zeros(2), "blocks.0.x\x07.diff": torch.zeros(2)}, path)
    for words in (["inspect", str(path)], ["verify", str(path)]):
        run = CliRunner().invoke(app, words)
        assert "\x1b" not in run.output and "\x07" not in run.output, words


@pytest.mark.parametrize("words", [["--prompt", "caf\udce9"], ["--negative", "caf\udce9"],
                                   ["-o", "caf\udce9.mp4"]])  # fmt: skip
def test_what_is_no_text_is_one_line(
    model: Path, picture: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, [*request(model, picture, tmp_path / "a.mp4"), *words])
    assert run.exit_code == 2, run.exc_info
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_model_in_a_folder_of_any_name_runs_or_is_refused_in_one_line(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / os.fsdecode(b"mod\xe9le [red]")
    shutil.copytree(model, folder)
    words = request(folder, picture, tmp_path / "a.mp4", "--steps", "1")
    run = subprocess.run(
        command(*words), capture_output=True, env=environment(tmp_path), timeout=240
    )
    assert b"Traceback" not in run.stderr
    listed = subprocess.run(
        command("jobs", "--json"), capture_output=True, env=environment(tmp_path), timeout=60
    )
    (job,) = json.loads(listed.stdout)
    assert job["state"] == ("failed" if run.returncode else "done")
    assert run.returncode == 0 or b"tokenizer" in run.stderr.splitlines()[-1]


@posix
@pytest.mark.parametrize("way", ["closed pipes", "no streams", "full disk", "ascii"])
def test_a_job_goes_on_where_nobody_reads(
    model: Path, picture: Path, tmp_path: Path, way: str
) -> None:
    output = tmp_path / "out.mp4"
    words = command(*request(model, picture, output, "--steps", "2"))
    how: dict[str, object] = {"env": environment(tmp_path)}
    if way == "closed pipes":
        reader, writer = os.pipe()
        os.close(reader)
        how |= {"stdout": writer, "stderr": writer, "stdin": subprocess.DEVNULL}
    elif way == "no streams":
        words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    elif way == "full disk":
        how |= {"stderr": open("/dev/full", "w")}  # noqa: PTH123, SIM115 - closed with the test
    else:
        how["env"] = environment(tmp_path, PYTHONIOENCODING="ascii:strict", LC_ALL="C")
        how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        words += ["--negative", "猫"]
    run = subprocess.run(words, check=False, timeout=240, **how)
    assert run.returncode == 0, run.stderr
    assert output.stat().st_size > 500
    (job,) = (tmp_path / "data" / "jobs").iterdir()
    assert {path.name for path in job.iterdir()} >= {"latents.safetensors"}


@posix
def test_an_answer_that_cannot_be_written_is_an_error_and_one_that_nobody_reads_is_none(
    tmp_path: Path,
) -> None:
    words = command("profiles")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        run = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=60, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and "\n" in run.stderr
    assert run.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=60, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_job_is_stopped_however_often_it_is_told(
    model: Path, picture: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = command(*request(model, picture, tmp_path / "out.mp4", "--steps", "200"))
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("denoise: 2/"):
                break
        for _ in range(3):
            child.send_signal(number)
        rest = child.stderr.read()
        assert child.wait(timeout=120) == 130, rest
    assert "note: stopping at the next block or tile" in rest
    assert "cancelled" in rest and "Traceback" not in rest
    run = subprocess.run(
        command("jobs", "--json"), capture_output=True, env=environment(tmp_path), timeout=60
    )
    (job,) = json.loads(run.stdout)
    assert job["state"] == "stopped" and job["step"] >= 2


@posix
def test_a_terminal_that_goes_away_stops_the_job_and_saves_it(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    import pty

    leader, follower = pty.openpty()
    words = command(*request(model, picture, tmp_path / "out.mp4", "--steps", "200"))
    child = subprocess.Popen(
        words, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env=environment(tmp_path, TERM="xterm", COLUMNS="300"),
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while not re.search(rb"denoise[^\n]*?\b([2-9]|[1-9]\d+)/200", seen):
        seen = (seen + os.read(leader, 1 << 16))[-(1 << 16) :]
    os.close(leader)
    assert child.wait(timeout=120) == 130
    run = subprocess.run(
        command("jobs", "--json"), capture_output=True, env=environment(tmp_path), timeout=60
    )
    (job,) = json.loads(run.stdout)
    assert job["state"] == "stopped" and job["step"] >= 2


@posix
def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.cli.stopping import Stopping
    from penstock.errors import JobCancelled

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            asked: list[int] = []
            with pytest.raises(JobCancelled, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            stop.at(lambda: asked.append(1))
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nobody_is_asked_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stdin in (None, io.StringIO(), closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert not asks_a_person()
