"""A video that goes on from another: frames, colours, settings, and one file."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.media.seam import Clip, Colours, joined
from penstock.engine.media.video import read_frames, read_metadata, write_video
from penstock.engine.request.settings import Settings, going_on, resolve
from penstock.errors import OutputError, RequestError, UsageError, VideoError
from tests.engine.running import a_request, an_engine, stop_after_a_step

SETTINGS = {"prompt": "a cat", "negative_prompt": "", "steps": 2, "seed": 5, "width": 48}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames of 48x32 at 12.5 frames a second, as penstock writes them."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    draw = np.random.default_rng(1)
    still = draw.integers(60, 180, (4, 6, 3)).repeat(8, 0).repeat(8, 1)
    frames = [(still + 4 * number).astype(np.uint8) for number in range(6)]
    write_video(path, frames, Fraction(25, 2), SETTINGS)
    return path


def test_a_clip_tells_its_last_frame_and_its_settings(clip: Path) -> None:
    found = Clip.open(clip)
    every = list(read_frames(clip))
    assert np.array_equal(found.last, every[-1]) and not np.array_equal(found.last, every[-2])
    assert (found.frames, found.fps, found.size, found.settings) == (6, 12.5, "48x32", SETTINGS)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_bytes(b"nothing of the kind")
    with pytest.raises(VideoError, match="could not be written or read"):
        Clip.open(tmp_path / "no.mp4")


def test_colours_are_turned_back() -> None:
    """By a channel's gain and offset: what the first frame shows is what it should be."""
    wanted = np.random.default_rng(2).integers(70, 180, (20, 30, 3)).astype(np.uint8)
    off = np.clip(wanted * np.array([0.9, 1.1, 1.0]) + np.array([12, -10, 3]), 0, 255)
    made = off.round().astype(np.uint8)
    turned = Colours.between(made, wanted)
    assert np.abs(turned(made).astype(int) - wanted).max() <= 1
    assert np.abs(made.astype(int) - wanted).max() >= 8
    flat = np.full((4, 4, 3), 9, np.uint8)  # no spread that could be divided by
    assert np.array_equal(Colours.between(flat, flat)(flat), flat)
    other = Colours.between(made, np.full_like(made, 30))
    assert (other.gain >= 0.8 - 1e-6).all()


def test_frames_are_joined_and_none_is_shown_twice(clip: Path) -> None:
    before = list(read_frames(clip))
    made = [np.clip(before[-1].astype(int) + 20 + n, 0, 255).astype(np.uint8) for n in range(4)]
    found = list(joined(clip, made))
    assert len(found) == 6 + 3
    assert all(np.array_equal(one, other) for one, other in zip(found, before, strict=False))
    assert np.abs(found[6].astype(int) - before[-1].astype(int) - 1).max() <= 1  # 20 are taken back
    with pytest.raises(VideoError, match="another size"):
        list(joined(clip, [np.zeros((16, 16, 3), np.uint8)]))


def test_the_first_frames_own_colours_turn_nothing(clip: Path) -> None:
    """It is decoded alone, and off by itself."""
    last = list(read_frames(clip))[-1]
    made = [np.clip(last.astype(int) + off, 0, 255).astype(np.uint8) for off in (30, 3, 4, 5)]
    found = list(joined(clip, made))[6:]
    assert [round(float((frame.astype(int) - last).mean())) for frame in found] == [0, 1, 2]
    assert len(list(joined(clip, made[:1]))) == 6


def test_settings_come_from_the_clip_and_flags_win(clip: Path) -> None:
    found = going_on(Settings(prompt="", steps=4, frames=9), Clip.open(clip), Path("last.png"))
    assert found == Settings(
        prompt="a cat", negative_prompt="", image=Path("last.png"), size="48x32", frames=9, steps=4,
        seed=5, fps=12.5, after=clip,
    )  # fmt: skip
    assert going_on(Settings(prompt="a dog"), Clip.open(clip), Path("x")).prompt == "a dog"
    with pytest.raises(UsageError, match="size is given"):
        going_on(Settings(prompt="", size="64x64"), Clip.open(clip), Path("x"))
    bare = replace(Clip.open(clip), settings={})
    with pytest.raises(UsageError, match="has no prompt stored in it"):
        going_on(Settings(prompt=""), bare, Path("x"))


@pytest.mark.parametrize(
    ("theirs", "cfg", "left"),
    [
        ({"guidance_scale": 1.0, "nag_scale": 11.0}, None, {"nag_scale": 11.0}),
        ({"guidance_scale": 1.0, "nag_scale": 11.0}, 1.0, {"nag_scale": 11.0}),
        ({"guidance_scale": 1.0, "nag_scale": 11.0}, "1,4", {}),
        ({"guidance_scale": 5.0, "cfg_interval": "0.3,1"}, 4.0, {"cfg_interval": "0.3,1"}),
        ({"guidance_scale": 5.0, "cfg_interval": "0.3,1"}, 1.0, {}),
        ({"guidance_scale": 3.0, "guidance_high": 4.0}, "2", {}),
    ],
)
def test_what_led_the_clip_leads_on_unless_a_scale_is_said_that_it_cannot_go_with(
    clip: Path, theirs: dict[str, object], cfg: float | str | None, left: dict[str, object]
) -> None:
    told = replace(Clip.open(clip), settings={"prompt": "a cat"} | theirs)
    found = going_on(Settings(prompt="", guidance_scale=cfg), told, Path("last.png"))
    names = ("nag_scale", "cfg_interval", "guidance_high")
    assert {name: getattr(found, name) for name in names if getattr(found, name)} == left


