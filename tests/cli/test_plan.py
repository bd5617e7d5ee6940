"""``penstock plan``, ``profiles`` and ``doctor`` from outside: fast, without torch, and legible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.cli.plan_view import clock, strip
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.machine import doctor
from penstock.engine.machine.calibrate import Effort
from penstock.profiles.plan import Plan, StreamPlan
from penstock.profiles.rates import stored_rates
from penstock.units import GIB

TRUE = ["plan", "--synthetic", "wan2.1-i2v-14b"]
CARD = ["--card", "RTX 3060 12GB"]


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "120")


def run(*words: str) -> str:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == 0, found.output
    return found.output


def refused(*words: str) -> str:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code != 0
    return found.output + found.stderr


def test_a_plan_for_a_machine_that_is_not_there_needs_no_torch() -> None:
    code = (
        "import sys; from penstock.cli.main import main; sys.argv = ['penstock', *sys.argv[1:]]\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    words = [sys.executable, "-c", code, *TRUE, *CARD, "--ram", "16GiB", "--disk", "nvme3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "plan for RTX 3060 12GB" in done.stdout


def test_the_table_names_phases_blocks_bottleneck_and_origins() -> None:
    shown = run(*TRUE, *CARD, "--profile", "12gb", "--ram", "16GiB")
    for word in ("text", "image", "encode", "context", "denoise", "decode", "mux", "compute"):
        assert word in shown
    assert "stay in RAM" in shown and "(profile 12gb)" in shown and "interpreter" in shown
    blocks = next(line for line in shown.splitlines() if line.startswith("blocks")).split()[1]
    assert len(blocks) == 40 and set(blocks) <= set("Vr.")


def test_the_plan_and_a_profile_name_what_attends() -> None:
    assert "self-attention by torch" in run(*TRUE, *CARD)
    shown = run(*TRUE, *CARD, "--attention", "int8")
    assert "self-attention in 8 bits, by comfy-kitchen" in shown
    rows = [line.split() for line in run("profiles", "show", "12gb").splitlines()]
    assert any("attention" in row and "sdpa" in row for row in rows)


def test_json_is_the_plan() -> None:
    shown = run(*TRUE, *CARD, "--size", "832x480", "--frames", "49", "--format", "nf4", "--json")
    plan = Plan.from_json(json.loads(shown))
    assert plan.weight_format == "nf4"
    assert plan.peak_vram_bytes <= plan.vram_limit_bytes < 12 * GIB
    assert {origin.name: origin.source for origin in plan.origins}["format"] == "flag"


@pytest.mark.parametrize(
    ("words", "count", "first", "last"),
    [
        ((), 40, 999, 113),
        (("--size", "832x480"), 40, 999, 71),
        (("--steps", "4", "--shift", "1"), 4, 999, 249),
        (("--sampler", "dpm++", "--steps", "10"), 10, 1000, 357),
        (("--distilled",), 4, 1000.0, 625.0),
    ],
)
def test_json_lists_the_timesteps(
    words: tuple[str, ...], count: int, first: float, last: float
) -> None:
    told = json.loads(run(*TRUE, *CARD, *words, "--json"))["timesteps"]
    assert (len(told), told[0], told[-1]) == (count, first, pytest.approx(last))


def test_a_refusal_names_what_fits() -> None:
    told = refused(*TRUE, *CARD, "--vram", "3GiB", "--format", "int8")
    assert "no plan fits the VRAM budget" in told
    assert "--profile 4gb" in told and "--frames" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan"], "a plan needs a model"),
        ([*TRUE, "--model", "."], "found both"),
        ([*TRUE, "--disk", "sata"], "--card as well"),
        (["plan", "--synthetic", "sora", *CARD], "wan2.1-i2v-14b"),
        ([*TRUE, *CARD, "--size", "832x480", "--max-area", "480p"], "--size or --max-area"),
        ([*TRUE, *CARD, "--frames", "80"], "81"),
        ([*TRUE, *CARD, "--format", "int3"], "int8"),
        ([*TRUE, *CARD, "--profile", "13gb"], "12gb"),
        (["profiles", "show", "13gb"], "12gb"),
    ],
)
def test_bad_usage_is_told(words: list[str], told: str) -> None:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert told in found.output + found.stderr


def test_a_folder_is_planned_by_its_headers(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    words = ["plan", "--model", str(model), "--device", "cpu", "--size", "64x64", "--frames", "5"]
    plan = Plan.from_json(json.loads(run(*words, "--ram", "200MiB", "--json")))
    assert plan.ram_limit_bytes == 200 << 20
    shown = run(*words)
    assert "plan for CPU" in shown


def test_profiles_are_listed_and_shown() -> None:
    listed = run("profiles")
    assert "12gb" in listed and "max" in listed
    shown = run("profiles", "show", "12gb")
    assert "11.00 GiB" in shown and "spare" in shown


def test_times_and_strips_for_people() -> None:
    assert [clock(s) for s in (0.44, 59.9, 125, 3723)] == ["0.4 s", "59.9 s", "2:05", "1:02:03"]
    assert strip(StreamPlan(6, 2, 2)) == ".Vr.Vr"


QUICK = Effort(tokens=64, copy_bytes=1 << 20, read_bytes=8 << 20, seconds=0.001)


def test_the_doctor_measures_keeps_and_advises(tmp_path: Path) -> None:
    found = doctor.examine("auto", tmp_path, QUICK)
    topics = {finding.topic: finding for finding in found.findings}
    assert topics["kernel attention (bf16)"].found == "works"
    assert topics["driver"].remedy is not None or torch.cuda.is_available()
    assert stored_rates(found.machine) == found.rates
    assert found.to_json()["stored_in"] == str(found.stored_in)
    assert min(found.rates.flops, found.rates.copy_bytes_per_s, found.rates.overhead_s) > 0


def test_spill_is_told_where_it_can_happen() -> None:
    cuda = torch.device("cuda")
    (windows,) = doctor._spill(cuda, "10", "win32")
    (wsl,) = doctor._spill(cuda, "5.15-microsoft-standard-WSL2", "linux")
    (linux,) = doctor._spill(cuda, "6.1", "linux")
    assert windows.remedy == wsl.remedy and "Sysmem" in str(windows.remedy)
    assert linux.remedy is None


def test_a_kernel_that_refuses_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise ValueError("no such operands on this device")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    found = {finding.topic: finding for finding in doctor._kernels(torch.device("cpu"))}
    assert found["kernel fp8 product"].found == "no: no such operands on this device"


def test_the_doctor_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Effort, "on", classmethod(lambda cls, device: QUICK))
    assert "rates are kept in" in run("doctor", "--device", "cpu")
    assert json.loads(run("doctor", "--device", "cpu", "--json"))["machine"] == "CPU"
