"""What of a call can be kept for a resume, and how much disk and RAM that takes: counted while the
call is rehearsed.

What is kept are the calls of networks that a pipeline's loop over steps makes. A loop is known by
the bar that it shows; where a pipeline shows none, its denoisers by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from penstock.engine.attach.calling import NoBar
from penstock.engine.attach.calls import (
    NotPlain,
    apart,
    largest_bytes,
    output_bytes,
    tensors_in,
)
from penstock.engine.attach.recorded import intercepted
from penstock.engine.store.journal import HEADER_BYTES
from penstock.units import format_bytes

RECORDS = "records of calls"
"""What holds RAM for them."""

_MORE_TURNS = 1
"""Than steps that a scheduler makes (PNDM's)."""

_COPIES = 2
"""Of a record in RAM: its file as it is read, and its tensors."""


@dataclass(frozen=True)
class Seen:
    """The calls of a network that were rehearsed; bytes.

    Attributes:
        calls: how many.
        looped: of these, how many the loop over steps made.
        given_bytes: of all that they gave.
        largest_bytes: the most that one gave.
        asked_bytes: of the largest tensor that one was asked.
        why: they cannot be kept; None: they can.
    """

    calls: int = 0
    looped: int = 0
    given_bytes: int = 0
    largest_bytes: int = 0
    asked_bytes: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Counted:
    """What a rehearsal has shown of calls.

    Attributes:
        bars: the turns that each loop over steps showed: of its own, or the steps.
        networks: by name.
        timesteps: that the scheduler was left with: turns of a whole loop; 0: not known.
    """

    bars: tuple[int, ...]
    networks: Mapping[str, Seen]
    timesteps: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them again."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Counted:
        """Return what `to_json` gave.

        Raises:
            TypeError, ValueError, KeyError: it gave something else.
        """
        networks = {name: Seen(**each) for name, each in value["networks"].items()}
        return cls(tuple(map(int, value["bars"])), networks, int(value["timesteps"]))


class Counter:
    """Counts what the networks of a pipeline are asked and give."""

    def __init__(self) -> None:
        self._bars: list[_Bar] = []
        self._networks: dict[str, Seen] = {}
        self._depth = 0

    @property
    def counted(self) -> Counted:
        """What was seen."""
        return Counted(tuple(bar.turns for bar in self._bars), dict(self._networks))

    def bar(self, total: int | None) -> NoBar:
        """Return what a loop tells its steps."""
        self._bars.append(_Bar(total or 0))
        return self._bars[-1]

    @contextmanager
    def watched(self, networks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count inside."""
        with intercepted(networks, self._called):
            yield

    def _called(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._depth:
            return run(*args, **kwargs)
        self._depth += 1
        try:
            out = run(*args, **kwargs)
        finally:
            self._depth -= 1
        before = self._networks.get(name, Seen())
        why, given_bytes, asked_bytes = before.why, 0, 0
        try:
            asked_bytes = largest_bytes(tensors_in([list(args), dict(kwargs)]))
        except NotPlain as error:
            why = f"{name} is given a {error}, which may hold a state of its own"
        try:
            given_bytes = output_bytes(apart(out))
        except NotPlain as error:
            why = f"{name} gives a {error}, which cannot be kept"
        self._networks[name] = Seen(
            before.calls + 1,
            before.looped + any(bar.is_open for bar in self._bars),
            before.given_bytes + given_bytes,
            max(before.largest_bytes, given_bytes),
            max(before.asked_bytes, asked_bytes),
            why,
        )
        return out


class _Bar(NoBar):
    """Knows how many turns its loop has."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self.is_open = total, 0, True

    @property
    def turns(self) -> int:
        return max(self._total, self._done)

    def update(self, n: int = 1) -> None:
        """Count a turn."""
        self._done += n

    def close(self) -> None:
        """Note that the loop has ended."""
        self.is_open = False


@dataclass(frozen=True)
class Kept:
    """What is kept of a call; bytes.

    Attributes:
        networks: whose calls are kept.
        calls: how many these are in the whole, at most.
        disk_bytes: of all records, at most.
        ram_bytes: while one is written or read, and what is asked told.
    """

    networks: tuple[str, ...]
    calls: int
    disk_bytes: int
    ram_bytes: int

    def told(self) -> str:
        """Return it for people."""
        return f"resumable: {format_bytes(self.disk_bytes)} on disk at most"


def kept_of(
    counted: Counted, rehearsed: int, steps: int, order: int, named: Collection[str]
) -> Kept | str:
    """Return what is kept of a whole call; or why nothing is.

    Args:
        counted: of a call of fewer steps.
        rehearsed, steps: how many these were, and are to be.
        order: turns of the loop that one more step makes (a scheduler's own).
        named: networks that are denoisers by their names.
    """
    if counted.bars:
        found = {name: each for name, each in counted.networks.items() if each.looped}
    else:
        found = {name: each for name, each in counted.networks.items() if name in named}
    turns, loops = counted.timesteps, 1
    if not 0 < turns <= order * rehearsed + _MORE_TURNS:  # it was never told of these steps
        turns, loops = max(sum(counted.bars), rehearsed, 1), max(len(counted.bars), 1)
    factor = Fraction(turns + loops * (steps - rehearsed) * order, turns)
    if not found:
        return "it calls no network step by step"
    for each in found.values():
        if each.why is not None:
            return each.why
    factor = max(factor, Fraction(1))
    calls = sum(math.ceil(each.calls * factor) for each in found.values())
    given = sum(math.ceil(each.given_bytes * factor) for each in found.values())
    largest = max(found.values(), key=lambda each: each.largest_bytes)
    return Kept(
        tuple(sorted(found)),
        calls,
        given + calls * HEADER_BYTES,
        _COPIES * (largest.largest_bytes + HEADER_BYTES)
        + max(each.asked_bytes for each in found.values()),
    )
