"""Jobs on the command line: killed, listed, resumed, offered again, removed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from penstock.cli.main import app
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.store.journal import Journal
from tests.cli.held import signal_at_step
from tests.faults.film import frames_sha


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), vae={"base_dim": 8})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory of this test."""
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def request(model: Path, picture: Path, output: Path, *more: str) -> list[str]:
    return [
        "generate", "--model", str(model), "--image", str(picture), "--prompt", "a cat yawns",
        "--size", "64x48", "--frames", "5", "--steps", "12", "--seed", "5", "-o", str(output),
        "--vram", "200MiB", "--ram", "200MiB", *more,
    ]  # fmt: skip


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("words", [["jobs"], ["jobs", "rm", "kept"], ["cache", "ls"]])
def test_lists_come_without_torch(words: list[str], data: Path) -> None:
    Journal.create(data / "jobs" / "kept", {"steps": 4}, {}, {}).close()
    code = (
        "import sys; from penstock.cli.main import main; sys.argv = ['penstock', *sys.argv[1:]]\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("kept" in done.stdout + done.stderr) == (words != ["cache", "ls"])
    assert (data / "jobs" / "kept").exists() == ("rm" not in words)


def one_job() -> dict[str, object]:
    (info,) = json.loads(call("jobs", "--json").stdout)
    return info


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_a_killed_command_is_listed_resumed_and_removed(
    model: Path, picture: Path, tmp_path: Path, data: Path
) -> None:
    whole, output = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    assert (
        call(*request(model, picture, whole, "--job", str(tmp_path / "elsewhere"))).exit_code == 0
    )
    code, _ = signal_at_step(request(model, picture, output), 3, signal.SIGKILL)
    assert code == -signal.SIGKILL and not output.exists()
    info = one_job()
    assert info["state"] == "killed" and info["step"] >= 2 and info["steps"] == 12
    table = call("jobs").stdout
    assert "killed" in table and f"{info['step']}/12" in table and "iB" in table
    resumed = call("resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert frames_sha(output) == frames_sha(whole)
    assert one_job()["state"] == "done"
    assert call("resume", str(info["name"])).exit_code == 1
    removed = call("jobs", "rm", str(info["name"]))
    assert removed.exit_code == 0 and str(info["name"]) in removed.stdout
    assert call("jobs").stdout == "no jobs\n" and output.exists()
    assert "no job" in call("jobs", "rm", "another").stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_acknowledged_and_the_state_is_saved(
    model: Path, picture: Path, tmp_path: Path, data: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out.mp4"
    arguments = request(model, picture, output)
    code, told = signal_at_step(arguments, 2, number)
    assert code == 130
    assert "note: stopping at the next block or tile" in told
    assert "cancelled" in told and "penstock resume" in told
    info = one_job()
    assert info["state"] == "stopped"
    assert info["step"] == 3, "that which was under way is finished, and none is begun"
    asked = call(*request(model, picture, output, "--resume", "--json"))
    assert asked.exit_code == 0, asked.stderr
    assert one_job()["state"] == "done" and output.exists()


def test_an_unfinished_identical_job_is_offered(
    model: Path, picture: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.engine.run.events import PhaseStarted
    from penstock.errors import NonFinite
    from tests.engine.run.test_model_changes import at_event

    def fail() -> None:
        raise NonFinite("a test")

    with monkeypatch.context() as patched:
        at_event(patched, lambda e: isinstance(e, PhaseStarted) and e.phase == "denoise", fail)
        failed = call(*request(model, picture, tmp_path / "a.mp4", "--steps", "2"))
    assert failed.exit_code == 1 and "penstock resume" in failed.stderr
    again = call(*request(model, picture, tmp_path / "b.mp4", "--steps", "2"))
    assert again.exit_code == 0
    assert f"penstock resume {data}" in again.stderr.replace("\n", "")
    states = sorted(info["state"] for info in json.loads(call("jobs", "--json").stdout))
    assert states == ["done", "failed"]
    other = call(*request(model, picture, tmp_path / "c.mp4", "--steps", "3"))
    assert "the same and unfinished" not in other.stderr
