"""A transformer in another format than its files': packed once into the cache, then read there.

Plans are made from the pack's layout, which follows from headers alone; the pack itself is made by
the first job that needs it.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import open_component
from penstock.engine.packs.cache import ABOUT, being_changed, is_complete
from penstock.engine.packs.origin import Origin, read_origin
from penstock.engine.packs.plan import LEAST_RAM_BYTES, ComponentPlan, plan_component
from penstock.engine.packs.side import as_json, write_config
from penstock.engine.store.durable import FileOps, write_atomically
from penstock.engine.store.sums import FileSum, Sums
from penstock.errors import JobLocked, OverBudget
from penstock.profiles.hardware import Hardware
from penstock.profiles.plan import PhasePlan
from penstock.units import GIB, format_bytes

log = logging.getLogger(__name__)

PACKING = "pack"
"""Name of the phase in which a pack is made."""

_MOST_RAM_BYTES = 2 * GIB


def packing(uses: Sequence[FirstUse], hardware: Hardware) -> PhasePlan:
    """Make several packs one after the other, as one phase of a plan.

    Raises:
        OverBudget: packing does not fit the RAM budget.
    """
    phases = [use.phase(hardware) for use in uses]
    return replace(
        max(phases, key=lambda phase: phase.ram_bytes),
        read_bytes=sum(phase.read_bytes for phase in phases),
        seconds=sum(phase.seconds for phase in phases),
    )


@dataclass(frozen=True)
class FirstUse:
    """The pack of a transformer in the cache, there already or still to be made.

    Attributes:
        wanted: the format of its block matrices.
        plan: what the pack will be.
        folder: in the cache.
    """

    wanted: str
    plan: ComponentPlan
    folder: Path

    @classmethod
    def of(cls, source: ComponentSource, wanted: str, cache: Path) -> FirstUse:
        """Return the pack of ``source`` in ``cache``.

        Raises:
            UsageError: no such format, or one that is only read.
            StorageError: a file of the source cannot be read.
        """
        plan = plan_component(source, wanted)
        digest = hashlib.sha256(plan.layout.header).hexdigest()[:16]
        log.debug("%s as %s would be %d bytes", source.raw.path, wanted, plan.layout.file_bytes)
        title = re.sub(r"[^a-z0-9.]+", "-", source.title.lower()).strip("-")
        return cls(wanted, plan, cache / f"{title}-{wanted}-{digest}")

    @property
    def is_made(self) -> bool:
        """Whether the pack is there, whole, and its source is believed to be what it was made from
        (`penstock.engine.store.sums.Sums.known`): nothing is read for it but samples."""
        if not is_complete(self.folder):
            return False
        known = {name: Sums().known(path) for name, path in self.plan.origins().items()}
        found = {name: each.value for name, each in known.items() if each is not None}
        return self.origin == found

    @property
    def origin(self) -> Origin | None:
        """What the pack was made from; None where there is no whole pack that says so."""
        made = is_complete(self.folder)
        return read_origin(FileOps(), self.folder / self.plan.file) if made else None

    def source_sums(self, check: Callable[[], None]) -> dict[str, FileSum]:
        """Return the checksums of the source as it is now, every byte read where none may be
        believed.

        Raises:
            StorageError: it cannot be read.
            CheckpointChanged: it does not keep still.
        """
        from penstock.engine.packs.pack import origin_sums

        return origin_sums(self.plan, check)

    @property
    def nbytes(self) -> int:
        """Size of the pack."""
        return self.plan.layout.file_bytes

    def streamed(self) -> ComponentSource:
        """Return the pack's transformer; of one that is not made yet, good for plans only.

        Raises:
            CheckpointError: the pack is damaged.
        """
        if self.is_made:
            return open_component(self.folder / self.plan.source.component)
        return self.plan.foresee(self.folder / self.plan.file)

    def phase(self, hardware: Hardware) -> PhasePlan:
        """Make the pack, as a phase of a plan; its seconds count reading and writing at the
        disk's rate, not the arithmetic.

        Raises:
            OverBudget: packing does not fit the RAM budget.
        """
        room = min(_MOST_RAM_BYTES, hardware.ram_bytes // 2)
        if hardware.ram_bytes < LEAST_RAM_BYTES:
            raise OverBudget(
                "RAM",
                LEAST_RAM_BYTES,
                hardware.ram_bytes,
                [(f"{PACKING}: weights in work", LEAST_RAM_BYTES)],
                remedy=f"Give --ram {format_bytes(LEAST_RAM_BYTES)} or more, pack the model on "
                "another machine with `penstock pack`, or leave --format out.",
            )
        moved = self.plan.source.nbytes + self.nbytes
        return PhasePlan(
            PACKING,
            weights=(),
            work=(),
            ram_weights=(),
            ram_work=(("weights in work", max(room, LEAST_RAM_BYTES)),),
            read_bytes=self.plan.source.nbytes,
            seconds=moved / hardware.rates.read_bytes_per_s,
            bound="read",
        )

    def make(
        self,
        ram_bytes: int,
        report: Callable[[int], None],
        waiting: Callable[[JobLocked], None] | None = None,
    ) -> None:
        """Make the pack, or continue an attempt that was stopped.

        Args:
            ram_bytes: the most memory for weights in work.
            report: told how many bytes of the pack are there; what it raises stops the packing.
            waiting: another process makes this pack: called again and again until that ends (what
                it raises ends the waiting); None: that is an error.

        Raises:
            CheckpointError: the source is damaged, or changed meanwhile.
            JobLocked: another process makes this pack, and it is not to be waited for.
            StorageError: no room for it, seen before anything is written; or the disk fails.
        """
        from penstock.engine.packs.pack import check_space, pack_component

        ops = FileOps()
        log.info("packs %s into %s", self.wanted, self.folder)
        check_space(ops, self.folder, [self.plan])
        with being_changed(self.folder, waiting):
            pack_component(self.plan, self.folder / self.plan.file, ram_bytes, ops, report)
            write_config(self.plan.source, self.folder, ops)
            about = {"format": self.wanted, "source": str(self.plan.source.raw.path)}
            write_atomically(ops, self.folder / ABOUT, [as_json(about)])
