"""Synchronisation without a GPU: no false alarm in any schedule, and no wait that may be left out.

Two checkers look at the same runs: PyTorch's CUDA sanitizer, which knows what is ordered, and a
device that does everything as late, or as early, as the waits allow, and compares the bytes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from penstock.offload.layout import BlockLayout
from penstock.offload.schedule import Residency
from tests.offload.blocks import random_blocks, write_blocks
from tests.offload.turns import Dice, Policy, Ranks
from tests.offload.virtual import Mutant, Outcome, Scenario, Stage

BLOCKS = random_blocks(5, width=24)
LATE = ("stream copy", "stream compute", "main", "penstock-stream 1", "penstock-stream 2", "disk")


class Files(NamedTuple):
    """A checkpoint: its layouts, and its bytes."""

    layouts: list[BlockLayout]
    data: bytes

    def run(self, scenario: Scenario, policy: Policy, mutant: Mutant | None = None) -> Outcome:
        """One schedule."""
        return Stage(self.layouts, BLOCKS, self.data, policy).run(scenario, mutant)


def make_files(folder: Path) -> Files:
    """The blocks on disk."""
    layouts = write_blocks(folder / "model.safetensors", BLOCKS)
    return Files(layouts, (folder / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("blocks"))


def random_policy(rng: random.Random) -> Policy:
    """Anybody's turn, or somebody always last."""
    seed = rng.randrange(1 << 30)
    return Dice(seed) if rng.random() < 0.4 else Ranks(seed, rng.choice(("", *LATE)))


