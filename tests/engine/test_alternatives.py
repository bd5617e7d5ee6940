"""What a plan names as faster: each planned by the same door, and what it costs as measured."""

import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.cli.plan_view import clock
from penstock.engine import alternatives as module
from penstock.engine.alternatives import FRAMES_PSNR, HALF_PSNR, MOST, WORTH_A_WORD, alternatives
from penstock.engine.prepared import Prepared, machine_of
from penstock.engine.request.generation import workload_of
from penstock.engine.request.settings import Settings, resolve
from penstock.profiles.options import Options

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS, CACHES = (
    MEASURED / "quality_mini_2core_cpu.json",
    MEASURED / "caches_mini_48_2core_cpu.json",
)
PARTS = MEASURED / "cache_parts_2core_cpu.json"
SETTINGS = Settings(prompt="a cat")


@cache
def prepared(
    card: str = "RTX 3060 12GB",
    disk: str | None = None,
    model: str = "wan2.1-i2v-14b",
    **named: str,
) -> Prepared:
    options, machine = machine_of(Options(**{"ram": "32GiB", **named}), card, disk)
    return Prepared.open(synthetic=model, options=options, machine=machine)


def seconds(opened: Prepared, settings: Settings = SETTINGS) -> float:
    return opened.plan(workload_of(resolve(settings, opened.about), saved=True)).seconds


@cache
def found(opened: Prepared, settings: Settings = SETTINGS) -> dict[str, module.Alternative]:
    plan = opened.plan(workload_of(resolve(settings, opened.about), saved=True))
    return {each.flags: each for each in alternatives(opened, settings, plan)}


def test_each_is_planned_as_its_flags_would_be() -> None:
    named = found(prepared())
    assert list(named) == [
        "--distilled --lora 4STEP.safetensors",
        "--max-area 480p",
        "--attention int8",
        "--cache plan:20",
        "--format int8 --compute fast",
    ]
    distilled, small, attention, cached, fast = (each.seconds for each in named.values())
    assert distilled == seconds(prepared(), Settings(prompt="a cat", distilled=True))
    assert small == seconds(prepared(), Settings(prompt="a cat", max_area="480p"))
    assert attention == seconds(prepared(attention="int8"))
    assert fast == seconds(prepared(format="int8", compute="fast"))
    assert cached == seconds(prepared(step_cache="plan:20"))
    assert distilled < small < attention < cached < fast
    whole = seconds(prepared())
    assert {each.of_seconds for each in named.values()} == {whole}
    assert fast <= WORTH_A_WORD * whole


def test_what_is_said_already_is_no_alternative() -> None:
    few = Settings(prompt="a cat", max_area="480p", distilled=True)
    named = found(prepared(attention="int8", format="int8", compute="fast"), few)
    assert named == {}


def test_a_ceiling_that_costs_time_is_named() -> None:
    tight = prepared("RTX 4090", "hdd", vram="6GiB", ram="16GiB", step_cache="off")
    named = found(tight, Settings(prompt="a cat", max_area="480p"))
    assert named["without --vram"].seconds < WORTH_A_WORD * named["without --vram"].of_seconds
    assert "same arithmetic" in named["without --vram"].quality


def test_what_does_not_fit_or_gains_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--format int8" not in found(prepared())  # computing bounds: it would gain nothing
    assert len(found(prepared())) <= MOST
    monkeypatch.setattr(module, "MOST", 1)
    assert list(found.__wrapped__(prepared())) == ["--distilled --lora 4STEP.safetensors"]


def test_quality_is_what_was_measured() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    measured = {(row["format"], row["compute"].split()[0]): row["frames_psnr"] for row in rows}
    for way, decibels in FRAMES_PSNR.items():
        assert decibels == pytest.approx(measured[way], abs=0.06)
    rows = json.loads(CACHES.read_text(encoding="utf-8"))["rows"]
    halves = {
        (row["method"], row["steps"]): row["frames_db"]
        for row in rows
        if row["setting"] in (f"{row['steps'] // 2} from 8 runs", "0.85, 1.0")
    }
    rows = json.loads(PARTS.read_text(encoding="utf-8"))["rows"]
    for steps in (40, 20):
        alike = [row for row in rows if (row["steps"], row["forwards"]) == (steps, steps // 2)]
        worse = min(row["by_loss_db"][0] for row in alike)
        halves["plan of two transformers", steps] = worse
    assert halves == pytest.approx(dict(HALF_PSNR), abs=0.06)


def test_quality_of_a_plan_is_of_as_many_transformers() -> None:
    opened = prepared(model="wan2.2-i2v-a14b")
    assert "; 78 dB of 40 full steps" in found(opened)["--cache plan:20"].quality


@pytest.mark.parametrize(
    ("steps", "told"), [(40, "dB of 40 full"), (30, "dB of 20 full"), (12, "quality not measured")]
)
def test_quality_is_of_no_more_steps_than_the_job_has(steps: int, told: str) -> None:
    quality = found(prepared(), Settings(prompt="a cat", steps=steps))[f"--cache plan:{steps // 2}"]
    assert told in quality.quality


def test_what_was_said_and_does_not_go_with_it_is_named() -> None:
    said = Settings(prompt="a cat", size="1280x720", steps=30, guidance_scale=6.0)
    named = found(prepared(), said)
    distilled = named["--distilled --lora 4STEP.safetensors"].quality
    assert "; leave out --steps, --cfg;" in distilled
    assert named["--max-area 480p"].quality == "0.43 of the pixels; leave out --size"


def test_the_command_prints_them_and_generate_names_the_best(
    i2v_folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = ("--card", "RTX 3060 12GB", "--ram", "32GiB")
    plan = ["plan", "--synthetic", "wan2.1-i2v-14b", *machine]
    told = CliRunner().invoke(app, [*plan, "--json"])
    value = json.loads(told.stdout)
    shown = CliRunner().invoke(app, plan).stdout
    assert len(value["alternatives"]) == 5
    for each in value["alternatives"]:
        assert each["flags"] in shown
        assert clock(each["seconds"]) in shown

    job = [
        "generate", "--model", str(i2v_folder), "--image", str(picture), "--prompt", "x",
        "--size", "64x64", "--frames", "5", "--steps", "6", "-o", str(tmp_path / "x.mp4"),
        "--job", str(tmp_path / "job"),
    ]  # fmt: skip
    monkeypatch.setattr(module, "LONG_S", 0.0)
    done = CliRunner().invoke(app, job)
    assert done.exit_code == 0, done.output
    assert "--distilled --lora 4STEP.safetensors: " in done.stderr
    monkeypatch.setattr(module, "LONG_S", 1e9)
    done = CliRunner().invoke(app, [*job, "--force", "--no-resume", "--job", str(tmp_path / "2")])
    assert done.exit_code == 0, done.output
    assert "--distilled" not in done.stderr


def test_guidance_in_half_of_the_steps_is_named_where_there_is_room() -> None:
    opened = prepared(attention="int8", format="int8", compute="fast", step_cache="plan:20")
    named = found(opened, Settings(prompt="a cat", max_area="480p"))
    (flags,) = (each for each in named if each.startswith("--cfg-interval"))
    interval = flags.split()[1]
    asked = Settings(prompt="a cat", max_area="480p", cfg_interval=interval)
    assert named[flags].seconds == seconds(opened, asked)
    assert found(opened, asked).keys() == named.keys() - {flags}
