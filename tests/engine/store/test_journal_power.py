"""Power loss at any moment: what is found afterwards is the state before or after a save."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.life import Seen, live, observe, start
from tests.faults.power import Disk, states_after
from tests.faults.storage import RecordingOps


def record_life(folder: Path, skip: frozenset[str] = frozenset()) -> tuple[RecordingOps, list]:
    """Run a job; returns the log and, for each save, the log's length and what stands then."""
    ops = RecordingOps(skip)
    with start(folder, ops) as journal:
        saves = [len(ops.log)] + [len(ops.log) for _ in live(journal)]
    return ops, saves


def expected_after(folder: Path, count: int) -> Seen:
    """What a process finds after ``count`` saves of an undisturbed life."""
    with start(folder, RecordingOps()) as journal:
        steps = live(journal)
        for _ in range(count):
            next(steps)
    return observe(folder)


def lay_out(folder: Path, disk: Disk) -> Path:
    """Put a state on a real disk."""
    folder.mkdir()
    for name, content in disk.items():
        (folder / name).write_bytes(content)
    return folder


def violations(tmp_path: Path, skip: frozenset[str] = frozenset()) -> tuple[int, list[str]]:
    """How many states there are, and which of them are neither the old nor the new one."""
    folder = tmp_path / "job"
    ops, saves = record_life(folder, skip)
    known = [observe(tmp_path / "nothing")]
    known += [expected_after(tmp_path / f"e{n}", n) for n in range(len(saves))]
    bad: list[str] = []
    checked: dict[tuple, Seen] = {}
    number = 0
    for number, (count, disk) in enumerate(states_after(ops.log, folder), 1):
        done = sum(length <= count for length in saves)
        allowed = known[done : done + 2] or known[-1:]
        key = tuple(disk.items())
        if key not in checked:
            checked[key] = observe(lay_out(tmp_path / f"s{number}", disk))
        found = checked[key]
        if len(bad) > 10:
            break
        for part, value in found.items():
            if value not in [state.get(part) for state in allowed]:
                bad.append(f"after operation {count} {ops.log[count - 1][:2]}: {part} is {value}")
    return number, bad


def test_power_loss_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    count, bad = violations(tmp_path)
    assert bad == []
    assert count >= 1000
    print(f"{count} states after power loss")


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_dir"])
def test_the_simulation_notices_a_missing_sync(tmp_path: Path, forgotten: str) -> None:
    _, bad = violations(tmp_path, frozenset({forgotten}))
    assert bad
