"""What the GPU suite does with few minutes: what is worth most and not yet measured, first.

A part is some cases of a group with an estimate of their seconds, from runs on an H200 where there
were any. Parts are taken in order while their estimates fit; one that does not fit is passed over
for smaller ones. What has been measured is never measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Has = Callable[[str, str], bool]
"""Whether a case of a group has come to its end in an earlier run."""

WRITE_S = 45.0
"""To start the processes, and to write the short model."""


@dataclass(frozen=True)
class Part:
    """Cases of a group.

    Attributes:
        group: its name.
        cases: their names.
        seconds: that they are estimated to take, all of them together.
        before_s: on top, whichever of them are left: models that are written, and what they are
            compared with.
    """

    group: str
    cases: tuple[str, ...]
    seconds: float
    before_s: float = 0.0

    def left(self, has: Has) -> Part | None:
        """The cases that are not measured yet; None: there are none."""
        cases = tuple(case for case in self.cases if not has(self.group, case))
        if not cases:
            return None
        share = self.seconds * len(cases) / len(self.cases)
        return Part(self.group, cases, share + self.before_s)


PARTS = (
    Part("peers", ("penstock_ram", "group_offload", "penstock_disk", "group_offload_disk"), 70, 40),
    Part("speeds", ("480x832x81, RAM", "480x832x81, disk"), 20, 8),
    Part("peaks", ("16 GiB", "4 GiB"), 75, 25),
    Part("vae", ("decode, smallest card",), 18),
    Part(
        "formats",
        (
            "attention int8 (comfy-kitchen)", "attention sol (comfy-kitchen)", "path int8-kitchen",
            "int8, comfy-kitchen", "int8-convrot, comfy-kitchen",
        ),
        18,
    ),
    Part("peers", ("resident", "accelerate_cpu", "mmgp", "model_offload"), 70, 40),
    Part("correctness", ("late computation, rings of one",), 26, 6),
    Part(
        "formats",
        ("bf16, exact", "bf16, fast", "fp8, exact", "fp8, fast", "int8, exact", "int8, fast"),
        8,
    ),
    Part("vae", ("decode, tiled 3x3", "decode, whole"), 14),
    Part("peaks", ("12 GiB", "8 GiB", "24 GiB", "6 GiB"), 160, 25),
    Part("vae", ("encode, smallest card", "encode, tiled 3x3", "encode, whole"), 14),
    Part(
        "correctness",
        (
            "resident", "from RAM", "from disk", "mixed", "sequential", "late copies",
            "late computation", "late reads", "late copies, rings of one",
        ),
        75,
    ),
    Part(
        "speeds",
        (
            "720x1280x81, resident", "720x1280x81, RAM", "720x1280x81, disk",
            "528x960x77, resident", "528x960x77, RAM", "528x960x77, disk",
            "480x832x81, resident",
        ),
        85,
    ),
)  # fmt: skip
"""In the order of their worth."""


def chosen(has: Has, seconds: float, parts: Sequence[Part] = PARTS) -> list[Part]:
    """What is done in ``seconds``: parts as far as they are left, in order.

    Args:
        has: what is measured already.
        seconds: for everything, what goes before (`WRITE_S`) included.
        parts: what there is to do, in the order of its worth.
    """
    room = seconds - WRITE_S
    found = []
    for part in parts:
        left = part.left(has)
        if left is not None and left.seconds <= room:
            found.append(left)
            room -= left.seconds
    return found
