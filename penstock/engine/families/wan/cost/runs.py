"""Equal frames in a row, and how much of them causal layers must compute.

A run is a frame and how many times it comes. A layer that sees itself and some frames before makes
of a run as many different results as it takes until all that it sees is in the run; the last of
them stands for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.errors import UsageError


def clip_runs(frames: int, changes: Sequence[int] | None) -> list[tuple[int, int]]:
    """Return the first frame of each run of a clip, and its length.

    Args:
        frames: of the clip.
        changes: indices of frames that may differ from the one before them, in order, from 0 on;
            those beyond the clip do not count. None: any frame may.

    Raises:
        UsageError: they are not in order, or do not begin with 0.
    """
    firsts = range(frames) if changes is None else [each for each in changes if each < frames]
    if list(firsts[:1]) != [0] or sorted({*firsts}) != list(firsts):
        raise UsageError(
            "frames that change are not in order",
            expected="indices that grow, the first of them 0",
            found=", ".join(map(str, changes or ())) or "none",
            remedy="Name the first frame of each run of equal frames.",
        )
    return list(zip(firsts, map(int.__sub__, [*firsts[1:], frames], firsts), strict=True))


def after_layer(runs: Sequence[int], reach: int) -> list[int]:
    """Return runs that leave a layer which sees ``reach`` frames before the one in hand.

    It computes the first frame of each."""
    if max(runs) == 1:
        return [*runs]
    made: list[int] = []
    for length in runs:
        alone = min(length - 1, reach)
        made += [1] * alone + [length - alone]
    return made


def after_halving(runs: Sequence[int]) -> list[int]:
    """Return runs that leave a layer which passes the first frame by, and then makes one frame of
    each two and the one before them."""
    made, start, at = [1], 0, 0
    for length in runs:
        end = start + length
        while at + 2 < end:
            steady = at >= start
            times = (end - 1 - at) // 2 if steady else 1
            made.append(times)
            at += 2 * times
        start = end
    return made
