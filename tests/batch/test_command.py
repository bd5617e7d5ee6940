"""``penstock batch`` as a command, whose worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.families.wan.tiny import write_tiny_model


def command(requests: Path, output: Path, model: Path, *more: str) -> list[str]:
    return [
        "batch", str(requests), "-o", str(output), "--model", str(model),
        "--vram", "200MiB", "--ram", "200MiB", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_model(folder, image_to_video=False, vae={"base_dim": 8})


def test_bad_lines_are_told_and_nothing_is_begun(tmp_path: Path, model: Path) -> None:
    requests = tmp_path / "list.jsonl"
    requests.write_text('{"prompt": "p", "frames": 5}\n{"prompt": "p", "frames": 6}\nno\n')
    told = CliRunner().invoke(app, command(requests, tmp_path / "out", model, "--device", "cpu"))
    assert told.exit_code == 2, told.stderr
    assert "line 2: illegal number of frames" in told.stderr
    assert "line 3: not valid JSON" in told.stderr and "--skip-bad" in told.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_a_killed_workers_request_is_made_by_another(tmp_path: Path, model: Path) -> None:
    requests, output = tmp_path / "list.jsonl", tmp_path / "out"
    shape = {"size": "64x64", "frames": 5, "steps": 150, "cfg": 1}
    requests.write_text(json.dumps({"id": "long", "prompt": "p", **shape}))
    child = subprocess.Popen(
        [sys.executable, "-m", "penstock",
         *command(requests, output, model, "--devices", "cpu")],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "300"},
    )  # fmt: skip
    with child:
        (journal,) = _waited(lambda: list(output.glob("jobs/long-*/journal/state-1.safetensors")))
        owner = int((journal.parent / "lock").read_text())
        assert psutil.Process(owner).ppid() == child.pid
        os.kill(owner, signal.SIGKILL)
        told = child.stderr.read()  # type: ignore[union-attr]
    assert child.returncode == 0, told
    assert "was ended by signal 9; goes on at step " in told
    (result,) = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert (result["id"], result["state"]) == ("long", "completed")
    assert result["began"].startswith("at step ")
    assert sorted(path.name for path in output.iterdir()) == ["long.mp4", "results.jsonl"]


def _waited(found: Callable[[], list[Path]]) -> list[Path]:
    """What ``found`` gives once it gives something."""
    while not (there := found()):
        time.sleep(0.02)
    return there
