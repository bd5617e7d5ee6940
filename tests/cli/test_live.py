"""The live view of a job: its lines fit, it follows the events, and it is off where nobody is."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner, Result

from penstock.cli.live import LiveView, picture, shows_pictures
from penstock.cli.main import app
from penstock.cli.progress import Display, plan_summary
from penstock.engine.run.events import PhaseEnded, PhaseStarted, Progress
from penstock.engine.run.preview import Preview
from penstock.engine.run.report import PhaseReport
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan
from penstock.units import GIB
from tests.cli.widths import WIDTHS

DENOISE = PhasePlan(
    "denoise", (("w", 9 * GIB),), (), (("w", 20 * GIB),), stream=StreamPlan(40, 2, 30, 2, 1),
    chunk_tokens=4096, forwards=(40, 40), read_bytes=80 * GIB, copied_bytes=800 * GIB,
    seconds=4000.0, facts=("4,096 tokens a chunk",),
)  # fmt: skip
PLAN = Plan(
    (PhasePlan("text", (("w", GIB),), (), (), seconds=3.0), DENOISE,
     PhasePlan("decode", (("w", GIB),), (), (), seconds=100.0)),
    12 * GIB, 28 * GIB, machine="a card",
)  # fmt: skip
PREVIEW = Preview(4, 4, bytes([*[255, 0, 0] * 8, *[0, 0, 255] * 8]))


def terminal(width: int = 80, height: int = 40, **how: object) -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), force_terminal=True, width=width,
                   height=height, **{"color_system": "truecolor", **how})  # type: ignore[arg-type]  # fmt: skip


def step(number: int, preview: Preview | None = None) -> Progress:
    return Progress("denoise", number, 40, "step", 100.0, 100.0 * (40 - number), 11 * GIB,
                    14 * GIB, 0.0, preview)  # fmt: skip


def ended(name: str) -> PhaseEnded:
    return PhaseEnded(PhaseReport(name, 2.5, 1, "layer", GIB, GIB, GIB, GIB, 0, 0, 0.0))


def told(view: LiveView, width: int = 80, height: int = 40) -> dict[str, str]:
    lines = view.lines(width, height)
    return {line.split()[0]: line for line in lines if line and not line.startswith(" ")}


def test_phases_are_done_now_and_to_come() -> None:
    view = LiveView(terminal(), PLAN)
    assert told(view)["text"].split(None, 1)[1] == "to come: 3.0 s"
    view.show(PhaseStarted("text", 24, "layer"))
    assert "24 layers" in told(view)["text"] and "VRAM" not in told(view)
    view.show(ended("text"))
    view.show(PhaseStarted("denoise", 40, "step"))
    view.show(step(10))
    shown = told(view)
    assert "done in 2.5 s, peak VRAM 1.00 GiB" in shown["text"]
    assert "[#####...............] 10/40 steps, 100.00 s each, 50:00 left" in shown["denoise"]
    assert shown["decode"].endswith("to come: 1:40")
    assert shown["job"].endswith("about 51:40 left")
    assert "[##################..] 11.00 GiB of 12.00 GiB" in shown["VRAM"]
    assert "[##########..........] 14.00 GiB of 28.00 GiB" in shown["RAM"]
    moving = " ".join(" ".join(view.lines(80, 40)).split())
    assert "2 of 40 blocks stay in VRAM, 30 come from RAM, 8 from disk" in moving
    assert "about 20.00 GiB to the card and 2.00 GiB read a step" in moving


def test_a_resumed_job_keeps_what_was_done_and_an_unplanned_phase_has_its_place() -> None:
    view = LiveView(terminal(), PLAN)
    view.show(PhaseStarted("pack", 10, "block"))
    view.show(ended("pack"))
    view.show(PhaseStarted("denoise", 40, "step"))
    shown = told(view)
    assert list(shown)[:4] == ["pack", "text", "denoise", "decode"]
    assert shown["text"].endswith("kept from before")


def test_the_view_fits_every_terminal() -> None:
    view = LiveView(terminal(), PLAN)
    view.show(PhaseStarted("text", 24, "layer"))
    view.show(ended("text"))
    view.show(PhaseStarted("denoise", 40, "step"))
    view.show(step(10))
    whole = set(" ".join(view.lines(1000, 100)).split())
    for width in WIDTHS:
        lines = view.lines(width, 40)
        assert max(map(cell_len, lines)) <= width
        assert set(" ".join(lines).split()) <= whole
    low = view.lines(80, 10)
    assert len(low) <= 10 and any(line.startswith("denoise") for line in low)


def test_a_preview_is_two_pixels_a_cell_and_only_where_it_can_be_seen() -> None:
    drawn = picture(PREVIEW, 80, 10)
    assert drawn.plain.split("\n") == ["\N{UPPER HALF BLOCK}" * 4] * 2
    upper, lower = (drawn.spans[n].style for n in (0, 4))
    assert "#ff0000 on #ff0000" in str(upper) and "#0000ff on #0000ff" in str(lower)
    assert picture(PREVIEW, 80, 1).plain.count("\n") == 0
    assert shows_pictures(terminal())
    assert not shows_pictures(terminal(color_system="standard"))
    assert not shows_pictures(terminal(no_color=True))
    assert not shows_pictures(Console(file=io.StringIO()))


def test_it_is_drawn_and_the_preview_goes_at_the_end() -> None:
    console = terminal()
    with Display(console, PLAN) as display:
        display.show(PhaseStarted("denoise", 40, "step"))
        display.show(step(1, PREVIEW))
    console.file.flush()
    shown = console.file.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "1/40 steps" in shown.rsplit("denoise", 1)[1]
    assert "\N{UPPER HALF BLOCK}" not in shown.rsplit("denoise", 1)[1]


def test_quiet_shows_notes_only() -> None:
    console = terminal()
    with Display(console, PLAN, quiet=True) as display:
        display.show(PhaseStarted("denoise", 40, "step"))
        display.show(step(1))
    console.file.flush()
    assert console.file.buffer.getvalue() == b""  # type: ignore[attr-defined]
    assert "denoise: 40 blocks: 2 stay in VRAM, 30 in RAM, 8 stream from disk; 4,096" in (
        plan_summary(PLAN)
    )


def demo(folder: Path, *words: str, **environment: str) -> Result:
    run = CliRunner().invoke(app, ["demo", "-o", str(folder / "demo.mp4"), "--force", *words],
                             env={"COLUMNS": "80", **environment})  # fmt: skip
    assert run.exit_code == 0, run.output
    return run


def test_a_terminal_sees_the_view_with_a_preview_and_quiet_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = demo(tmp_path, FORCE_COLOR="1", COLORTERM="truecolor", TERM="xterm-256color", LINES="50")
    assert "\N{UPPER HALF BLOCK}" in seen.stderr and "done in" in seen.stderr
    silent = demo(tmp_path, "--quiet", "--json")
    assert silent.stderr == "" and silent.stdout.startswith("{")
