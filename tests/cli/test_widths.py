"""Every view fits its terminal: at 60, 80 and 120 columns no line is longer and no word broken."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

from penstock.cli.first import first_steps
from penstock.cli.foreign import plan_text
from penstock.cli.layout import Column, fitted, gauge, labelled, table, wrap
from penstock.cli.listed import jobs_table, packs_table
from penstock.cli.main import app
from penstock.cli.plan_view import (
    findings_view,
    plan_view,
    profile_view,
    profiles_view,
    refusal_view,
    spoken,
)
from penstock.cli.terminal import ENDLESS, Screen, warn
from penstock.engine.alternatives import Alternative
from penstock.engine.attach.foreign_plan import RESTARTS, CallPlan, NetworkPlan
from penstock.engine.packs.cache import CachedPack
from penstock.engine.prepared import Prepared, machine_of
from penstock.engine.request.generation import workload_of
from penstock.engine.request.settings import Settings, resolve
from penstock.engine.run.jobs import JobInfo
from penstock.errors import OverBudget
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from penstock.profiles.profile import load, names
from penstock.units import GIB
from tests.cli.widths import WIDTHS, hold

FASTER = (
    Alternative("--distilled --lora 4STEP.safetensors", 2042.0, 38447.0, "4 steps; not measured"),
    Alternative("--max-area 480p", 9608.0, 38447.0, "0.43 of the pixels"),
)
OF_A_FAMILY = ("CFG", "classifier-free", "cross-attention", "AdaLN")


@cache
def planned(name: str, frames: int | None = None, **more: str) -> Plan:
    options, machine = machine_of(Options(ram="32GiB", **more), "RTX 3060 12GB", None)
    prepared = Prepared.open(synthetic=name, options=options, machine=machine)
    settings = Settings(prompt="a cat", frames=frames)
    return prepared.plan(workload_of(resolve(settings, prepared.about), saved=True))


PLANS = {
    "wan2.1": ("wan2.1-i2v-14b", None, {}),
    "wan2.2, two transformers in windows": ("wan2.2-i2v-a14b", 161, {"step_cache": "plan:20"}),
    "minimax-h3": ("minimax-h3", None, {"step_cache": "budget"}),
}


@pytest.mark.parametrize(
    ("name", "word", "steps", "told"),
    [
        ("wan2.1-t2v-14b", "plan:20", 40, "20 steps are computed"),
        ("wan2.1-t2v-14b", "plan:50", 40, "it gains nothing, all 40 steps are computed"),
        ("wan2.1-t2v-14b", "plan:4", 7, "7 steps are computed, as fewer than 8 in a row all are"),
        ("wan2.1-t2v-14b", "budget", 7, "it gains nothing, all 7 steps are computed"),
        ("wan2.2-t2v-a14b", "plan:2", 40, "4 steps are computed, as fewer than 8 in a row all are"),
    ],
)
def test_a_cache_that_computes_otherwise_than_asked_says_why(
    name: str, word: str, steps: int, told: str
) -> None:
    options, machine = machine_of(Options(ram="32GiB", step_cache=word), "RTX 3060 12GB", None)
    prepared = Prepared.open(synthetic=name, options=options, machine=machine)
    settings = Settings(prompt="a cat", steps=steps, max_area="480p")
    plan = prepared.plan(workload_of(resolve(settings, prepared.about)))
    shown = plan_view(plan, 120, None).splitlines()
    (line,) = (line for line in shown if line.startswith("cache"))
    assert line.startswith(f"cache    {word}: {told}")


def test_a_label_and_its_text_are_two_words() -> None:
    assert labelled("denoise", "32 tokens", 80) == ["denoise  32 tokens"]
    assert labelled("denoise 2", "32 tokens", 80) == ["denoise 2 32 tokens"]


@pytest.mark.parametrize("which", PLANS)
def test_a_plan_fits_and_leads_with_its_answer(which: str) -> None:
    name, frames, more = PLANS[which]
    plan = planned(name, frames, **more)
    hold(lambda width: plan_view(plan, width, None, FASTER))
    lines = plan_view(plan, 80, None, FASTER).splitlines()
    assert lines[0] == f"plan for RTX 3060 12GB: it fits, and takes about {spoken(plan.seconds)}"
    for line, label in zip(lines[1:], ("VRAM", "RAM", "process"), strict=False):
        assert line.startswith(label) and "GiB" in line
    headings = ("phase  ", "faster here", "how it runs", "where each value is from")
    places = [next(n for n, line in enumerate(lines) if line.startswith(h)) for h in headings]
    assert places == sorted(places)


def test_a_plan_says_what_its_model_has_and_nothing_else() -> None:
    """The words are the family's: a view that assumed guidance told it of models without it."""
    wan, h3 = (plan_view(planned(*PLANS[which][:2]), 120) for which in ("wan2.1", "minimax-h3"))
    assert [word for word in OF_A_FAMILY if word in wan] == ["classifier-free", "cross-attention"]
    assert [word for word in OF_A_FAMILY if word in h3] == ["AdaLN"]
    assert "whole frames, no tiles" in wan and "makers' 196 overlapping tiles" in h3
    tiled = planned("wan2.1-i2v-14b", None, tiles="3x2")
    assert "exact tiles, 3 rows by 2 columns" in plan_view(tiled, 120)


