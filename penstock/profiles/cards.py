"""Machines that are not there: known cards and disks, and what of their peaks is reached."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from penstock.errors import ProfileError, brief
from penstock.profiles.hardware import (
    CUDA_RESERVE_BYTES,
    INTERPRETER_BYTES,
    SYSTEM_BYTES,
    Hardware,
    has_fused_norms,
)
from penstock.profiles.rates import Rates
from penstock.units import GIB, parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pragma: no cover (Python 3.10)

ATTAINED = 0.55
"""Of the dense peak, in matrix products and in attention (seen in practice in bf16; assumed of 8
bits)."""

ATTAINED_CONV = 0.25
"""Of the dense bf16 peak, in the VAE's 3-D convolutions."""

ATTAINED_MEMORY = 0.8
"""Of the memory bandwidth, in decoding weights."""

ELEMENT_BYTES = 240
"""Of the card's own memory that norms, rotations and activations move for each element of the
hidden states, a block: some thirty reads and writes, most of them in fp32."""

LANE_BYTES_PER_S = {3: 0.79e9, 4: 1.57e9, 5: 3.15e9}
"""Of one PCI Express lane, from pinned memory, by generation."""

_GRADES = {"ti", "super"}

DEFAULT_RAM = "32GiB"
DEFAULT_DISK = "nvme3"


@dataclass(frozen=True)
class Card:
    """A card as its data sheet has it: bytes, and operations and bytes a second.

    Attributes:
        eight_bit_flops, fp8_flops: dense peaks of int8 and of fp8; None where there are no such
            units.
    """

    name: str
    memory_bytes: int
    flops: float
    eight_bit_flops: float | None
    fp8_flops: float | None
    memory_bytes_per_s: float
    pcie: int
    lanes: int

    @property
    def link_bytes_per_s(self) -> float:
        """Host memory to card."""
        return LANE_BYTES_PER_S[self.pcie] * self.lanes


def _table() -> dict[str, Any]:
    text = (files("penstock.profiles") / "cards.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def cards() -> tuple[Card, ...]:
    """Return all known cards."""
    return tuple(
        Card(
            name=name,
            memory_bytes=row["memory"] * GIB,
            flops=row["bf16"] * 1e12,
            eight_bit_flops=row["int8"] * 1e12 if "int8" in row else None,
            fp8_flops=row["fp8"] * 1e12 if "fp8" in row else None,
            memory_bytes_per_s=row["bandwidth"] * 1e9,
            pcie=row["pcie"],
            lanes=row["lanes"],
        )
        for name, row in _table()["card"].items()
    )


def find_card(name: str) -> Card:
    """Find the card that ``name`` means: "RTX 3060 12GB", "3060", "rtx-3060".

    Raises:
        ProfileError: none, or several; lists them.
    """
    known = cards()
    wanted = _words(name)
    fitting = [card for card in known if wanted <= _words(card.name)]
    # "4070" is the one without "Ti" or "Super", if it is said like that.
    plain = [card for card in fitting if not _words(card.name) & _GRADES - wanted]
    found = fitting if len(fitting) == 1 else plain
    if len(found) != 1:
        raise ProfileError(
            "unknown card" if not found else "several cards match this name",
            expected="one of " + ", ".join(card.name for card in found or known),
            found=brief(name),
        )
    return found[0]


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[0-9]+gb|[0-9]+|ti|[a-z]+", name.lower().replace(" gb", "gb")))


_FASTEST = 1e15
"""Bytes a second that no disk has."""


def disk_bytes_per_s(name: str) -> float:
    """Return the rate of sequential reads of a kind of disk, or of a rate such as "3.5GB/s".

    Raises:
        ProfileError: neither.
    """
    known: dict[str, float] = _table()["disk"]
    if name in known:
        return known[name] * 1e9
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])B/s", name)
    if match is None:
        raise ProfileError(
            "unknown disk",
            expected=", ".join(known) + ', or a rate such as "3.5GB/s"',
            found=brief(name),
        )
    rate = float(match[1]) * (1e9 if match[2] == "G" else 1e6)
    if not 0 < rate < _FASTEST:
        raise ProfileError(
            "illegal disk", expected="a rate above 0 that a disk can have", found=brief(name)
        )
    return rate


def described(card_name: str, ram: str | None, disk: str | None) -> Hardware:
    """Return a machine with that card, ``ram`` of system memory in total, and that disk.

    Its budgets are the card's memory less `CUDA_RESERVE_BYTES`, and the system memory less
    `SYSTEM_BYTES` and `INTERPRETER_BYTES`.

    Raises:
        ProfileError: an unknown card or disk; UsageError: an illegal size.
    """
    card = find_card(card_name)
    total_bytes = parse_bytes(ram or DEFAULT_RAM)
    rates = Rates(
        flops=ATTAINED * card.flops,
        copy_bytes_per_s=card.link_bytes_per_s,
        read_bytes_per_s=disk_bytes_per_s(disk or DEFAULT_DISK),
        int8_attention_flops=_attained(card.eight_bit_flops),
        conv_flops=ATTAINED_CONV * card.flops,
        eight_bit_flops=_attained(card.eight_bit_flops),
        fp8_flops=_attained(card.fp8_flops),
        memory_bytes_per_s=ATTAINED_MEMORY * card.memory_bytes_per_s,
        element_s=ELEMENT_BYTES / (ATTAINED_MEMORY * card.memory_bytes_per_s),
    )
    return Hardware(
        device="cuda",
        name=card.name,
        vram_bytes=card.memory_bytes - CUDA_RESERVE_BYTES,
        ram_bytes=max(0, total_bytes - SYSTEM_BYTES - INTERPRETER_BYTES),
        rates=rates,
        rates_source=f"table of cards, {disk or DEFAULT_DISK}",
        fused_norms=has_fused_norms("cuda"),
    )


def _attained(peak: float | None) -> float | None:
    return None if peak is None else ATTAINED * peak
