"""`plan` and `generate` of pipelines that penstock has no code for, by their folder."""

from __future__ import annotations

import json
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from typer.testing import CliRunner

from penstock.cli import foreign
from penstock.cli.main import app
from penstock.engine.attach.calling import NOT_SAID, Argument, arguments_of, parse
from penstock.engine.attach.foreign_plan import RESTARTS, TILED, UNMEASURED
from penstock.engine.run.jobs import describe, opening_of
from penstock.errors import JournalError, OutputError, RequestError
from tests.engine.attach.tiny_ltx2 import REQUEST, ltx2
from tests.versions import TRANSFORMERS_4

pytestmark = pytest.mark.skipif(TRANSFORMERS_4, reason="LTX-2 is newer")
WORDS = [word for name, value in REQUEST.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline."""
    path = tmp_path_factory.mktemp("ltx2")
    ltx2().save_pretrained(path)
    return path


def _call(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def test_planned_refused_and_made(folder: Path, tmp_path: Path) -> None:
    """The least budget that a plan names is enough, and is kept; nothing smaller is begun."""
    told = ("--model", folder, "--device", "cpu", "--ram", "2MiB", *WORDS)
    planned = _call("plan", *told, "--vram", "1GiB", "--json")
    assert planned.exit_code == 0, planned.output
    roomy = json.loads(planned.stdout)
    names = [each["name"] for each in roomy["networks"]]
    assert names == ["text_encoder", "connectors", "transformer", "vae", "audio_vae", "vocoder"]
    calls = {each["name"]: each["calls"] for each in roomy["networks"]}
    assert calls["transformer"] == 3 * REQUEST["num_inference_steps"] and calls["vae"] == 1
    assert all(each["activation_bytes"] > 0 for each in roomy["networks"])
    assert TILED not in roomy["notes"]
    assert any(note.startswith("resumable: ") for note in roomy["notes"])
    assert roomy["kept"]["networks"] == ["transformer"]
    assert roomy["kept"]["calls"] == calls["transformer"]

    seconds = {each["name"]: each["seconds"] for each in roomy["networks"]}
    assert min(seconds.values()) > 0 and roomy["seconds"] == pytest.approx(sum(seconds.values()))
    longer = [str(word).replace("num_inference_steps=2", "num_inference_steps=20") for word in told]
    more = json.loads(_call("plan", *longer, "--vram", "1GiB", "--json").stdout)
    for each in more["networks"]:
        took = each["seconds"] > seconds[each["name"]]
        assert took == (each["name"] == "transformer")
    assert "; about " in _call("plan", *told, "--vram", "1GiB").stdout

    small = _call("plan", *told, "--vram", roomy["vram_bytes"] // 3)
    assert small.exit_code == 1 and "no plan fits the VRAM budget" in small.output

    out = tmp_path / "out.mp4"
    done = _call("generate", "-o", out, *told, "--vram", roomy["vram_bytes"], "--seed", 3, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)["report"]
    assert report["frames"] == REQUEST["num_frames"] and report["seed"] == 3
    assert 0 < report["peak_vram_bytes"] <= roomy["vram_bytes"]
    assert f"steps: {REQUEST['num_inference_steps']}/" in done.stderr
    with av.open(str(out)) as file:
        (video,), (sound,) = file.streams.video, file.streams.audio
        assert (video.width, video.height) == (REQUEST["width"], REQUEST["height"])
        assert video.average_rate == Fraction(24) and sound.rate == 48000
        heard = sum(frame.samples for frame in file.decode(audio=0))
    assert heard > 0


def test_stopped_and_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, `jobs`, `resume` and `jobs rm`; the file is that of a job that was never stopped."""
    whole, out, place = tmp_path / "whole.mp4", tmp_path / "out.mp4", tmp_path / "job"
    told = ("generate", "--model", folder, "--device", "cpu", "--vram", "1GiB", "--ram", "2MiB",
            *WORDS, "--seed", 3, "--json")  # fmt: skip
    assert _call(*told, "-o", whole).exit_code == 0
    shown = foreign._StepBar.told

    def stops(self: Any, step: int, steps: int) -> None:
        shown(self, step, steps)
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(foreign._StepBar, "told", stops)
        stopped = _call(*told, "-o", out, "--job", place)
    assert stopped.exit_code == 130 and f"penstock resume {place}" in stopped.output
    assert not out.exists()
    info = describe(place)
    assert (info.state, info.step, info.steps) == ("stopped", 1, REQUEST["num_inference_steps"])
    with pytest.raises(JournalError, match="diffusers runs"):
        opening_of(place)
    (place / "call-1.safetensors").unlink()

    resumed = _call("resume", place, "--json")
    assert resumed.exit_code == 0, resumed.output
    report = json.loads(resumed.stdout)["report"]
    assert (report["answered_calls"], report["computed_calls"]) == (2, 4) and report["seed"] == 3
    assert "2 of 6 calls answered from records" in " ".join(resumed.stderr.split())
    assert out.read_bytes() == whole.read_bytes()
    assert not list(place.glob("call-*")) and describe(place).step == describe(place).steps
    assert _call("resume", place).exit_code == 1  # it is done
    assert _call("jobs", "rm", place).exit_code == 0 and not place.exists()


def test_what_is_not_resumable_says_why(folder: Path) -> None:
    told = ("plan", "--model", folder, "--device", "cpu", "--vram", "1GiB", "--ram", "2MiB", *WORDS)
    planned = _call(*told, "--activations", "1MiB", "--json")
    found = json.loads(planned.stdout)
    assert found["kept"] is None
    assert any(n.startswith(RESTARTS) and UNMEASURED in n for n in found["notes"])


def test_arguments_by_name_and_type() -> None:
    pipe = ltx2()
    known = arguments_of(pipe)
    assert known["num_frames"].kinds >= {int} and known["prompt"].kinds >= {str}
    assert not {"latents", "generator", "output_type", "callback_on_step_end"} & set(known)
    found = parse(pipe, ["num_frames=9", "guidance_scale=3", "prompt=7", "sigmas=[1.0, 0.5]",
                         "use_cross_timestep=true"])  # fmt: skip
    assert found == {"num_frames": 9, "guidance_scale": 3.0, "prompt": "7", "sigmas": [1.0, 0.5],
                     "use_cross_timestep": True}  # fmt: skip
    assert type(found["guidance_scale"]) is float


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["num_frame=9"], "(?s)takes no num_frame.*Did you mean num_frames"),
        (["latents=1"], "takes no latents"),
        (["height=wide"], "(?s)height cannot be 'wide'.*a whole number.*text"),
        (["height=1.5"], "(?s)height cannot be '1.5'"),
        (["height"], "gives no value"),
        (["height=64", "height=32"], "given twice"),
    ],
)
def test_arguments_that_are_none(words: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse(ltx2(), words)


def test_what_must_be_said() -> None:
    class Strict:
        def __call__(self, prompt: str, steps: int = 3, **more: object) -> None: ...

    with pytest.raises(RequestError, match="wants prompt"):
        parse(Strict(), ["steps=4"])
    assert arguments_of(Strict())["prompt"] == Argument("prompt", frozenset({str}), False, NOT_SAID)


def test_flags_that_mean_nothing(folder: Path, tmp_path: Path) -> None:
    told = ("--model", folder, "--prompt", "a", "-o", tmp_path / "a.mp4")
    for flag in (("--sampler", "euler"), ("--branches", "2"), ("--lora", "a.safetensors")):
        refused = _call("generate", *told, *flag)
        assert refused.exit_code == 2 and f"{flag[0]} is not supported" in refused.output
    assert list(tmp_path.iterdir()) == []


def test_own_models_take_no_set(tmp_path: Path) -> None:
    refused = _call("plan", "--synthetic", "wan2.1-t2v-1.3b", "--set", "num_frames=9")
    assert (
        refused.exit_code == 2
        and "--set is only for pipelines that diffusers runs" in refused.output
    )


def test_pictures(tmp_path: Path) -> None:
    from PIL import Image

    from penstock.engine.attach.foreign_job import _write

    class Made:
        def __init__(self) -> None:
            self.images = torch.stack([torch.full((3, 4, 6), 0.2), torch.full((3, 4, 6), 1.5)])

    files, count = _write(Made(), object(), tmp_path / "a.png", Fraction(1), False)
    assert [file.name for file in files] == ["a.png", "a-2.png"] and count == 2
    with Image.open(files[0]) as first, Image.open(files[1]) as second:
        assert first.size == (6, 4)
        assert first.getpixel((0, 0)) == (51,) * 3 and second.getpixel((0, 0)) == (255,) * 3
    with pytest.raises(OutputError, match="the output exists"):
        _write(Made(), object(), tmp_path / "a.png", Fraction(1), False)
    told: list[bytes] = []
    _write(Made(), object(), tmp_path / "b.png", Fraction(1), False,
           lambda file: told.append(file.read_bytes()))  # fmt: skip
    assert told == [(tmp_path / "b.png").read_bytes()]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a-2.png", "b.png", "b-2.png"}
