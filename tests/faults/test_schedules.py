"""The full count of the synchronisation checks (``make faults``); the quick part is in
tests/offload/test_synchronisation.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.offload.test_synchronisation import false_alarms, make_files

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


def test_no_false_alarm_in_twenty_thousand_schedules(tmp_path: Path) -> None:
    ran = false_alarms(make_files(tmp_path), range(20_000))
    print(f"\nschedules: {ran}, no false alarm")
    assert ran == 20_000
