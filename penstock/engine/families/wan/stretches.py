"""Steps in a row that one transformer computes alike: with guidance, or the prompt's branch alone.

A step cache draws its lines inside a stretch: across its end the guided velocity jumps, as it does
from one transformer to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING

from penstock.engine.run.stepplan import shared_forwards
from penstock.profiles.caching import PLAN, SURE, Caching
from penstock.profiles.phases import Workload

if TYPE_CHECKING:
    from penstock.engine.families.wan.manifest import WanManifest


@dataclass(frozen=True)
class Stretch:
    """Some steps of a transformer.

    Attributes:
        steps: of the job's.
        branches: forward passes a step, of a window.
        caching: of its forward passes.
    """

    steps: range
    branches: int
    caching: Caching

    @property
    def forwards(self) -> tuple[int, int]:
        """The fewest and the most of its steps that are computed."""
        return self.caching.forwards(len(self.steps))

    @property
    def ahead(self) -> tuple[int, int]:
        """Forwards before it has begun: that are sure to come, and the most."""
        fewest, most = self.forwards
        return (most if fewest == most else min(SURE, most)), most


def stretches_of(
    manifest: WanManifest, work: Workload, steps: range, caching: Caching, *, guided: bool
) -> tuple[Stretch, ...]:
    """Return the stretches of ``steps`` that one transformer computes.

    Args:
        work: the whole job's.
        caching: of all of these steps.
        guided: they have guidance where the job's interval of noise levels is.
    """
    on = [guided] * len(steps)
    if guided and work.guided_within is not None:
        low, high = work.guided_within
        levels = manifest.levels(work.shape, work.steps, work.noise)
        on = [low <= levels[step] <= high for step in steps]
    runs = [list(run) for _, run in groupby(steps, key=lambda step: on[step - steps.start])]
    ends = [range(run[0], run[-1] + 1) for run in runs]
    return tuple(
        Stretch(own, 2 if on[own.start - steps.start] else 1, part)
        for own, part in zip(ends, _parts(manifest, work, caching, ends), strict=True)
    )


def passes_left(
    now: tuple[int, int],
    stretch: Stretch,
    later: Sequence[Stretch],
    visits_of: Mapping[int, int] = MappingProxyType({1: 1, 2: 1}),
) -> tuple[int, int]:
    """Return passes over the blocks that are still to come: that are sure to, and the most.

    Args:
        now: forwards that are left of ``stretch``, likewise.
        later: what comes after it.
        visits_of: passes of a forward, by its branches; by default forwards are counted.
    """
    left = [(now, stretch), *((each.ahead, each) for each in later)]
    sure, most = (
        sum(forwards[which] * visits_of[each.branches] for forwards, each in left)
        for which in (0, 1)
    )
    return sure, most


def _parts(
    manifest: WanManifest, work: Workload, caching: Caching, stretches: Sequence[range]
) -> Sequence[Caching]:
    """Return the caching of each; one that is too short for a cache says nothing of it where
    another is not."""
    if len(stretches) == 1:
        return (caching,)
    parts = shared_caching(manifest, work, caching, stretches)
    skips = [part.skips(len(own)) for part, own in zip(parts, stretches, strict=True)]
    if not any(skips):
        return parts
    return [part if skip else Caching() for part, skip in zip(parts, skips, strict=True)]


def shared_caching(
    manifest: WanManifest, work: Workload, caching: Caching, parts: Sequence[range]
) -> tuple[Caching, ...]:
    """Return the caching of each of several ``parts`` of a job's steps, one after another: the
    forwards of a plan are shared out among them.

    Args:
        work: the whole job's.
    """
    if caching.kind != PLAN:
        return (caching,) * len(parts)
    start, stop = parts[0].start, parts[-1].stop
    levels = manifest.levels(work.shape, work.steps, work.noise)[start:stop]
    own = tuple(range(part.start - start, part.stop - start) for part in parts)
    shared = shared_forwards(levels, own, caching.planned)
    return tuple(Caching(PLAN, planned=max(each, 2)) for each in shared)
