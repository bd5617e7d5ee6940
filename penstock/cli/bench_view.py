"""A benchmark as a person reads it: tables on a terminal, or the same in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.cli.layout import Column, table, wrap
from penstock.engine.bench.order import SweepPoint
from penstock.engine.bench.result import BenchResult, PhaseFigures, Verdict
from penstock.units import format_bytes

_EDGES = {
    "disk_wait_s": "disk -> host: a copy waited for a read",
    "slot_wait_s": "host -> device: a copy waited for a free slot",
    "compute_wait_s": "device -> compute: the computation waited for a block",
    "staging_wait_s": "a read waited for a free staging buffer (the disk is ahead)",
}


@dataclass(frozen=True)
class Section:
    """A table: headings and rows, all text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sections(result: BenchResult) -> list[Section]:
    """Lay out all of a result, table by table."""
    told = [_notes(result)] if result.notices else []
    return [
        _summary(result), _phases(result), _traffic(result), _waits(result), _peaks(result), *told
    ]  # fmt: skip


def _summary(result: BenchResult) -> Section:
    recipe = result.recipe
    place = result.placement
    raw = ", ".join(f"{seconds:.3f}" for seconds in result.seconds)
    cold = ", ".join(f"{step.seconds:.3f}" for step in result.warmup) or "none"
    return Section(
        f"{recipe.model}, {recipe.weight_format}",
        ("", ""),
        (
            ("seconds a step", f"{result.median_s:.3f} (median of {len(result.steps)}, spread "
             f"{result.spread_s:.3f})"),
            ("raw", f"{raw}; warm-up: {cold}"),
            ("overlap (compute / wall)", f"{result.overlap:.1%}"),
            ("video", f"{recipe.width}x{recipe.height}, {recipe.frames} frames, "
             f"{recipe.branches} pass(es) a step, {recipe.chunk_tokens:,} tokens a chunk"),
            ("compute", recipe.compute),
            ("blocks", f"{place['device_resident']} in VRAM, {place['host_resident']} in RAM, "
             f"{place['disk_blocks']} from disk at every pass; rings of {place['device_slots']} "
             f"and {place['staging_buffers']}"),
            ("budgets", f"VRAM {format_bytes(result.vram_limit_bytes)}, "
             f"RAM {format_bytes(result.ram_limit_bytes)} (profile {recipe.profile})"),
            ("machine", str(result.machine.get("gpu") or result.machine.get("cpu"))),
            ("recipe", recipe.hash),
        ),
    )  # fmt: skip


def _phases(result: BenchResult) -> Section:
    rows = tuple(
        (
            phase.name,
            f"{phase.seconds:.2f}",
            f"{phase.predicted_s:.2f}",
            phase.bound,
            f"{phase.stall_s:.2f}",
            f"{phase.overlap:.1%}",
        )
        for phase in result.phases
    )
    headings = ("phase", "seconds", "predicted", "bound", "stalled", "compute / wall")
    return Section("phases", headings, rows)


def _traffic(result: BenchResult) -> Section:
    """Return the bytes moved, at what rate while the link was busy, and what the link reaches
    alone."""
    links = result.links
    rows: list[tuple[str, ...]] = []
    for phase in result.phases:
        for link, nbytes, busy_s, rate, ceiling in _links(phase, links.read_bytes_per_s,
                                                           links.copy_bytes_per_s):  # fmt: skip
            if nbytes:
                rows.append(
                    (
                        f"{phase.name}: {link}",
                        format_bytes(nbytes),
                        f"{busy_s:.2f}",
                        f"{rate / 1e9:.2f}",
                        f"{ceiling / 1e9:.2f}",
                        f"{rate / ceiling:.0%}",
                    )
                )
    headings = ("link", "moved", "busy s", "GB/s", "ceiling GB/s", "share")
    return Section("traffic", headings, tuple(rows))


def _links(
    phase: PhaseFigures, read_rate: float, copy_rate: float
) -> tuple[tuple[str, int, float, float, float], ...]:
    return (
        ("disk -> host", phase.read_bytes, phase.read_s, phase.read_bytes_per_s, read_rate),
        ("host -> device", phase.copied_bytes, phase.copy_s, phase.copied_bytes_per_s, copy_rate),
    )


def _waits(result: BenchResult) -> Section:
    rows = tuple(
        (f"{phase.name}: {_EDGES.get(name, name)}", f"{seconds:.3f}")
        for phase in result.phases
        for name, seconds in phase.waits_s.items()
        if seconds >= 0.0005
    )
    return Section("waits", ("edge", "seconds"), rows)


def _peaks(result: BenchResult) -> Section:
    rows = tuple(
        (
            phase.name,
            format_bytes(phase.predicted_vram_bytes),
            format_bytes(phase.ledger_vram_bytes),
            format_bytes(phase.allocator_bytes) if phase.allocator_bytes else "-",
            format_bytes(phase.predicted_ram_bytes),
            format_bytes(phase.ledger_ram_bytes),
            format_bytes(phase.process_bytes),
        )
        for phase in result.phases
    )
    headings = (
        "phase", "VRAM predicted", "VRAM ledger", "CUDA allocator", "RAM predicted", "RAM ledger",
        "process grew by",
    )  # fmt: skip
    return Section("peaks", headings, rows)


def _notes(result: BenchResult) -> Section:
    """Return what a job would tell its user."""
    return Section("notes", ("",), tuple((line,) for line in result.notices))


def sweep_section(points: Sequence[SweepPoint]) -> Section:
    """Lay out a sweep, one row a profile."""
    rows = tuple(
        (
            point.profile,
            format_bytes(point.result.peak_vram_bytes),
            format_bytes(point.result.peak_ram_bytes),
            f"{point.result.median_s:.3f}",
            f"{point.result.overlap:.1%}",
        )
        if point.result is not None
        else (point.profile, "-", "-", "-", point.refusal)
        for point in points
    )
    return Section("sweep", ("profile", "peak VRAM", "peak RAM", "s/step", "compute / wall"), rows)


def verdict_section(verdict: Verdict) -> Section:
    """Lay out a comparison."""
    return Section(verdict.outcome, ("",), tuple((line,) for line in verdict.lines))


def tables(shown: Sequence[Section], width: int) -> str:
    """Lay the sections out in lines of ``width`` cells."""
    lines: list[str] = []
    for section in shown:
        bare = not any(section.headings)
        columns = [
            Column(heading, right=not bare and place > 0 and _is_figures(section, place))
            for place, heading in enumerate(section.headings)
        ]
        lines += ["", *wrap(section.title, width), *table(columns, section.rows, width)]
    return "\n".join(lines[1:])


def _is_figures(section: Section, place: int) -> bool:
    """Return whether a column holds figures, not sentences."""
    return all(len(row[place].split()) < 3 for row in section.rows)


def markdown(shown: Sequence[Section]) -> str:
    """For a page."""
    lines: list[str] = []
    for section in shown:
        lines += [f"### {section.title}", "", _row(section.headings)]
        lines.append(_row(["---"] * len(section.headings)))
        lines += [_row(row) for row in section.rows]
        lines.append("")
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
