"""A model in the formats it may be run in: as its files are, or as packs of its transformer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.engine.attention.choice import attention_numerics
from penstock.engine.machine.memory import resident_bytes
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.storage import block_format
from penstock.engine.packs.firstuse import FirstUse, packing
from penstock.engine.software import package_version
from penstock.engine.store.sums import how_told
from penstock.errors import JobLocked
from penstock.folders import cache_folder
from penstock.formats.formats import get_format
from penstock.profiles.advice import plan_chosen
from penstock.profiles.caching import OFF
from penstock.profiles.phases import Manifest, Workload, compute_path
from penstock.profiles.plan import Plan
from penstock.profiles.profile import Chosen
from penstock.quant.paths import Computing, Kernel, Mode, Scratch
from penstock.units import format_bytes

if TYPE_CHECKING:
    from penstock.engine.run.stage import Stage
    from penstock.formats.scaled import Gemm
    from penstock.quant.probe import PathReport

log = logging.getLogger(__name__)


def _close_streamed(model: ModelFiles) -> None:
    """Close the files of the networks that stream; the others are those of every variant."""
    for part in list(model.parts.values()):
        if part.source.component in model.streaming:
            part.checkpoint.close()


def computing_on(device: str, mode: Mode) -> tuple[Computing, tuple[str, ...]]:
    """Return how quantised linears compute on ``device``, and what is to be said of its 8-bit
    products, which are tried for "fast"."""
    if mode == "exact":
        return Computing(Scratch(0, device)), ()
    from penstock.quant.probe import probe, probe_kitchen, probe_micro, working

    reports = probe(device)
    works, told = working(reports), told_of(reports)
    if device != "cpu":
        kitchens, said = _kitchens(probe_kitchen(device))
        blocks = probe_micro(device)
        works |= kitchens | {name for name, report in blocks.items() if report.works}
        told = (*told, _told_blocks(blocks), said)
    return Computing(Scratch(0, device), mode, works), told


def _kitchens(report: PathReport) -> tuple[frozenset[Kernel], str]:
    """Return what comfy-kitchen's trial has shown, and what is said of it."""
    if report.works:
        return frozenset({"int8-kitchen"}), "int8 products by comfy-kitchen: they work here"
    return frozenset(), f"int8 products by comfy-kitchen: not here ({report.reason})"


def kitchen_numerics(path: str, works: frozenset[Kernel]) -> dict[str, str]:
    """Return what a fingerprint says of comfy-kitchen's products: results depend on its version."""
    if path not in ("nvfp4", "mxfp8") and (path != "int8" or "int8-kitchen" not in works):
        return {}
    return {path: f"comfy-kitchen {package_version('comfy-kitchen')}"}


def _told_blocks(reports: Mapping[Gemm, PathReport]) -> str:
    """Return what is said of products in numbers with a scale a block."""
    good = [name for name, report in reports.items() if report.works]
    bad = [f"{name} ({report.reason})" for name, report in reports.items() if not report.works]
    said = [f"{' and '.join(good)} work here"] * bool(good) + [f"not {' nor '.join(bad)}"] * bool(
        bad
    )
    return f"products by blocks, by comfy-kitchen: {'; '.join(said)}"


def told_of(reports: Mapping[Kernel, PathReport]) -> tuple[str, ...]:
    """Return what is said of each path in 8 bits, as it was found on the device."""
    rowwise = reports["fp8-rowwise"]
    slower = "" if rowwise.works else f", scaled in passes of their own ({rowwise.reason})"
    return _told("fp8", reports["fp8"], slower), _told("int8", reports["int8"], "")


def _told(path: Gemm, report: PathReport, slower: str) -> str:
    if report.works:
        return f"8-bit products in {path}: they work here{slower}"
    return f"8-bit products in {path}: not here, weights are decoded ({report.reason})"


