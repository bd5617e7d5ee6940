"""A plan, profiles and a doctor's findings as a person reads them, in so many columns. Free of
torch.

A plan leads with its answer: whether it fits, how long it takes, and at what peaks. Then come the
phases, what would be faster, and how it runs, in words that the model's family gives its phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from penstock.cli.layout import Column, gauge, labelled, table, wrap
from penstock.engine.alternatives import Alternative
from penstock.errors import OverBudget
from penstock.profiles.attending import Attending
from penstock.profiles.caching import BUDGET, FEWEST_STEPS, Caching
from penstock.profiles.hardware import INTERPRETER_BYTES
from penstock.profiles.plan import COMPUTE_PATHS, RESIDUAL, PhasePlan, Plan, StreamPlan
from penstock.profiles.profile import Profile, load, names
from penstock.units import format_bytes

_BOUND = {"compute": "computing", "copy": "the link", "read": "the disk"}
_DEFAULT = "default"
_GAUGE_CELLS = 20
_LARGEST = 6
"""Consumers of memory that a refusal names one by one."""
_PINNED_FROM = 76
"""Columns of a terminal from which the pinned share of RAM has a column."""


def assumed(plan: Plan) -> str:
    """Return what the process takes on a machine that is described, and has not run a job."""
    taken = format_bytes(plan.peak_ram_bytes + INTERPRETER_BYTES)
    return (
        f"about {taken} of RAM in all: the buffers, and {format_bytes(INTERPRETER_BYTES)} for the "
        "interpreter and libraries (assumed)"
    )


def plan_view(
    plan: Plan, width: int, besides: str | None = None, alternatives: Sequence[Alternative] = ()
) -> str:
    """Lay out the whole plan in lines of ``width`` cells.

    Args:
        plan: the plan.
        width: of the terminal.
        besides: what the process takes besides its buffers, in a clause; None: it is assumed.
        alternatives: that fit, the fastest first.
    """
    lines = [*_answer(plan, besides or assumed(plan), width), "", *_phases(plan, width)]
    if alternatives:
        lines += ["", "faster here", *_faster(alternatives, width)]
    lines += ["", "how it runs", *_blocks(plan, width), *_cuts(plan, width), *_weights(plan, width)]
    lines += ["", "where each value is from", *_origins(plan, width)]
    return "\n".join(lines)


def _answer(plan: Plan, besides: str, width: int) -> Iterator[str]:
    yield from wrap(
        f"plan for {plan.machine}: it fits, and takes about {spoken(plan.seconds)}", width
    )
    yield from _peak("VRAM", plan.peak_vram_bytes, plan.vram_limit_bytes, "", width)
    yield from _peak("RAM", plan.peak_ram_bytes, plan.ram_limit_bytes, " in buffers", width)
    yield from labelled("process", besides, width)
    longest = max(plan.phases, key=lambda phase: phase.seconds)
    steps = f"{longest.forwards[1]} steps in " if longest.forwards[1] else ""
    told = f"{steps}{clock(longest.seconds)}, bound by {_BOUND[longest.bound]}"
    yield from labelled("longest", f"{longest.name}: {told}", width)
    yield from _caching(plan, width)


def _peak(label: str, nbytes: int, limit: int, of_what: str, width: int) -> list[str]:
    told = f"{format_bytes(nbytes)} of {format_bytes(limit)}{of_what} at the peak"
    return labelled(label, f"{gauge(nbytes / limit, _GAUGE_CELLS)} {told}", width)


def _caching(plan: Plan, width: int) -> list[str]:
    """Say how many steps are computed, and what that saves at most."""
    if plan.step_cache == "off":
        return []
    fewest, most = (sum(each.forwards[n] for each in plan.denoising) for n in (0, 1))
    if fewest == most:
        told = _exactly(Caching.of(plan.step_cache), most)
        return labelled("cache", f"{plan.step_cache}: {told}", width)
    saved = sum(
        each.seconds * (1 - each.forwards[0] / each.forwards[1])
        for each in plan.denoising
        if each.forwards[1]
    )
    told = f"{fewest} to {most} steps are computed, as each clip allows"
    return labelled(
        "cache",
        f"{plan.step_cache}: {told}; the time is that of all, and may be {clock(saved)} less",
        width,
    )


def _exactly(caching: Caching, computed: int) -> str:
    """Say how many steps are computed, and why, where it is not as many as were asked for."""
    if caching.kind == BUDGET or computed < caching.planned:
        return f"it gains nothing, all {computed} steps are computed"
    told = f"{computed} steps are computed"
    if computed == caching.planned:
        return told
    return f"{told}, as fewer than {FEWEST_STEPS} in a row all are, and of others two at least"


def _faster(alternatives: Sequence[Alternative], width: int) -> list[str]:
    columns = (Column(whole=True), Column(right=True), Column())
    rows = [(each.flags, clock(each.seconds), each.quality) for each in alternatives]
    return table(columns, rows, width)


def faster_told(best: Alternative) -> str:
    """Name the best alternative of a long job in a line."""
    return (
        f"predicted to take {clock(best.of_seconds)}; {best.flags}: {clock(best.seconds)} "
        f"({best.quality}); penstock plan names more"
    )


def _phases(plan: Plan, width: int) -> list[str]:
    pinned = width >= _PINNED_FROM
    headings = ("VRAM", "RAM", *(("pinned",) if pinned else ()), "from disk", "time")
    columns = (
        Column("phase"),
        *(Column(each, right=True) for each in headings),
        Column("bound by"),
    )
    return table(columns, [_phase(phase, pinned) for phase in plan.phases], width)


def _phase(phase: PhasePlan, pinned: bool) -> tuple[str, ...]:
    return (
        phase.name,
        format_bytes(phase.vram_bytes),
        format_bytes(phase.ram_bytes),
        *((format_bytes(phase.pinned_bytes),) if pinned else ()),
        format_bytes(phase.read_bytes),
        clock(phase.seconds),
        _BOUND[phase.bound],
    )


def _blocks(plan: Plan, width: int) -> Iterator[str]:
    """Draw where the blocks of each transformer live; two that live alike are drawn once."""
    drawn: list[StreamPlan] = []
    for phase in plan.denoising:
        if phase.stream is not None and phase.stream not in drawn:
            drawn.append(phase.stream)
            label = "blocks" if len(drawn) == 1 else ""
            letters, room = strip(phase.stream), max(width - 9, 10)
            for start in range(0, len(letters), room):
                yield f"{'' if start else label:<9}{letters[start : start + room]}"
            yield from labelled("", _legend(phase.stream), width)


def strip(stream: StreamPlan) -> str:
    """Draw one letter a block: V stays in VRAM, r in RAM, . streams from disk."""
    letters = ["."] * stream.n_blocks
    for block in stream.device_blocks:
        letters[block] = "V"
    for block in stream.host_blocks:
        letters[block] = "r"
    return "".join(letters)


def _legend(stream: StreamPlan) -> str:
    return (
        f"V: {stream.device_resident} stay in VRAM, r: {stream.host_resident} stay in RAM, "
        f".: {stream.disk_blocks} are read from disk at every pass; buffers for "
        f"{stream.device_slots} blocks in VRAM and {stream.staging_buffers} in RAM"
    )


def _cuts(plan: Plan, width: int) -> Iterator[str]:
    for phase in plan.phases:
        if phase.facts:
            yield from labelled(phase.name, "; ".join(phase.facts), width)


def _weights(plan: Plan, width: int) -> list[str]:
    told = (
        f"blocks stored as {plan.weight_format}, compute {plan.compute}: "
        f"{COMPUTE_PATHS[plan.compute_path]}; "
        f"self-attention {Attending.of(plan.attention).backend.told}; "
        f"hidden states {RESIDUAL[plan.residual]}"
    )
    return labelled("weights", told, width)


def _origins(plan: Plan, width: int) -> Iterator[str]:
    """Name the source of each value, and those that are by default together."""
    for each in plan.origins:
        if each.source != _DEFAULT:
            yield from labelled(each.name, f"{each.value} ({each.source})", width)
    left = [f"{each.name} {each.value}" for each in plan.origins if each.source == _DEFAULT]
    if left:
        yield from labelled(_DEFAULT, ", ".join(left), width)


def refusal_view(error: OverBudget, machine: str, width: int) -> str:
    """Lay out why a video does not fit: the need, what takes most of it, and what would fit."""
    lines = wrap(f"plan for {machine}: no plan fits the {error.resource} budget", width)
    over = error.need_bytes - error.limit_bytes
    lines += labelled(
        error.resource,
        f"{format_bytes(error.need_bytes)} at the least, {format_bytes(over)} more than the "
        f"{format_bytes(error.limit_bytes)} that may be used",
        width,
        max(9, len(error.resource) + 2),
    )
    rows = [(label, format_bytes(nbytes)) for label, nbytes in error.consumers[:_LARGEST]]
    rest = sum(nbytes for _, nbytes in error.consumers[_LARGEST:])
    rows += [("others", format_bytes(rest))] if rest else []
    lines += ["", *table((Column("what takes it"), Column("at the peak", right=True)), rows, width)]
    return "\n".join([*lines, "", *wrap(error.remedy or "", width)])


def clock(seconds: float) -> str:
    """Return the seconds for people: ``"0.4 s"``, ``"2:05"``, ``"1:02:03"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def spoken(seconds: float) -> str:
    """Return the seconds in words: ``"0.4 s"``, ``"2 min 5 s"``, ``"1 h 2 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def profiles_view(width: int) -> str:
    """Lay out all profiles, one a row."""
    columns = (
        Column("profile"), Column("VRAM", right=True), Column("RAM", right=True),
        Column("formats"), Column("for"),
    )  # fmt: skip
    rows = [
        (
            name,
            _ceiling(profile.vram_bytes),
            _ceiling(profile.ram_bytes),
            ", ".join(profile.formats),
            profile.summary,
        )
        for name, profile in ((name, load(name)) for name in names())
    ]
    return "\n".join(table(columns, rows, width))


def _ceiling(nbytes: int | None) -> str:
    return "free" if nbytes is None else format_bytes(nbytes)


def profile_view(profile: Profile, width: int) -> str:
    """Lay out one profile, value by value, and whether its file says so."""
    values: list[tuple[str, object]] = [
        ("vram", _ceiling(profile.vram_bytes)),
        ("ram", _ceiling(profile.ram_bytes)),
        ("pinned_share", profile.pinned_share),
        ("formats", ", ".join(profile.formats)),
        *profile.policy.words().items(),
    ]
    rows = [
        (name, str(value), "the profile" if name in profile.given else "default")
        for name, value in values
    ]
    lines = wrap(f"profile {profile.name}: {profile.summary}", width)
    lines += [*table((Column("value"), Column("is"), Column("from")), rows, width)]
    return "\n".join([*lines, *wrap(f"the profile is {profile.path}", width)])


def findings_view(machine: str, findings: Sequence[tuple[str, str, str | None]], width: int) -> str:
    """Lay out what a doctor found, topic by topic, and below each what to do about it."""
    wide = max(len(topic) for topic, _, _ in findings) + 2
    wide = min(wide, width // 2)
    lines = wrap(machine, width)
    for topic, found, remedy in findings:
        lines += labelled(topic, found, width, wide)
        if remedy:
            lines += wrap(remedy, width, " " * wide + "-> ", " " * wide + "   ")
    return "\n".join(lines)
