"""Numbers of any kind where a size, a count or a rate is meant: an error of ours, in one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.bench.order import BenchOrder
from penstock.engine.bench.result import Thresholds
from penstock.engine.lora.file import Lora
from penstock.engine.request.demo import MINI
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.steering import Hooks
from penstock.errors import PenstockError, UsageError, brief
from penstock.profiles.cards import disk_bytes_per_s
from penstock.profiles.options import Options
from penstock.profiles.profile import parse
from penstock.units import MOST_BYTES, parse_bytes

HUGE = 10**400
LONGER = 10**5000
"""More digits than Python turns into text."""

ODD: tuple[Any, ...] = (
    True, False, math.nan, math.inf, -math.inf, 1.5, -1, 0, HUGE, -HUGE, LONGER, -LONGER, "", "x",
    "1e3", "-1GiB", "nan", "inf", "9" * 400, "9" * 5000, "9" * 400 + "GiB", b"1", None,
    [], {}, (1,),
    object(), 1j,
)  # fmt: skip

REQUEST = GenerationRequest(prompt="a", width=64, height=64, frames=5, steps=2, seed=1)

PLACES: dict[str, Callable[[Any], object]] = {
    "bytes": parse_bytes,
    "vram": lambda v: Options(vram=v) if v is not None else parse_bytes(v),
    "ram": lambda v: Options(ram=v) if v is not None else parse_bytes(v),
    "branches": lambda v: Options(branches=v) if v is not None else parse_bytes(v),
    "tiles": lambda v: Options(tiles=v) if v is not None else parse_bytes(v),
    "preview": lambda v: Hooks(None, v) if v is not None else parse_bytes(v),
    "strength": lambda v: Lora(Path("x"), v),
    "width": lambda v: replace(REQUEST, width=v),
    "frames": lambda v: replace(REQUEST, frames=v),
    "steps": lambda v: replace(REQUEST, steps=v),
    "fps": lambda v: replace(REQUEST, fps=v),
    "guidance": lambda v: replace(REQUEST, guidance_scale=v),
    "shift": lambda v: replace(REQUEST, shift=v) if v is not None else parse_bytes(v),
    "seed": lambda v: replace(REQUEST, seed=v) if v is not None else parse_bytes(v),
    "sampler": lambda v: replace(REQUEST, sampler=v),
    "prompt": lambda v: replace(REQUEST, prompt=v),
}

LEGAL = {
    "strength": (1.5, -1, 0), "preview": (HUGE, LONGER),
    "guidance": (1.5, 0), "shift": (1.5,), "seed": (0,), "fps": (1.5,),
    "prompt": ("x", "1e3", "-1GiB", "nan", "inf", "9" * 400, "9" * 5000, "9" * 400 + "GiB"),
}  # fmt: skip
"""Of the odd ones, what is meant there."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", ODD, ids=lambda value: brief(value)[:20])
def test_an_odd_value_is_an_error_of_ours(place: str, value: Any) -> None:
    legal = LEGAL.get(place, ())
    if any(type(each) is type(value) and each == value for each in legal):
        PLACES[place](value)
        return
    with pytest.raises(UsageError) as caught:
        PLACES[place](value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_sizes_up_to_what_can_exist() -> None:
    assert parse_bytes(MOST_BYTES) == MOST_BYTES
    assert parse_bytes("7EiB".replace("E", "T")) == 7 << 40
    for text in ("9000000TiB", "9" * 30):
        with pytest.raises(UsageError, match="size out of range"):
            parse_bytes(text)


@pytest.mark.parametrize(
    "text",
    ["vram = true", "vram = nan", "ram = -1", f"vram = {HUGE}", f"ram = {'9' * 5000}",
     "pinned_share = true", "pinned_share = nan", "pinned_share = inf", f"branches = {'9' * 5000}",
     "chunk_tokens = nan", "tiles = 3", "formats = [1]", "formats = true", "branches = true"],
)  # fmt: skip
def test_odd_values_in_a_profile(text: str) -> None:
    with pytest.raises(PenstockError) as caught:
        parse("own", text, Path("own.toml"))
    assert caught.value.exit_code == 2


def test_disks_and_benchmarks_of_odd_rates() -> None:
    for rate in ("0GB/s", "9" * 400 + "GB/s", "nanGB/s", "1e9GB/s", "-1GB/s"):
        with pytest.raises(UsageError):
            disk_bytes_per_s(rate)
    for minutes in (math.nan, math.inf, 0, -1):
        with pytest.raises(UsageError):
            BenchOrder(model="x", minutes=minutes)
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(UsageError):
            Thresholds(percent=value)


@pytest.mark.parametrize(
    "words",
    [["--frames", "9" * 400], ["--frames", "9" * 5000], ["--steps", "9" * 400],
     ["--size", f"{'9' * 400}x64"], ["--size", f"{'9' * 5000}x64"], ["--cfg", "nan"],
     ["--cfg", "9" * 400], ["--max-area", f"{'9' * 5000}x1"], ["--vram", "9" * 400],
     ["--vram", "nan"], ["--ram", "9" * 400 + "GiB"], ["--ram", "True"],
     ["--lora", "x:" + "9" * 400],
     ["--branches", "9" * 5000], ["--tiles", f"{'9' * 5000}x1"], ["--chunk-tokens", "9" * 5000],
     ["--card", "9" * 5000], ["--card", "RTX 3060", "--disk", "0GB/s"],
     ["--card", "RTX 3060", "--disk", "9" * 400 + "GB/s"]],
    ids=lambda words: " ".join(words)[:30],
)  # fmt: skip
def test_odd_numbers_on_the_command_line(words: list[str]) -> None:
    size = [] if {"--size", "--max-area"} & set(words) else ["--size", "64x64"]
    run = CliRunner().invoke(app, ["plan", "--model", str(MINI), *size, *words])
    assert run.exit_code == 2, run.exc_info
    assert "Traceback" not in run.output
    assert isinstance(run.exception, SystemExit)
