"""Which blocks of an unknown network live where, inside two budgets."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.errors import OverBudget
from penstock.profiles.hardware import Hardware
from penstock.profiles.plan import Items, StreamPlan
from penstock.profiles.policy import Limits
from penstock.profiles.streams import Network, Pace, best_stream
from penstock.units import format_bytes

PASSES = 50
"""Passes that loading residents must pay for itself in: about one video's denoising."""


def place_blocks(blocks: Sequence[int], fixed: Items, hardware: Hardware) -> StreamPlan:
    """Return the best places of ``blocks`` (their bytes).

    What a block computes is not known: it is taken to last as long as its copy, so that neither
    memory nor read-ahead is given up for the other.

    Args:
        fixed: ``(label, bytes)`` of what the device holds besides.
        hardware: its budgets and rates.

    Raises:
        OverBudget: not even one block at a time fits; names the least that does.
    """
    network, held = Network.of(blocks), sum(count for _, count in fixed)
    pace = Pace(sum(blocks) / hardware.rates.copy_bytes_per_s, PASSES)
    room = Limits(hardware.vram_bytes - held, hardware.ram_bytes)
    found = best_stream(network, pace, hardware.rates, room)
    if found is not None:
        return found.plan
    largest = max(blocks)
    if largest > room.vram_bytes:
        raise _refused("VRAM", (*fixed, ("one block", largest)), hardware.vram_bytes, "vram")
    raise _refused("RAM", (("one block", largest),), hardware.ram_bytes, "ram")


def _refused(resource: str, items: Items, limit_bytes: int, argument: str) -> OverBudget:
    need = sum(count for _, count in items)
    return OverBudget(
        resource, need, limit_bytes, items, f"Give {argument}={need} ({format_bytes(need)}) or more"
    )
