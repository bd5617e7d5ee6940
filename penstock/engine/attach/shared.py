"""One budget that the modules of a pipeline share: who computes has it, and gives it on."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from penstock.engine.attach.supply import Tiers
from penstock.errors import UsageError
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import release_cached
from penstock.profiles.hardware import Hardware
from penstock.profiles.plan import Items

_REMEMBERED = 3
"""Entries that tell two modules that take turns, as a ControlNet and a UNet do."""


class Tenant(Protocol):
    """What shares the budget.

    Attributes:
        name: of the component.
        whole_bytes: VRAM for all of it.
        least_vram_bytes, least_ram_bytes: without these it does not run.
        read_bytes, copied_bytes: moved so far.
    """

    name: str

    @property
    def whole_bytes(self) -> int: ...  # noqa: D102
    @property
    def least_vram_bytes(self) -> int: ...  # noqa: D102
    @property
    def least_ram_bytes(self) -> int: ...  # noqa: D102
    @property
    def read_bytes(self) -> int: ...  # noqa: D102
    @property
    def copied_bytes(self) -> int: ...  # noqa: D102

    def open(self, limits: Hardware) -> None:
        """Take memory, within these budgets."""

    def release(self) -> None:
        """Give it all back."""


class SharedBudget:
    """Lets in the module that is used, and others out where it needs their room.

    Args:
        hardware: the budgets.

    Attributes:
        tiers: the memories, with what is reserved in them.
        tenants: all modules that share it.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        vram = ByteLedger("VRAM", hardware.vram_bytes)
        self.tiers = Tiers(
            torch.device(hardware.place), vram, ByteLedger("RAM", hardware.ram_bytes)
        )
        self.tenants: list[Tenant] = []
        self._open: list[Tenant] = []
        self._entries: list[Tenant] = []
        self._is_closed = False

    def reserve(self, items: Items) -> None:
        """Hold what all modules need, to the end."""
        for label, nbytes in items:
            self.tiers.vram.reserve(label, nbytes)

    def enter(self, tenant: Tenant) -> None:
        """``tenant`` computes from here on.

        Raises:
            UsageError: the pipeline was detached.
            LedgerOverflow, CheckpointChanged, ...: it cannot be opened.
        """
        if tenant in self._open:
            return
        if self._is_closed:
            raise UsageError(
                "the pipeline was detached",
                expected="a module of an attached pipeline",
                remedy="Attach it again.",
            )
        partner = self._partner(tenant)
        self._entries = [*self._entries, tenant][-_REMEMBERED:]
        for other in list(self._open):
            if other is not partner and not self._holds(tenant.whole_bytes, tenant):
                self._let_out(other)
        share = 1.0
        if partner in self._open and not self._holds(tenant.least_vram_bytes, tenant):
            assert partner is not None
            self._let_out(partner)
            share = self._share(tenant, partner)
        vram, ram = self.tiers.vram.free, self.tiers.ram.free
        limits = replace(
            self._hardware,
            vram_bytes=max(int(share * vram), min(tenant.least_vram_bytes, vram)),
            ram_bytes=max(int(share * ram), min(tenant.least_ram_bytes, ram)),
        )
        tenant.open(limits)
        self._open.append(tenant)

    def _partner(self, tenant: Tenant) -> Tenant | None:
        """Return who takes turns with it."""
        last = self._entries[-_REMEMBERED:]
        if len(last) == _REMEMBERED and last[1] is tenant and last[0] is last[2]:
            return last[0]
        return None

    def _share(self, tenant: Tenant, partner: Tenant) -> float:
        """Return the share of what is free that leaves room for the other too; all where there is
        none."""
        needs = (
            (tenant.least_vram_bytes + partner.least_vram_bytes, self.tiers.vram.free),
            (tenant.least_ram_bytes + partner.least_ram_bytes, self.tiers.ram.free),
        )
        if any(need > free for need, free in needs):
            return 1.0
        most = min(1 - partner.least_vram_bytes / self.tiers.vram.free,
                   1 - partner.least_ram_bytes / self.tiers.ram.free)  # fmt: skip
        return min(tenant.whole_bytes / (tenant.whole_bytes + partner.whole_bytes), most)

    def _holds(self, vram_bytes: int, tenant: Tenant) -> bool:
        tiers = self.tiers
        return tiers.vram.free >= vram_bytes and tiers.ram.free >= tenant.least_ram_bytes

    def _let_out(self, tenant: Tenant) -> None:
        self._open.remove(tenant)
        tenant.release()
        release_cached(self.tiers.device)

    def release(self) -> None:
        """Hold nothing until a module is used again."""
        self._entries = []
        for tenant in list(self._open):
            self._let_out(tenant)

    def close(self) -> None:
        """End it: nothing can be opened any more."""
        self._is_closed = True
        self.release()

    @property
    def device_ledger(self) -> ByteLedger:
        """Of VRAM."""
        return self.tiers.vram

    @property
    def host_ledger(self) -> ByteLedger:
        """Of RAM."""
        return self.tiers.ram

    @property
    def read_bytes(self) -> int:
        """From disk to RAM, so far."""
        return sum(each.read_bytes for each in self.tenants)

    @property
    def copied_bytes(self) -> int:
        """From RAM to VRAM, so far."""
        return sum(each.copied_bytes for each in self.tenants)
