"""What the swap of Wan2.2 A14B's two transformers costs, on the simulated machine.

Of each card and job the denoising is run as numbers: the steps of the first transformer, the swap
(what is not in a block, and the cross-attention keys and values of the prompt), and the steps of
the second, whose blocks are read from the last step of the first on where the plan has room for
them. Beside it stands the bound that no order of work can beat: the disk's seconds, the link's or
the computing's of all of it, whichever is most. The job's other phases (text, decoding, the file)
are as planned on both sides.

The last line on stdout is JSON.

    python -m benchmarks.expert_swap | tail -1 > benchmarks/results/expert_swap_simulated.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from benchmarks.simulated import Block
from penstock.engine.families.wan.denoise_plan import Denoise
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.families.wan.plan import experts
from penstock.engine.family.protocol import builtin
from penstock.engine.run.room import residency
from penstock.errors import OverBudget
from penstock.offload.schedule import Compute, Copy, Op, Queue, Ref, build_schedule
from penstock.profiles.cards import described
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.phases import Case, Noise, Workload
from penstock.profiles.plan import PhasePlan, Plan
from penstock.profiles.planner import plan
from penstock.profiles.profile import choose, load
from penstock.units import GIB

CARDS = (
    ("RTX 3060 12GB", "12gb", "16GiB"), ("RTX 4060 Ti 16GB", "16gb", "32GiB"),
    ("RTX 4070 Ti 12GB", "12gb", "32GiB"), ("RTX 4090 24GB", "24gb", "32GiB"),
    ("RTX 4090 24GB", "24gb", "64GiB"), ("RTX 5090 32GB", "max", "64GiB"),
)  # fmt: skip
LIGHTNING = Noise("lcm", 5.0, distilled=True)
JOBS = {
    "720p, 40 steps, CFG": Workload(VideoShape(1280, 720, 81), 40, guided=True),
    "480p, 40 steps, CFG": Workload(VideoShape(832, 480, 81), 40, guided=True),
    "720p, Lightning": Workload(VideoShape(1280, 720, 81), 4, guided=False, noise=LIGHTNING),
    "480p, Lightning": Workload(VideoShape(832, 480, 81), 4, guided=False, noise=LIGHTNING),
}


@dataclass(frozen=True)
class Part:
    """One transformer's context and steps, as the plan has them and as numbers."""

    step: Denoise
    context: PhasePlan
    denoise: PhasePlan

    @property
    def compute_s(self) -> float:
        """Of one pass over all blocks."""
        wanted = self.denoise.chunk_tokens, self.denoise.branches, self.denoise.cross_kv_on_device
        return next(
            shape.compute_s
            for shape in self.step._shapes
            if (shape.cost.chunk_tokens, shape.cost.visit_branches, shape.cost.cross_kv_on_device)
            == wanted
        )

    @property
    def passes(self) -> int:
        """Over all blocks."""
        work = self.step.case.workload
        return work.steps * -(-work.branches // self.denoise.branches)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """As the simulated machine takes them."""
        sizes = self.step.spec.weights.block_bytes
        return tuple(Block(nbytes, self.compute_s / len(sizes)) for nbytes in sizes)


@dataclass(frozen=True)
class Run:
    """When a part's steps ended, and when their last step and their last read began and ended."""

    end_s: float
    last_step_s: float
    read_end_s: float


def run(part: Part, machine: Hardware, start_s: float, read_from_s: float) -> Run:
    """A part's steps: each queue in order, each operation as early as its ``after`` allows.

    Args:
        start_s: when the device is free for them.
        read_from_s: when their reads may begin.
    """
    assert part.denoise.stream is not None
    places, blocks, rates = residency(part.denoise.stream), part.blocks, machine.rates
    free_at = {Queue.READ: read_from_s, Queue.COPY: start_s, Queue.COMPUTE: start_s}
    ended: dict[Ref, float] = {}
    per_step = part.passes // part.step.case.workload.steps
    first_of_last = (part.passes - per_step) * len(blocks)
    visits, last_step_s = 0, start_s
    for op in build_schedule(places, part.passes):
        begin = max([free_at[op.ref.queue], *(ended[ref] for ref in op.after)])
        end = begin + _seconds(op, blocks[op.block], rates)
        ended[op.ref] = free_at[op.ref.queue] = end
        if isinstance(op, Compute):
            if visits == first_of_last:
                last_step_s = begin
            visits += 1
    return Run(max(free_at.values()), last_step_s, free_at[Queue.READ])


def _seconds(op: Op, block: Block, rates: Any) -> float:
    if isinstance(op, Compute):
        return block.compute_s
    if isinstance(op, Copy):
        return block.nbytes / float(rates.copy_bytes_per_s)
    return block.nbytes / float(rates.read_bytes_per_s)


def parts_of(found: Plan, manifest: WanManifest, work: Workload, machine: Hardware) -> list[Part]:
    """Both transformers' parts of a plan."""
    case = Case(manifest, work, machine.rates, _policy(found), machine.device, machine.fused_norms)
    return [
        Part(step, found[step.phases[0]], found[step.phases[1]])
        for step in experts(cast("Any", case))
    ]


def _policy(found: Plan) -> Any:
    from penstock.profiles.policy import Policy

    given: dict[str, Any] = {"compute": found.compute, "attention": found.attention}
    return Policy(**given)


def swapped(found: Plan, parts: list[Part], machine: Hardware) -> dict[str, float]:
    """Seconds of both parts with the swap between them, and the bound of all that they do."""
    first, second = parts
    rates = machine.rates
    before = _context_s(first, machine)
    one = run(first, machine, before, before)
    context = _context_s(second, machine)
    opened = one.end_s + context
    ahead = found["denoise"].prefetched_next_bytes > 0
    # The context's own reads go before those that were read ahead and are not there yet
    reads_from = max(one.last_step_s, one.read_end_s) if ahead else opened
    two = run(second, machine, opened, min(reads_from + (context if ahead else 0.0), opened))
    read = sum(p.context.read_bytes + p.denoise.read_bytes for p in parts)
    rest = sum(p.step.spec.weights.rest_bytes for p in parts)
    copied = sum(p.context.copied_bytes + p.denoise.copied_bytes for p in parts)
    bound = max(
        (read + rest) / rates.read_bytes_per_s,
        (copied + rest) / rates.copy_bytes_per_s,
        sum(p.passes * p.compute_s for p in parts),
    )
    own = {phase.name for part in parts for phase in (part.context, part.denoise)}
    others = sum(phase.seconds for phase in found.phases if phase.name not in own)
    whole, least = others + two.end_s, others + bound
    return {"seconds": whole, "bound_s": least, "of_bound": least / whole}


def _context_s(part: Part, machine: Hardware) -> float:
    rest, rates = part.step.spec.weights.rest_bytes, machine.rates
    return part.context.seconds + rest / rates.read_bytes_per_s + rest / rates.copy_bytes_per_s


def rows(cards: Sequence[tuple[str, str, str]] = CARDS) -> Iterator[dict[str, Any]]:
    """One row a card and job that fit."""
    for card, profile, ram in cards:
        machine = described(card, ram, None)
        chosen = choose(load(profile), Options(), machine)
        for job, work in JOBS.items():
            manifest = cast("WanManifest", builtin("wan2.2-t2v-a14b", chosen.formats[0]))
            try:
                found = plan(
                    manifest, work, chosen.hardware, chosen.policy, pinned_bytes=chosen.pinned_bytes
                )
            except OverBudget:
                continue
            parts = parts_of(found, manifest, work, chosen.hardware)
            figures = swapped(found, parts, replace(machine, rates=chosen.hardware.rates))
            yield {
                "card": card, "ram": ram, "job": job,
                "read_ahead": found["denoise"].prefetched_next_bytes > 0,
                "read_gib": [round(p.denoise.read_bytes / GIB, 2) for p in parts],
                "expert_gib": round(parts[1].step.spec.weights.total_bytes / GIB, 2),
                "bound_by": found["denoise"].bound,
            } | {name: round(value, 4) for name, value in figures.items()}  # fmt: skip


def main() -> None:
    found = list(rows())
    for row in found:
        print(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
