"""The command line as a person uses it: child processes, real files, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from penstock.cli.main import app, prefer_pages
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.media.video import read_metadata
from tests.cli.held import signal_at_step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), vae={"base_dim": 8})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "penstock.cli.main", *map(str, arguments)]


def _call(*arguments: str | Path) -> Result:
    """The same in this process: quicker where no signal and no fresh interpreter is needed."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*arguments), capture_output=True, text=True, env=_environment())


def _generate(model: Path, picture: Path, output: Path, *more: str) -> list[str | Path]:
    request = ["--prompt", "a cat yawns", "--size", "64x48", "--frames", "9", "--steps", "3"]
    return ["generate", "--model", model, "--image", picture, *request, "-o", output, *more]


def test_generate_writes_a_video_and_one_json_object(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cat.mp4"
    run = _run(*_generate(model, picture, output, "--seed", "5", "--json"))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(run.stdout.splitlines()) == 1
    assert result["report"]["seed"] == 5
    assert result["report"]["peak_vram_bytes"] <= result["plan"]["peak_vram_bytes"]
    assert result["report"]["imports_s"] > 0
    assert "s of imports" in run.stderr
    for phase in ("text", "image", "encode", "denoise", "decode"):
        assert f"{phase}:" in run.stderr
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 48, 16)
        assert sum(1 for _ in container.decode(stream)) == 9
    metadata = read_metadata(output)
    assert metadata["prompt"] == "a cat yawns"
    assert metadata["seed"] == 5
    assert metadata["steps"] == 3


def test_no_metadata_leaves_the_prompt_out(model: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "cat.mp4"
    run = _call(*_generate(model, picture, output, "--no-metadata"))
    assert run.exit_code == 0, run.stderr
    assert b"yawns" not in output.read_bytes()


def test_a_budget_no_plan_fits_is_refused_before_loading(
    model: Path, picture: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cat.mp4"
    run = _call(*_generate(model, picture, output, "--vram", "1MiB"))
    assert run.exit_code == 1
    assert "no plan fits the VRAM budget" in run.stderr
    assert "largest consumer" in run.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "10"], "nearest legal number of frames is 9"),
        (["--size", "70x48"], "nearest legal width is 64"),
        (["--vram", "much"], "not a size in bytes"),
        (["--device", "tpu"], "unknown device"),
        (["--max-area", "480p"], "--size or --max-area"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    flags: list[str], message: str, model: Path, picture: Path, tmp_path: Path
) -> None:
    run = _call(*_generate(model, picture, tmp_path / "cat.mp4", *flags))
    assert run.exit_code == 2
    assert message in run.stderr
    assert run.stderr.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(picture: Path, tmp_path: Path) -> None:
    run = _run(*_generate(tmp_path, picture, tmp_path / "cat.mp4", "--debug"))
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "model_index.json" in run.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_and_leaves_nothing(
    number: signal.Signals, model: Path, picture: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cat.mp4"
    arguments = map(str, _generate(model, picture, output, "--steps", "400"))
    code, told = signal_at_step(list(arguments), 2, number)
    assert code == 130
    assert "cancelled" in told and "denoise: 4/" not in told
    assert list(tmp_path.iterdir()) == []


def test_the_demo_makes_a_video(tmp_path: Path) -> None:
    output = tmp_path / "demo.mp4"
    run = _call("demo", "-o", output)
    assert run.exit_code == 0, run.stderr
    assert output.stat().st_size > 1000
    assert str(output) in run.stderr.replace("\n", "")
    assert (tmp_path / "demo.frames.png").stat().st_size > 1000
    assert _call("demo", "-o", output).exit_code != 0
    assert output.stat().st_size > 1000


def test_version() -> None:
    from penstock import __version__

    assert _call("--version").stdout.strip() == __version__


def test_the_package_runs_as_a_program() -> None:
    from penstock import __version__

    said = subprocess.run(
        [sys.executable, "-m", "penstock", "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == __version__


def test_pages_are_asked_for_where_there_are_some_and_nothing_else_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
    monkeypatch.setattr(sys, "platform", "linux")
    for said in (*({name: "max_split_size_mb:64"} for name in names), {}):
        environ = dict(said)
        prefer_pages(environ)
        assert environ == (said or dict.fromkeys(names, "expandable_segments:True"))
    monkeypatch.setattr(sys, "platform", "win32")
    environ = {}
    prefer_pages(environ)
    assert not environ