def random_scenario(rng: random.Random) -> Scenario:
    """Any residency of a few blocks, left early or not, with or without a bad disk; six visits at
    most, which is twice around the largest ring."""
    n = rng.randint(1, 4)
    places = [rng.choice("dhsss") for _ in range(n)]
    on_device = tuple(i for i, place in enumerate(places) if place == "d")
    in_host = tuple(i for i, place in enumerate(places) if place == "h")
    slots, staging = rng.randint(len(on_device) < n, 3), rng.randint("s" in places, 3)
    passes = rng.randint(1, min(3, 6 // n))
    early = rng.random() < 0.2
    reads = n - len(on_device) if not staging else n
    return Scenario(
        Residency(n, on_device, in_host, slots, staging),
        passes,
        overlapped=rng.random() < 0.85,
        leave_at=rng.randrange(n * passes) if early else None,
        fail_at=rng.randint(1, reads) if not early and reads and rng.random() < 0.1 else None,
        prefetched=rng.random() < 0.2,
        small_pieces=rng.random() < 0.15,
    )


def false_alarms(files: Files, seeds: range) -> int:
    """Random schedules, nothing left out; how many ran.

    Raises:
        AssertionError: a checker found something.
    """
    for seed in seeds:
        rng = random.Random(seed)
        scenario = random_scenario(rng)
        outcome = files.run(scenario, random_policy(rng))
        assert not outcome.caught, (seed, scenario, outcome)
    return len(seeds)


def test_no_false_alarm(files: Files) -> None:
    assert false_alarms(files, range(500)) == 500


def test_visits_in_any_order_compute_with_their_own_bytes(files: Files) -> None:
    for seed in range(80):
        rng = random.Random(seed)
        scenario = random_scenario(rng)
        blocks = scenario.residency.n_blocks
        jumps = tuple(rng.randrange(blocks) for _ in range(rng.randint(1, 6)))
        scenario = replace(scenario, jumps=jumps, passes=6, leave_at=None, fail_at=None)
        outcome = files.run(scenario, random_policy(rng))
        assert not outcome.caught, (seed, scenario, outcome)


SCENARIOS = (
    Scenario(Residency(3, (), (), 1, 1), passes=2),
    Scenario(Residency(3, (), (), 2, 2), passes=2),
    Scenario(Residency(4, (1,), (3,), 2, 1), passes=2),
    Scenario(Residency(4, (0,), (2,), 1, 2), passes=2, prefetched=True),
    Scenario(Residency(3, (0,), (1, 2), 1, 0), passes=2),
    Scenario(Residency(3, (1,), (), 1, 1), passes=2, overlapped=False),
)
ENDINGS = (
    Scenario(Residency(3, (), (), 2, 2), leave_at=1),
    Scenario(Residency(3, (), (), 2, 2), leave_at=1, prefetched=True),
    Scenario(Residency(3, (0,), (), 1, 2), leave_at=2, small_pieces=True),
    Scenario(Residency(3, (), (), 1, 1), fail_at=2, small_pieces=True),
    Scenario(Residency(3, (0, 1), (2,), 1, 0), passes=1),
)
"""What is in flight when they end is waited for in another place than otherwise."""

ENDING = ("host drains", "shutdown", "pieces")
"""Waits that matter where a stream ends with something in flight: by themselves, in one scenario or
another, but not each time that they are come to (what ends in order has nothing in flight)."""


def policies() -> Iterator[Policy]:
    """Everybody last, in turn, then dice."""
    for seed in range(3):
        for last in LATE:
            yield Ranks(seed, last, change=0.0)
        yield Dice(seed)


def is_caught(files: Files, scenario: Scenario, mutant: Mutant) -> bool:
    """Whether any checker notices that a wait is missing, in a few schedules."""
    return any(files.run(scenario, policy, mutant).caught for policy in policies())


def waits(files: Files, scenario: Scenario) -> Counter[tuple[str, ...]]:
    """How often each wait, or record of an event, is come to; the same in any schedule."""
    return files.run(scenario, Dice(0)).sites


def mutants(files: Files, scenario: Scenario) -> Iterator[Mutant]:
    """Each single wait and each record that somebody waits for, but those of `ENDING`."""
    outcome = files.run(scenario, Dice(0))
    yield from outcome.awaited
    for site, count in outcome.sites.items():
        if site[0] not in (*ENDING, "mark", "record"):
            yield from (Mutant(site, number) for number in range(1, count + 1))


@pytest.mark.parametrize("number", range(len(SCENARIOS)))
def test_every_single_wait_and_record_is_needed(files: Files, number: int) -> None:
    scenario = SCENARIOS[number]
    every = list(mutants(files, scenario))
    missed = [mutant for mutant in every if not is_caught(files, scenario, mutant)]
    assert missed == [] and len(every) > 10


def test_every_wait_at_an_end_is_needed(files: Files) -> None:
    found = {scenario: waits(files, scenario) for scenario in (*SCENARIOS, *ENDINGS)}
    sites = {site for counted in found.values() for site in counted if site[0] in ENDING}
    assert len(sites) == 5
    sites.remove(("shutdown", "penstock-disk"))  # its work was waited for: only idle threads end
    for site in sites:
        assert any(
            is_caught(files, scenario, Mutant(site))
            for scenario, counted in found.items()
            if site in counted
        ), site


def test_the_computation_may_go_on_in_another_stream(files: Files) -> None:
    streamed = Scenario(Residency(3, (1,), (), 1, 1), passes=3, hops=True)
    resident = Scenario(Residency(2, (0, 1), (), 0, 1), passes=3, hops=True)
    for scenario in (streamed, resident):
        for policy in policies():
            assert not files.run(scenario, policy).caught
    for before, after in (("0", "1"), ("1", "2")):
        hop = Mutant((f"stream compute {after}", "begins after", f"stream compute {before}"))
        assert is_caught(files, resident, hop)


def test_without_marks_nothing_moves(files: Files) -> None:
    for queue in ("read", "copy", "compute"):
        outcome = files.run(SCENARIOS[1], Dice(0), Mutant(("mark", queue)))
        assert "stuck" in outcome.trouble.lower(), queue


def test_every_kind_of_wait_is_come_to(files: Files) -> None:
    sites = set().union(*(waits(files, scenario) for scenario in (*SCENARIOS, *ENDINGS)))
    assert sites >= {
        ("penstock-stream", "waits for the mark of", queue) for queue in ("read", "copy", "compute")
    }
    assert sites >= {
        ("main", "waits for the mark of", "copy"),
        ("host waits for", "stream copy"),
        ("stream copy", "waits for", "stream compute"),
        ("stream compute", "waits for", "stream copy"),
        ("stream copy", "begins after", "stream compute"),
        ("record", "stream copy"),
        ("record", "stream compute"),
        ("pieces", "are waited for"),
        ("shutdown", "penstock-stream"),
        ("shutdown", "penstock-disk"),
        ("host drains", "stream copy"),
        ("host drains", "stream compute"),
    }