def test_a_clip_that_tells_of_no_shift_that_there_is_is_refused(
    i2v_folder: Path, clip: Path
) -> None:
    found = Clip.open(clip)
    with an_engine(i2v_folder) as engine:
        for shift in ("x", "", [], {}, "1,2", 10**400, float("nan"), True):
            told = replace(found, settings={"prompt": "a cat", "shift": shift})
            with pytest.raises(RequestError, match="shift"):
                resolve(going_on(Settings(prompt=""), told, Path("last.png")), engine.model)
    bare = replace(found, settings={"prompt": None})
    with pytest.raises(UsageError, match="has no prompt stored in it"):
        going_on(Settings(prompt=""), bare, Path("x"))


@pytest.mark.parametrize("before", [False, True])
def test_a_distilled_model_goes_on_with_its_own_settings(clip: Path, before: bool) -> None:
    theirs = {"prompt": "a cat", "steps": 8, "guidance_scale": 4.0, "guidance_high": 3.0}
    theirs |= {"shift": 3.0, "sampler": "unipc", "cfg_interval": "0.5,1", "seed": 3}
    found = replace(Clip.open(clip), settings=theirs | {"distilled": before})
    made = going_on(Settings(prompt="", distilled=True, shift=4.0), found, Path("last.png"))
    assert (made.seed, made.shift, made.distilled) == (3, 4.0, True)
    kept = made.steps, made.guidance_scale, made.guidance_high, made.sampler, made.cfg_interval
    assert kept == ((8, 4.0, 3.0, "unipc", "0.5,1") if before else (None,) * 5)


@pytest.mark.parametrize(
    ("said", "dropped"),
    [
        ({"seed": 0}, ()),
        ({"guidance_scale": 0.0}, ()),
        ({"window": 0}, ("overlap",)),
        ({"window": 17}, ("overlap",)),
        ({"window": 17, "overlap": 8}, ()),
        ({"negative_prompt": ""}, ()),
        ({"sampler": "euler"}, ()),
        ({"sampler": "unipc"}, ("distilled", "steps", "guidance_scale", "shift")),
        ({"sampler": "unipc", "steps": 9}, ("distilled", "guidance_scale", "shift")),
    ],
)
def test_what_is_said_wins_and_takes_away_what_cannot_stand_beside_it(
    clip: Path, said: dict[str, object], dropped: tuple[str, ...]
) -> None:
    theirs = {"prompt": "a cat", "negative_prompt": "bad", "steps": 4, "guidance_scale": 1.0}
    theirs |= {"shift": 5.0, "seed": 3, "sampler": "lcm", "distilled": True, "nag_scale": 11.0}
    theirs |= {"window": 33, "overlap": 12}
    found = replace(Clip.open(clip), settings=theirs)
    asked: Any = {"prompt": " "} | said
    made = vars(going_on(Settings(**asked), found, Path("last.png")))
    assert not any(made[name] for name in dropped)
    left = {name: value for name, value in theirs.items() if name not in {*said, *dropped}}
    assert {name: made[name] for name in (*left, *said)} == left | said


def test_the_result_is_one_file_also_after_a_stop(
    clip: Path, i2v_folder: Path, tmp_path: Path
) -> None:
    frame = tmp_path / "last.png"
    Image.fromarray(Clip.open(clip).last).save(frame)
    request = a_request(image=frame, steps=2, after=clip)
    with an_engine(i2v_folder) as engine:
        whole = engine.submit(request, tmp_path / "whole.mp4").result()
        with pytest.raises(OutputError, match="own inputs"):
            engine.submit(request, clip, force=True)
        stop_after_a_step(engine, request, tmp_path / "job")
        resumed = engine.resume(tmp_path / "job", tmp_path / "resumed.mp4").result()
    assert torch.equal(whole.video, resumed.video)
    made = list(read_frames(tmp_path / "whole.mp4"))
    assert len(made) == 6 + 4
    assert all(
        np.array_equal(one, other)
        for one, other in zip(made, read_frames(tmp_path / "resumed.mp4"), strict=True)
    )
    assert whole.report.frames == 10
    mux = next(phase for phase in whole.report.phases if phase.name == "mux")
    assert mux.measured_ram_bytes <= mux.predicted_ram_bytes


def test_from_the_command_line(clip: Path, i2v_folder: Path, tmp_path: Path) -> None:
    words = ["generate", "--model", i2v_folder, "--continue", clip, "-o", tmp_path / "long.mp4",
             "--frames", 5, "--device", "cpu", "--vram", "200MiB", "--ram", "200MiB", "--job",
             tmp_path / "job", "--json"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])["report"]
    assert (report["frames"], report["seed"], report["fps"]) == (10, 5, 12.5)
    assert len(list(read_frames(tmp_path / "long.mp4"))) == 10
    assert read_metadata(tmp_path / "long.mp4")["prompt"] == "a cat"
    words = ["generate", "--model", i2v_folder, "--device", "cpu", "-o", tmp_path / "x.mp4"]
    bare = CliRunner().invoke(app, [str(word) for word in words])
    assert bare.exit_code == 2 and "the prompt is empty" in bare.stderr
