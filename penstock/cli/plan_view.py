"""A plan, profiles and a doctor's findings as a person reads them. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from penstock.engine.alternatives import Alternative
from penstock.profiles.hardware import INTERPRETER_BYTES
from penstock.profiles.plan import ATTENTION, COMPUTE_PATHS, RESIDUAL, Plan, StreamPlan
from penstock.profiles.profile import Profile, load, names
from penstock.units import format_bytes

ASSUMED = (
    "the interpreter and its libraries take about "
    f"{format_bytes(INTERPRETER_BYTES)} of RAM besides (assumed)"
)
"""Of a machine that is described, and has not run a job."""

_BOUND = {"compute": "computing", "copy": "the link to the card", "read": "the disk"}


def plan_view(
    plan: Plan, besides: str = ASSUMED, alternatives: Sequence[Alternative] = ()
) -> Group:
    """The whole plan: phases, where the blocks live, what bounds it, where each value is from, and
    what would be faster.

    Args:
        plan: the plan.
        besides: what the process takes besides its buffers, in a clause.
        alternatives: that fit, the fastest first.
    """
    denoise = plan["denoise"]
    parts: list[RenderableType] = [_phases(plan)]
    if denoise.stream is not None:
        parts += [f"blocks   {strip(denoise.stream)}", f"         {_legend(denoise.stream)}"]
    parts += [
        f"forward  {denoise.chunk_tokens:,} tokens a chunk, {denoise.branches} CFG branch(es) a "
        f"visit, cross-attention K/V in {'VRAM' if denoise.cross_kv_on_device else 'RAM'}, "
        f"{_tiles(plan)}",
        f"weights  blocks stored as {plan.weight_format}, compute {plan.compute}: "
        f"{COMPUTE_PATHS[plan.compute_path]}; self-attention {ATTENTION[plan.attention]}; "
        f"hidden states {RESIDUAL[plan.residual]}",
        *_caching(plan),
        f"total    {clock(plan.seconds)}; denoising is bound by {_BOUND[denoise.bound]}",
        f"budgets  VRAM {format_bytes(plan.peak_vram_bytes)} of "
        f"{format_bytes(plan.vram_limit_bytes)}, RAM {format_bytes(plan.peak_ram_bytes)} of "
        f"{format_bytes(plan.ram_limit_bytes)} in buffers; {besides}",
        _origins(plan),
    ]
    if alternatives:
        parts += ["", "faster here", _faster(alternatives)]
    return Group(*parts)


def _caching(plan: Plan) -> list[str]:
    """How many steps are computed, and what that saves at most."""
    fewest, most = plan["denoise"].forwards
    if plan.step_cache == "off":
        return []
    if fewest == most:
        return [f"cache    {plan.step_cache}: {most} steps are computed"]
    saved = plan["denoise"].seconds * (1 - fewest / most)
    told = f"{fewest} to {most} steps are computed, as each clip allows"
    return [
        f"cache    {plan.step_cache}: {told}; the total is of all, and may be {clock(saved)} less"
    ]


def _faster(alternatives: Sequence[Alternative]) -> str:
    wide = max(len(each.flags) for each in alternatives)
    return "\n".join(
        f" {each.flags:<{wide}}  {clock(each.seconds):>8}  ({each.quality})"
        for each in alternatives
    )


def faster_told(best: Alternative) -> str:
    """The best alternative of a long job, in a line."""
    return (
        f"predicted to take {clock(best.of_seconds)}; {best.flags}: {clock(best.seconds)} "
        f"({best.quality}); penstock plan names more"
    )


def _phases(plan: Plan) -> Table:
    table = Table(title=f"plan for {plan.machine}", title_justify="left", box=box.SIMPLE)
    table.add_column("phase", no_wrap=True)
    for heading in ("VRAM", "RAM", "(pinned)", "from disk", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for phase in plan.phases:
        table.add_row(
            phase.name,
            format_bytes(phase.vram_bytes),
            format_bytes(phase.ram_bytes),
            format_bytes(phase.pinned_bytes),
            format_bytes(phase.read_bytes),
            clock(phase.seconds),
            phase.bound,
        )
    return table


def _tiles(plan: Plan) -> str:
    tiled = [phase for phase in plan.phases if phase.name in ("encode", "decode")]
    return ", ".join(f"{phase.name} in {phase.tiles[0]}x{phase.tiles[1]} tiles" for phase in tiled)


def strip(stream: StreamPlan) -> str:
    """One letter a block: V stays in VRAM, r in RAM, . streams from disk."""
    letters = ["."] * stream.n_blocks
    for block in stream.device_blocks:
        letters[block] = "V"
    for block in stream.host_blocks:
        letters[block] = "r"
    return "".join(letters)


def _legend(stream: StreamPlan) -> str:
    return (
        f"rings of {stream.device_slots} in VRAM and {stream.staging_buffers} in RAM; "
        f"V: {stream.device_resident} stay in VRAM, r: {stream.host_resident} stay in RAM, "
        f".: {stream.disk_blocks} are read from disk at every pass"
    )


def _origins(plan: Plan) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for origin in plan.origins:
        table.add_row(origin.name, origin.value, f"({origin.source})")
    return table


def clock(seconds: float) -> str:
    """Seconds for people: ``"0.4 s"``, ``"2:05"``, ``"1:02:03"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def profiles_view() -> Table:
    """All profiles, one a row."""
    table = Table()
    for heading in ("profile", "VRAM", "RAM", "formats", "for"):
        table.add_column(heading)
    for name in names():
        profile = load(name)
        table.add_row(
            name,
            _ceiling(profile.vram_bytes),
            _ceiling(profile.ram_bytes),
            ", ".join(profile.formats),
            profile.summary,
        )
    return table


def _ceiling(nbytes: int | None) -> str:
    return "free" if nbytes is None else format_bytes(nbytes)


def profile_view(profile: Profile) -> Table:
    """One profile, value by value, and whether its file says so."""
    table = Table(title=f"profile {profile.name}: {profile.summary}", title_justify="left")
    for heading in ("value", "is", "from"):
        table.add_column(heading)
    rows: list[tuple[str, object]] = [
        ("vram", _ceiling(profile.vram_bytes)),
        ("ram", _ceiling(profile.ram_bytes)),
        ("pinned_share", profile.pinned_share),
        ("formats", ", ".join(profile.formats)),
        *profile.policy.words().items(),
    ]
    for name, value in rows:
        table.add_row(name, str(value), str(profile.path) if name in profile.given else "default")
    return table


def findings_view(machine: str, findings: Sequence[tuple[str, str, str | None]]) -> Table:
    """What a doctor found: topic, fact, and what to do."""
    table = Table(title=machine, title_justify="left", box=box.SIMPLE)
    for heading in ("", "found", "what to do"):
        table.add_column(heading)
    for topic, found, remedy in findings:
        table.add_row(topic, found, remedy or "")
    return table