class Variants:
    """A model as its files hold it, and in other formats.

    A format that a flag names is the one; those of a profile count where the files are plain (what
    is quantised already is not quantised again for a preference); else the files stay as they are.

    Args:
        model: as its files hold it.
        chosen: budgets, policy and formats.
        computing: how quantised linears compute.
        cache: where packs are kept; None: `penstock.folders.cache_folder`.
        described: the machine is only described: which 8-bit products it has, its rates say.
    """

    def __init__(
        self,
        model: ModelFiles,
        chosen: Chosen,
        computing: Computing,
        cache: Path | None = None,
        *,
        described: bool = False,
    ) -> None:
        self._chosen, self._computing, self._described = chosen, computing, described
        self.stored = model.installed(computing)
        self._cache = cache or cache_folder()
        self._stored_format = block_format(model.streamed.source)
        self._packs: dict[str, tuple[tuple[FirstUse, ...], ModelFiles]] = {}

    def plan(self, workload: Workload) -> Plan:
        """Return the plan in the first format that fits, with the packing that it needs before.

        Raises:
            OverBudget: no plan fits the budgets.
            UsageError: no such format.
        """
        found = plan_chosen(self._offered, workload, self._chosen)
        found = replace(found, origins=found.origins + self.stored.origins())
        lacking = [use for use in self._first_uses(found.weight_format) if not use.is_made]
        if not lacking:
            return found
        return replace(found, phases=(packing(lacking, self._chosen.hardware), *found.phases))

    def _offered(self, name: str) -> Manifest:
        origin, stored = self._chosen.formats_from, self._stored_format
        kept = origin == "default" or (
            origin != "flag" and (not get_format(stored).plain or get_format(name).plain)
        )
        manifest: Manifest = (self.stored if kept else self.named(name)).manifest
        return manifest.undecided() if self._described else manifest

    def named(self, name: str) -> ModelFiles:
        """Return the model with its block matrices in the format ``name``; its pack may have to be
        made.

        Raises:
            UsageError: no such format, or one that is only read.
        """
        uses = self._first_uses(name)
        return self._packs[name][1] if uses else self.stored

    def _first_uses(self, name: str) -> tuple[FirstUse, ...]:
        """Return the packs of that format, opened, one for each network that streams; none where
        the files hold it already."""
        if name == self._stored_format:
            return ()
        if name not in self._packs:
            log.debug("the files hold %s, wanted is %s", self._stored_format, name)
            parts = (self.stored.source.parts[each] for each in self.stored.streaming)
            self._open(tuple(FirstUse.of(part, name, self._cache) for part in parts))
        return self._packs[name][0]

    def _open(self, uses: tuple[FirstUse, ...]) -> ModelFiles:
        wanted = uses[0].wanted
        known = self._packs.get(wanted)
        if known is not None:
            _close_streamed(known[1])
        model = self.stored.with_streamed(*(use.streamed() for use in uses))
        model = model.installed(self._computing)
        self._packs[wanted] = (uses, model)
        return model

    def preparation(self, name: str) -> Callable[[Stage], ModelFiles] | None:
        """Return what gives a job the model in that format to read from; None where the files
        do."""
        uses = self._first_uses(name)
        return (lambda stage: self._prepared(uses, stage)) if uses else None

    def _prepared(self, uses: tuple[FirstUse, ...], stage: Stage) -> ModelFiles:
        for use in uses:
            if not self._is_ready(use, stage):
                self._make(use, stage)
        return self._open(uses)

    def _is_ready(self, use: FirstUse, stage: Stage) -> bool:
        """Return whether the pack is there and was made from the source as it is, and say how that
        was found out."""
        if not use.is_made and use.origin is not None:
            stage.monitor.notice(
                "the transformer's files have another size, time or place than is known here: "
                "every byte is read, to see whether their pack is still theirs"
            )
        if use.origin is None:
            return False
        sums = use.source_sums(stage.monitor.check)
        if use.origin != {name: each.value for name, each in sums.items()}:
            stage.monitor.notice(
                f"the pack in {use.folder} was made from other bytes than the transformer has now: "
                "it is made again"
            )
            return False
        stage.monitor.notice(
            f"the transformer is read as {use.wanted} from {use.folder}, whose source is unchanged "
            f"({how_told(sums.values())})"
        )
        return True

    def _make(self, use: FirstUse, stage: Stage) -> None:
        stage.monitor.notice(
            f"packing the transformer as {use.wanted}, once, into {use.folder} "
            f"({format_bytes(use.nbytes)}); `penstock cache` lists and frees packs"
        )
        phase_plan = use.phase(self._chosen.hardware)
        with stage.phase(phase_plan.name, use.nbytes >> 20, "MiB", plan=phase_plan) as (_, phase):
            told: list[str] = []
            before, phase.took_bytes = resident_bytes(), 0

            def report(nbytes: int) -> None:
                phase.check()
                phase.took_bytes = max(phase.took_bytes or 0, resident_bytes() - before)
                while phase.done < min(nbytes >> 20, phase.total):
                    phase.advance()

            def waiting(held: JobLocked) -> None:
                phase.check()
                if not told:
                    told.append(f"waiting for {held.found}, which packs the same transformer")
                    stage.monitor.notice(f"{told[0]} into {use.folder}")

            use.make(phase_plan.ram_work_bytes, report, waiting)

    def numerics(self, name: str) -> dict[str, str]:
        """Return how the block matrices in that format are stored and multiply here, and what
        attends, as the plan says."""
        policy, rates = self._chosen.policy, self._chosen.hardware.rates
        path = compute_path(self.named(name).manifest.storage, policy, rates)
        return {
            "weight_format": name,
            "compute": policy.compute,
            "compute_path": path,
            "attention": attention_numerics(policy.attention),
            **kitchen_numerics(path, self._computing.working),
            **({} if policy.step_cache == OFF else {"step_cache": policy.step_cache}),
        }

    def close(self) -> None:
        """Close the files."""
        for model in (self.stored, *(model for _, model in self._packs.values())):
            model.close()