def test_the_words_of_a_plan_are_kept_with_it() -> None:
    plan = planned("wan2.1-i2v-14b")
    assert Plan.from_json(plan.to_json()) == plan and plan["denoise"].facts
    older = plan.to_json()
    for phase in older["phases"]:
        del phase["facts"]
    read = Plan.from_json(older)
    assert read["denoise"].facts == () and "how it runs" in plan_view(read, 80)


def test_two_transformers_whose_blocks_live_alike_are_drawn_once() -> None:
    plan = planned("wan2.2-i2v-a14b", 161, step_cache="plan:20")
    first, second = plan.denoising
    assert first.stream is not None and plan_view(plan, 120).count("stay in VRAM") == 1
    assert len(plan_view(plan, 120).split("how it runs")[1].split("blocks")[1].split()[0]) == 40
    other = replace(second, stream=replace(first.stream, host_resident=1))
    assert plan_view(plan.with_phases((other,)), 120).count("stay in VRAM") == 2


def test_a_refusal_says_what_is_lacking_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OverBudget) as refused:
        planned("wan2.1-i2v-14b", None, vram="2GiB")
    hold(lambda width: refusal_view(refused.value, "RTX 3060 12GB", width))
    monkeypatch.setenv("COLUMNS", "80")
    words = ["plan", "--synthetic", "wan2.1-i2v-14b", "--card", "RTX 3060 12GB", "--vram", "2GiB"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 1 and run.stdout == ""
    lines = run.stderr.splitlines()
    assert lines[0] == "plan for RTX 3060 12GB: no plan fits the VRAM budget"
    assert any(line.startswith("denoise: self-attention K/V") for line in lines)
    assert max(map(cell_len, lines)) <= 80 and "--profile 4gb" in run.stderr
    plain = CliRunner().invoke(app, [*words, "--json"])
    assert plain.stderr.startswith("error: no plan fits") and plain.stderr.count("\n") == 1


def test_a_plan_of_a_foreign_pipeline_fits() -> None:
    network = NetworkPlan("text_encoder", 9 * GIB, 24, GIB, GIB // 4, GIB // 2, 1, 12.5)
    other = NetworkPlan("transformer", 26 * GIB, 0, 26 * GIB, 0, 2 * GIB, 50)
    plan = CallPlan("LTX2Pipeline", (network, other), 28 * GIB, GIB, 80 * GIB, 8 * GIB,
                    (RESTARTS,), 7512.0)  # fmt: skip
    hold(lambda width: plan_text(plan, width))
    first = plan_text(plan, 80).splitlines()[0]
    assert first == "plan for LTX2Pipeline: it fits; about 2 h 5 min"


def test_tables_fit(tmp_path: Path) -> None:
    jobs = [JobInfo(f"20261129-19154{n}-94a41e", tmp_path, "stopped", n, 40, 0.0, 1 << n)
            for n in range(3)]  # fmt: skip
    hold(lambda width: jobs_table(jobs, width))
    packs = [
        CachedPack("wan2.1-i2v-14b-int8-8fb298c4c2b6b360", tmp_path, 1 << 34, "/models/wan", True),
        CachedPack("wan2.1-i2v-14b-nf4-8fb298c4c2b6b361", tmp_path, 1 << 33, "", False),
    ]
    hold(lambda width: packs_table(packs, width))
    hold(profiles_view)
    for name in names():
        hold(lambda width, name=name: profile_view(load(name), width), (80, 120))
    findings = [
        ("software", "python 3.11.7, penstock, torch 2.13.0+cpu, diffusers, transformers", None),
        ("kernel convolution (bf16)", "works", None),
        ("attention (int8)", "no: it needs a CUDA device",
         "Plans do without it unless asked: --attention sdpa, the default, is torch's own."),
    ]  # fmt: skip
    hold(lambda width: findings_view("CPU", findings, width))
    hold(first_steps)


@pytest.mark.parametrize("width", WIDTHS)
def test_inspect_fits_and_its_command_can_be_copied(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2] / "penstock")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = CliRunner().invoke(app, ["inspect", "assets/mini"]).stdout.splitlines()
    assert lines and all(cell_len(line) <= width or " " not in line.strip() for line in lines)
    command = fitted("  use it: penstock generate --transformer A.safetensors --vae B", 44)
    assert command == [
        "  use it: penstock generate --transformer \\",
        "      A.safetensors --vae B",
    ]
    quoted = "use it: penstock generate --model '/a b/c'"
    assert fitted(quoted, 20) == [quoted]


def test_what_to_do_first_is_shown_where_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = CliRunner().invoke(app, [])
    assert run.exit_code == 2
    places = [run.stdout.index(f"penstock {each}") for each in
              ("demo", "doctor", "plan", "generate", "serve", "resume", "--help")]  # fmt: skip
    assert places == sorted(places) and len(run.stdout.splitlines()) <= 24


def test_an_error_on_a_terminal_is_wrapped_and_one_line_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "error: " + "a word of it " * 12
    warn(text)
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    warn(text)
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 60


def test_lists_go_whole_to_files_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert Screen().row_width == ENDLESS
    monkeypatch.setenv("COLUMNS", "60")
    assert Screen().row_width == 60


def test_wrapping_counts_cells_and_breaks_between_words() -> None:
    assert wrap("猫が走る 空を飛ぶ 夢を見た", 20) == ["猫が走る 空を飛ぶ", "夢を見た"]
    assert wrap("  in, " + "x" * 30, 20) == ["  in,", "x" * 30]
    assert wrap("one\n two", 40, "> ", "  ") == ["> one", "   two"]
    assert [gauge(share, 4) for share in (-1, 0, 0.99, 1, 2)] == [
        "[....]", "[....]", "[###.]", "[####]", "[####]"
    ]  # fmt: skip


def test_a_table_wraps_its_widest_column_and_becomes_paragraphs_at_last() -> None:
    columns = (Column("name", whole=True), Column("size", right=True), Column("what"))
    rows = [("a-b c", "1 B", "some more words here")]
    assert table(columns, rows, 24) == [
        "name   size  what", "a-b c   1 B  some more", "             words here"
    ]  # fmt: skip
    assert table(columns, [("a" * 19, "1 B", "word")], 20) == [
        "a" * 19, "  size: 1 B", "  what: word"
    ]  # fmt: skip


def test_a_refusal_in_one_line_names_the_need_in_gib() -> None:
    with pytest.raises(OverBudget, match=r"at least [\d,]+ bytes \(3\.\d\d GiB\)"):
        planned("wan2.1-i2v-14b", None, vram="2GiB")


def test_guidance_in_an_interval_is_counted_in_steps() -> None:
    options, machine = machine_of(Options(ram="32GiB"), "RTX 3060 12GB", None)
    prepared = Prepared.open(synthetic="wan2.1-i2v-14b", options=options, machine=machine)
    settings = Settings(prompt="a cat", cfg_interval="0.3,0.9")
    plan = prepared.plan(workload_of(resolve(settings, prepared.about), saved=True))
    (told,) = (each for each in plan["denoise"].facts if "guidance" in each)
    assert told == "classifier-free guidance in 22 of 40 steps (two forward passes)"


def test_every_help_page_fits_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for name in ("", *group.commands):
        shown = CliRunner().invoke(app, [*([name] if name else []), "--help"]).stdout
        assert "Usage" in shown and "…" not in shown
        assert max(map(cell_len, shown.splitlines())) <= 80, name
    assert "Model files" in CliRunner().invoke(app, ["generate", "--help"]).stdout
