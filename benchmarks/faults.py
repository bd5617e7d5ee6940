"""What `make faults` found, kept for the table of docs/measurements.md.

    python -m benchmarks.faults JUNIT.xml ... --save benchmarks/results/faults_NAME.json

Reads the reports that pytest writes with ``--junitxml=FILE -o junit_logging=system-out``: what each
test printed of its figures, how many passed, and the seconds. Of a test that stands in several
reports the last counts, so that one that was mended may be run again by itself. What is made of the
figures is said in `benchmarks.render`. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ENDED = ("failure", "error", "skipped")


def cases(report: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tests of a report by name (file::test[parameters]): outcome, seconds, what was told."""
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/")
        ended = [kind for kind in ENDED if case.find(kind) is not None]
        told = (case.findtext("system-out") or "").splitlines()
        yield (
            f"{file}.py::{case.get('name')}",
            {
                "outcome": ended[0] if ended else "passed",
                "seconds": round(float(case.get("time", "0")), 1),
                "told": [line for line in told if line and not line.startswith("-----")],
            },
        )


def main() -> None:
    """Read, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    found = {name: case for report in options.reports for name, case in cases(report)}
    value = {
        "machine": platform.machine(),
        "outcomes": Counter(case["outcome"] for case in found.values()),
        "tests": dict(sorted(found.items())),
    }
    if options.save is not None:
        options.save.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"outcomes": value["outcomes"]}))


if __name__ == "__main__":
    main()
