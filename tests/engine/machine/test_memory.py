"""What a process takes of the machine's memory, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.machine.memory import (
    ProcessMemory,
    keep_overhead,
    known_overhead,
    overhead_told,
    resident_bytes,
)
from penstock.engine.request.demo import MINI
from tests.engine.running import a_request, an_engine

MIB = 1 << 20


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_the_peak_is_that_of_the_system(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/status", "Name:\tpenstock\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n")
    assert ProcessMemory.peak(tmp_path) == ProcessMemory(2 * MIB, None)
    write(tmp_path, "proc/self/cgroup", "0::/job\n")
    write(tmp_path, "sys/fs/cgroup/job/memory.peak", "7000\n")
    assert ProcessMemory.peak(tmp_path).group_bytes == 7000
    (tmp_path / "sys/fs/cgroup/job/memory.peak").unlink()
    write(tmp_path, "sys/fs/cgroup/job/memory.max_usage_in_bytes", "8000\n")
    assert ProcessMemory.peak(tmp_path).group_bytes == 8000
    here = ProcessMemory.peak()
    assert here.resident_bytes >= resident_bytes() * 0.9 > 10 * MIB
    assert ProcessMemory.peak(tmp_path / "nowhere").resident_bytes > 10 * MIB


def test_memory_that_is_touched_is_seen() -> None:
    before = ProcessMemory.peak().resident_bytes
    held = bytearray(b"x") * (max(0, before - resident_bytes()) + 200 * MIB)
    assert ProcessMemory.peak().resident_bytes - before >= 150 * MIB
    assert len(held) >= 200 * MIB


def test_a_report_tells_the_process_beside_the_ledger(t2v_folder: Path) -> None:
    with an_engine(t2v_folder) as engine:
        report = engine.submit(a_request()).result().report
    held = report.peak_ram_bytes + report.peak_vram_bytes
    assert report.on_cpu
    assert report.process_peak_bytes > held
    assert 0 < report.beside_bytes <= report.process_peak_bytes
    assert report.process_peak_bytes - report.beside_bytes <= held
    told = report.to_json()
    assert told["process_peak_bytes"] == report.process_peak_bytes
    assert told["beside_bytes"] == report.beside_bytes
    card = replace(report, on_cpu=False)
    assert card.process_peak_bytes - card.beside_bytes == report.peak_ram_bytes


def test_what_was_measured_is_kept_by_device_and_told(data: Path) -> None:
    assert known_overhead("cpu") is None
    assert "first job" in overhead_told("cpu", 5)
    keep_overhead("cpu", 600 * MIB)
    keep_overhead("cuda", 900 * MIB)
    assert (known_overhead("cpu"), known_overhead("cuda")) == (600 * MIB, 900 * MIB)
    assert "600.0 MiB on top (measured by the last job" in overhead_told("cpu")
    assert "about 1000.0 MiB of RAM in all" in overhead_told("cpu", 400 * MIB)
    (data / "memory.json").write_text('{"cpu": -1, "cuda": true, "x": "y"}')
    assert known_overhead("cpu") is None and known_overhead("cuda") is None
    (data / "memory.json").write_text("[" * 100_000)
    assert known_overhead("cpu") is None


def test_nothing_is_lost_where_it_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENSTOCK_DATA_DIR", str(tmp_path / "file"))
    keep_overhead("cpu", 1)
    assert known_overhead("cpu") is None


def test_help_plan_and_report_say_what_comes_on_top(data: Path, tmp_path: Path) -> None:
    keep_overhead("cpu", 321 * MIB)
    help_ = CliRunner().invoke(app, ["generate", "--help"]).output
    assert "321.0 MiB" in " ".join(help_.split()) and "buffers" in help_
    words = ["--model", str(MINI), "--image", str(MINI.parent / "demo.png"), "--frames", "5",
             "--device", "cpu"]  # fmt: skip
    plan = CliRunner().invoke(app, ["plan", "--size", "64x64", *words]).output
    assert "321.0 MiB on top" in " ".join(plan.split())
    run = CliRunner().invoke(
        app, ["generate", *words, "--prompt", "a", "--steps", "1", "-o", str(tmp_path / "a.mp4")]
    )
    assert run.exit_code == 0, run.output
    assert "in buffers; the process took" in " ".join(run.stderr.split())
    measured = known_overhead("cpu")
    assert measured is not None and measured > 321 * MIB
