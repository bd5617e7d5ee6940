"""What `make faults` found, as rows of docs/measurements.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import faults, render

REPORT = """<testsuites><testsuite>
<testcase classname="tests.faults.test_a" name="test_cut[1]" time="2.04"><system-out>
--------------------------------- Captured Out ---------------------------------
cut 1,200 times of 7, kept</system-out></testcase>
<testcase classname="tests.faults.test_a" name="test_cut[2]" time="1"><system-out>
cut 34 times of 8, kept</system-out></testcase>
<testcase classname="tests.faults.test_a" name="test_bad" time="1"><failure>no</failure></testcase>
<testcase classname="tests.faults.test_a" name="test_off" time="0"><skipped/></testcase>
</testsuite></testsuites>"""
AGAIN = REPORT.replace("<failure>no</failure>", "<system-out>all 5 of it</system-out>")

CUT = render.Fault(
    "::test_cut", r"cut (?P<cuts>[\d,]+) times .* (?P<how>\w+)$", "{cuts} cuts", "{how}, {passed}"
)
BAD = render.Fault("::test_bad", r"all (?P<places>\d+)", "at {places} places", "well")


def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *reports: str) -> dict[str, object]:
    paths = [tmp_path / f"{index}.xml" for index in range(len(reports))]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(report)
    words = [*map(str, paths), "--save", str(tmp_path / "faults.json")]
    monkeypatch.setattr(sys, "argv", ["faults", *words])
    faults.main()
    found: dict[str, object] = json.loads((tmp_path / "faults.json").read_text())
    return found


def test_figures_of_a_tests_cases_are_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = kept(tmp_path, monkeypatch, REPORT)
    assert value["outcomes"] == {"passed": 2, "failure": 1, "skipped": 1}
    assert CUT.row(value["tests"]) == ("1,234 cuts", "kept, 2")  # type: ignore[arg-type]


def test_of_figures_with_a_point_the_greatest_is_shown() -> None:
    told = ("the most was 9.5 of 7", "the most was 10.25 of 7", "the most was 2.5 of 7")
    tests = {
        f"a.py::test_most[{index}]": {"outcome": "passed", "told": [line]}
        for index, line in enumerate(told)
    }
    most = render.Fault("::test_most", r"was (?P<most>[\d.]+) of", "most", "{most}")
    assert most.row(tests) == ("most", "10.25")


def test_what_failed_or_did_not_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = kept(tmp_path, monkeypatch, REPORT)
    assert BAD.row(value["tests"]) == ("at ... places", "FAILED")  # type: ignore[arg-type]
    assert BAD.row({}) is None
    value = kept(tmp_path, monkeypatch, REPORT, AGAIN)  # mended, and run again
    assert BAD.row(value["tests"]) == ("at 5 places", "well")  # type: ignore[arg-type]


def test_a_test_that_tells_other_figures_is_no_empty_row() -> None:
    tests = {"a.py::test_bad": {"outcome": "passed", "told": ["something else"]}}
    with pytest.raises(ValueError, match="test_bad has not printed all"):
        BAD.row(tests)


def test_what_has_not_run_is_named_beneath() -> None:
    tests = {"a.py::test_races": {"outcome": "failure", "told": []}}
    made = render.faults({"faults_a": {"tests": tests}})
    assert made.count("FAILED") == 4
    assert "Not run again for this table: test_sigkill_at_failpoints, " in made
    assert "test_races" not in made.rpartition("\n\n")[2]


def test_every_row_names_a_test_that_is_there() -> None:
    text = "".join(path.read_text() for path in (render.ROOT / "tests").rglob("test_*.py"))
    assert [fault.test for fault in render.FAULTS if f"def {fault.test[2:]}(" not in text] == []
