"""Every path option with everything that can be wrong with a path: one line, and nothing lost."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.request.demo import MINI
from tests.faults.paths import FAULTS, everything

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions, pipes and devices")

PICTURE = MINI.parent / "demo.png"
PLAN = ["plan", "--size", "64x64", "--frames", "5", "--device", "cpu"]
WITH = [*PLAN, "--model", str(MINI)]
MAKE = ["generate", "--model", str(MINI), "--image", str(PICTURE), "--prompt", "a", "--frames", "5",
        "--steps", "2", "--device", "cpu"]  # fmt: skip
AT = "<path>"

OPTIONS: dict[str, tuple[str, list[str]]] = {
    "plan --model": ("", [*PLAN, "--model", AT]),
    "plan --model FILE": (".safetensors", [*PLAN, "--model", AT]),
    "plan --model GGUF": (".gguf", [*PLAN, "--model", AT]),
    "plan --transformer": (".safetensors", [*WITH, "--transformer", AT]),
    "plan --text-encoder": (".safetensors", [*WITH, "--text-encoder", AT]),
    "plan --vae": (".safetensors", [*WITH, "--vae", AT]),
    "plan --image-encoder": ("", [*WITH, "--image-encoder", AT]),
    "plan --tokenizer": (".model", [*WITH, "--tokenizer", AT]),
    "plan --lora": (".safetensors", [*WITH, "--lora", AT]),
    "plan --image": (".png", ["plan", "--model", str(MINI), "--frames", "5", "--max-area", "64x64",
                              "--device", "cpu", "--image", AT]),
    "plan --profile": (".toml", [*WITH, "--profile", AT]),
    "generate --output": (".mp4", [*MAKE, "-o", AT]),
    "generate --continue": (".mp4", ["generate", "--model", str(MINI), "--continue", AT, "-o",
                                     "out.mp4", "--frames", "5", "--device", "cpu"]),
    "generate --last-image": (".png", [*MAKE, "-o", "out.mp4", "--last-image", AT]),
    "plan --transformer-2": (".safetensors", [*WITH, "--transformer-2", AT]),
    "batch": (".jsonl", ["batch", AT, "--model", str(MINI), "--device", "cpu", "-o", "videos"]),
    "generate --job": ("", [*MAKE, "-o", "out.mp4", "--job", AT]),
    "resume": ("", ["resume", AT]),
    "jobs rm": ("", ["jobs", "rm", AT]),
    "inspect": (".safetensors", ["inspect", AT]),
    "inspect FOLDER": ("", ["inspect", AT]),
    "verify": (".safetensors", ["verify", AT]),
    "pack --model": ("", ["pack", "--format", "int8", "-o", "packed", "--model", AT]),
    "pack --output": ("", ["pack", "--format", "int8", "--model", str(MINI), "-o", AT]),
    "bench --compare": (".json", ["bench", "--model", str(MINI), "--device", "cpu", "--compare",
                                  AT]),
    "bench --save": (".json", ["bench", "--model", str(MINI), "--device", "cpu", "--save", AT]),
    "bench --sweep": (".png", ["bench", "--model", str(MINI), "--device", "cpu", "--sweep", AT]),
    "demo --image": (".png", ["demo", "-o", "out.mp4", "--device", "cpu", "--image", AT]),
    "demo --output": (".mp4", ["demo", "--device", "cpu", "-o", AT]),
    "doctor --folder": ("", ["doctor", "--device", "cpu", "--folder", AT]),
    "--log-file": (".log", ["--log-file", AT, "profiles"]),
}  # fmt: skip

MADE = {"generate --job", "pack --output"}
"""What they name is made: a folder that is not there, whatever its name, is none of the faults."""


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_path_that_is_no_good_is_one_line(
    option: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if option in MADE and fault in ("missing", "other bytes", "control characters"):
        pytest.skip("a legal name of a folder that is made")
    place, work = tmp_path / "place", tmp_path / "work"
    place.mkdir()
    work.mkdir()
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))
    end, arguments = OPTIONS[option]
    with ExitStack() as undo, monkeypatch.context() as patch:
        patch.chdir(work)
        path = FAULTS[fault](place, end, patch, undo)
        patch.chdir(work)
        words = [str(path) if word == AT else word for word in arguments]
        run = CliRunner().invoke(app, words)
    lines = run.stderr.splitlines()
    told = [line for line in lines if line and not line.startswith("note: ")]
    assert run.exit_code in (1, 2), (run.exception, run.output)
    assert isinstance(run.exception, SystemExit), run.exc_info
    assert len(told) == 1 and told[0].startswith("error: "), run.stderr
    assert "\x1b" not in run.stderr
    made = everything(place)
    with ExitStack() as undo, pytest.MonkeyPatch.context() as patch:
        again = tmp_path / "again"
        again.mkdir()
        FAULTS[fault](again, end, patch, undo)
    assert made == {k.replace("again", "place", 1): v for k, v in everything(again).items()}
    assert everything(work) == {}
    assert not list(tmp_path.glob("data/jobs/*"))


@pytest.mark.parametrize("name", ["PENSTOCK_DATA_DIR", "PENSTOCK_CACHE"])
@pytest.mark.parametrize("fault", ["too long", "in a locked folder", "loop", "stale", "failing"])
def test_a_folder_of_penstocks_own_that_is_no_good_is_one_line(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["jobs"] if name == "PENSTOCK_DATA_DIR" else ["cache", "ls"]
    with ExitStack() as undo, monkeypatch.context() as patch:
        path = FAULTS[fault](tmp_path, "", patch, undo)
        patch.setenv(name, str(path))
        run = CliRunner().invoke(app, words)
    assert run.exit_code in (1, 2) and isinstance(run.exception, SystemExit), run.exc_info
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_an_unreadable_file_of_another_kind_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ComfyUI root may hold what is somebody else's."""
    import shutil

    from penstock.engine.files.locate import locate
    from tests.faults.paths import unprivileged

    models = tmp_path / "models"
    for part, folder in (
        ("transformer", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae"),
        ("image_encoder", "clip_vision"),
    ):  # fmt: skip
        shutil.copytree(MINI / part, models / folder / "wan")
    shutil.copytree(MINI / "tokenizer", models / "text_encoders" / "wan", dirs_exist_ok=True)
    private = models / "vae" / "private.safetensors"
    shutil.copy(next((MINI / "vae").glob("*.safetensors")), private)
    private.chmod(0)
    with unprivileged():
        found = locate(tmp_path)
    assert {part.component for part in found.components()} >= {"transformer", "vae"}


@pytest.mark.parametrize("option", ["--save", "--sweep"])
def test_a_benchmark_replaces_nobodys_file(option: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"weights")
    run = CliRunner().invoke(
        app, ["bench", "--model", str(MINI), "--device", "cpu", option, str(tmp_path / "mine")]
    )
    assert run.exit_code == 2, run.output
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert (tmp_path / "mine").read_bytes() == b"weights"
