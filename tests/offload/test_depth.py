"""The queue depth follows a disk's rate: up while that pays, and no further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.offload import depth, tiers
from penstock.offload.depth import FIRST, SETTLED, QueueDepth
from penstock.offload.tiers import DiskTier
from tests.offload.blocks import aligned_file, layouts_of, random_blocks


def settle(found: QueueDepth, rate: Callable[[int], float], reads: int = 60) -> list[int]:
    """Read from a disk of ``rate`` bytes a second at a depth; the depths that were taken."""
    taken = []
    for _ in range(reads):
        taken.append(found.now)
        found.note(1000, 1000 / rate(found.now))
    return taken


@pytest.mark.parametrize(("enough", "expected"), [(1, 4), (4, 4), (8, 8), (16, 16), (1000, 32)])
def test_it_grows_while_that_makes_reading_faster(enough: int, expected: int) -> None:
    found = QueueDepth()
    taken = settle(found, lambda now: 1e6 * min(now, enough))
    assert taken[0] == FIRST and found.now == expected
    assert max(taken) <= min(2 * max(enough, FIRST), 32)


def test_it_goes_back_where_more_is_slower() -> None:
    found = QueueDepth()
    taken = settle(found, lambda now: 1e9 / now)
    assert found.now == FIRST and set(taken) == {FIRST, 2 * FIRST}


def test_it_looks_around_again_when_the_disk_has_become_faster() -> None:
    found = QueueDepth()
    settle(found, lambda now: 1e6 * min(now, 4))
    assert found.now == 4
    settle(found, lambda now: 1e6 * min(now, 16), SETTLED + 40)
    assert found.now == 16


def test_a_block_is_read_at_the_depth_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "PIECE_BYTES", 4096)
    blocks = random_blocks(1, width=300)
    aligned_file(tmp_path / "pack", {f"blocks.0.{n}": t for n, t in blocks[0].items()})
    layout = layouts_of(tmp_path / "pack", 1)[0]
    assert layout.read_bytes > 4096 * 2 * FIRST
    disk, noted = DiskTier(), []
    monkeypatch.setattr(disk._depth, "note", lambda *figures: noted.append(figures))
    disk.read(layout, memoryview(bytearray(layout.nbytes)))
    assert [count for count, _ in noted] == [layout.read_bytes]
    assert disk._pool is not None and len(disk._pool._threads) <= FIRST
    disk._depth.now = depth.MOST
    disk.read(layout, memoryview(bytearray(layout.nbytes)))
    assert len(noted) == 1, "too few pieces to judge the depth by"
    disk.close()
