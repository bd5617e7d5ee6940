"""What the doctor has measured is told, whether it can be kept or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.machine import doctor
from penstock.profiles.rates import Rates

RATES = Rates(flops=3.21e11, copy_bytes_per_s=7e9, read_bytes_per_s=4.56e9)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "calibrate", lambda *arguments: RATES)


@pytest.mark.parametrize("kind", ["under a file", "a folder in its place", "damaged"])
def test_rates_that_cannot_be_kept_are_told(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "settings"
    if kind == "under a file":
        place.write_text("a file")
    else:
        place.mkdir()
    if kind == "a folder in its place":
        (place / "rates.json").mkdir()
    monkeypatch.setenv("PENSTOCK_CONFIG", str(place))
    if kind == "damaged":  # found out when they are to be kept: another process is to blame
        monkeypatch.setattr(doctor, "probe", lambda device, probe=doctor.probe: _then(place, probe))
    run = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"])
    if kind == "a folder in its place":
        assert run.exit_code == 2 and "rates.json" in run.stderr
        return
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told["rates"]["flops"] == RATES.flops
    assert told["stored_in"] is None
    (finding,) = [each for each in told["findings"] if each["topic"] == "rates"]
    assert "not kept" in finding["found"] and finding["remedy"]
    text = CliRunner().invoke(app, ["doctor", "--device", "cpu"]).output
    assert "0.321 TFLOP/s" in text or kind == "damaged"


def _then(place: Path, probe: object) -> object:
    found = probe("cpu")  # type: ignore[operator]
    (place / "rates.json").write_text("no rates")
    return found


def test_rates_are_kept_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CONFIG", str(tmp_path))
    run = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert json.loads(run.stdout)["stored_in"] == str(tmp_path / "rates.json")
    assert json.loads((tmp_path / "rates.json").read_text())["CPU"]["flops"] == RATES.flops
