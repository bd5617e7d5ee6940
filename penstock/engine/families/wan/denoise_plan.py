"""The transformer's two phases: the context, once a prompt, and the steps over streamed blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from penstock.engine.families.wan.cost import transformer
from penstock.engine.families.wan.spec import TransformerSpec
from penstock.engine.families.wan.stretches import Stretch
from penstock.engine.families.wan.terms import (
    WanCase,
    cached_tensors,
    condition_bytes,
    encoder_state_bytes,
    latent_of,
    latents_bytes,
    pictures_of,
    restored_bytes,
    saved_state_bytes,
)
from penstock.profiles.phases import (
    OBJECTS,
    RESTORED,
    Group,
    MatrixProducts,
    OnePass,
    group_fits,
    group_key,
    loading_s,
)
from penstock.profiles.plan import Items, PhasePlan
from penstock.profiles.policy import RESIDUALS, Limits
from penstock.profiles.streams import (
    LINK_CARE,
    Network,
    Pace,
    Stream,
    best_stream,
    least_streams,
)

log = logging.getLogger(__name__)

CHUNKS = (1 << 16, 1 << 15, 1 << 14, 1 << 13, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2)
"""Tokens a chunk of the DiT forward that are tried, besides "all in one chunk"."""

RESIDUAL_COST = 0.005
"""Of the job's time that hidden states in fp32 may take more, where nothing is said of them. They
take memory, for residents and for larger chunks."""

EVEN_BYTES = 1.05
"""What a step in windows may move, over what a step of one window alone does, and count as no more:
the states of the windows that share a visit take the room of a block or two."""

EVEN_COST = 0.02
"""Of the job's time that a plan may take more under which a step in windows moves no more than
that: smaller chunks, which decode the weights more often, leave room for blocks that stay."""


@dataclass(frozen=True)
class Shape:
    """How the forward is cut: branches a visit, tokens a chunk, the place of cross-attention K/V;
    and what its hidden states are in.

    Attributes:
        work: bytes in VRAM besides weights.
        compute_s: of one pass over all blocks.
        passes: in the whole phase.
        fetched_bytes: cross-attention K/V that all of them fetch.
    """

    cost: transformer.DenoiseCase
    work: Items
    compute_s: float
    passes: int
    fetched_bytes: int

    @property
    def work_bytes(self) -> int:
        """Sum of ``work``."""
        return sum(count for _, count in self.work)

    @property
    def least_seconds(self) -> float:
        """No stream is faster."""
        return self.compute_s * self.passes


def named(phase: str, second: bool) -> str:
    """Return the name of a phase of the one or the other of two transformers."""
    return f"{phase} 2" if second else phase


@dataclass(frozen=True)
class Denoise:
    """The group of context and denoise, which share the non-block weights and the context.

    Attributes:
        case: its steps are those of this transformer.
        second: that for little noise, where there are two.
        stretches: of its steps; none: they are all alike.
        dense_steps: of the job, at its start, whose self-attention is torch's whatever is asked.
    """

    case: WanCase
    second: bool = False
    stretches: tuple[Stretch, ...] = ()
    dense_steps: int = 0

    @property
    def phases(self) -> tuple[str, ...]:
        """As `penstock.profiles.phases.Step`."""
        return named("context", self.second), named("denoise", self.second)

    @property
    def spec(self) -> TransformerSpec:
        """The transformer."""
        manifest = self.case.manifest
        if not self.second:
            return manifest.transformer
        assert manifest.second is not None
        return manifest.second

    def best(self, limits: Limits) -> Group | None:
        """As `penstock.profiles.phases.Step`; hidden states in fp32 may cost `RESIDUAL_COST`, and
        bytes that do not grow with the windows `EVEN_COST`."""
        fastest = self._fastest(limits)
        if fastest is None or self._cost_case().windows == 1:
            return fastest and fastest[1]
        objective, found = fastest
        most = self._even_bytes(limits)
        if most is None or found[1].copied_bytes <= most:
            return found
        even = self._fastest(limits, most, objective * (1 + EVEN_COST))
        log.debug("%s bytes instead of %s: %s", most, found[1].copied_bytes, even)
        return even[1] if even else found

    def _even_bytes(self, limits: Limits) -> int | None:
        """Return the most that the steps may copy and move no more than those of one window alone,
        whose hidden states are in what is best for it."""
        work, policy = self.case.workload, replace(self.case.policy, residual="auto")
        assert work.windows is not None
        shape = replace(work.shape, frames=work.windows.length)
        alone = replace(work, shape=shape, windows=None)
        found = replace(self, case=replace(self.case, workload=alone, policy=policy)).best(limits)
        return None if found is None else int(EVEN_BYTES * found[1].copied_bytes)

    def _fastest(
        self,
        limits: Limits,
        most_copied: float = float("inf"),
        better_than: float = float("inf"),
    ) -> tuple[float, Group] | None:
        """Return the best with hidden states in fp32 where they may be, and its objective
        before."""
        each = [self._best(name, limits, most_copied, better_than) for name in self._residuals]
        narrow, wide = each[0], each[-1]
        if narrow is None or (wide and wide[0] <= narrow[0] * (1 + RESIDUAL_COST)):
            return wide
        return narrow

    @property
    def _residuals(self) -> tuple[str, ...]:
        """What the hidden states may be in, the narrowest first."""
        if self.spec.weights.itemsize == transformer.FP32_BYTES:
            return ("fp32",)
        fixed = self.case.policy.residual
        return RESIDUALS if fixed == "auto" else (fixed,)

    def _best(
        self, residual: str, limits: Limits, most_copied: float, better_than: float
    ) -> tuple[float, Group] | None:
        """Search the shapes by what they compute, until none can win: the best, and its objective
        before.

        Args:
            most_copied: bytes, in the whole phase.
            better_than: objectives above this are none.
        """
        contexts = {away: self._context(away, residual, limits) for away in (True, False)}
        best: Group | None = None
        best_objective = better_than
        for shape in self._shapes:
            if shape.cost.residual != residual:
                continue
            if shape.least_seconds > best_objective:
                break
            context = contexts[not shape.cost.cross_kv_on_device]
            if context is None:
                log.debug("refused, no room for the context: %s", shape.cost)
                continue
            stream = self._stream(shape, limits, most_copied, best_objective - context.seconds)
            if stream is None:
                log.debug("refused, no stream fits or is faster: %s", shape.cost)
                continue
            found = (context, self._phase(shape, stream, limits))
            objective = context.seconds + stream.timing.objective
            if best is None or (objective, group_key(found)) < (best_objective, group_key(best)):
                best, best_objective = found, objective
        return None if best is None else (best_objective, best)

    def _stream(
        self, shape: Shape, limits: Limits, most_copied: float, better_than: float
    ) -> Stream | None:
        rest = self.spec.weights.rest_bytes
        held_vram = shape.work_bytes + rest
        held_ram = sum(count for _, count in self._host_work(shape))
        room = limits.beside(held_vram, held_ram, pins=self.case.pins)
        return best_stream(
            self._network,
            self._pace(shape),
            self.case.rates,
            room,
            from_disk=self.case.policy.disk != "never",
            most_copied=most_copied - shape.fetched_bytes,
            better_than=better_than,
        )

    def _pace(self, shape: Shape) -> Pace:
        # Windows that share a visit cost nothing but memory: fewer visits are better where no time
        # is won by either.
        cares = self.case.policy.disk == "spare" or shape.cost.windows > 1
        care = LINK_CARE if cares else 0.0
        return Pace(shape.compute_s, shape.passes, care)

    @cached_property
    def _network(self) -> Network:
        return Network.of(self.spec.weights.block_bytes)

    def _context(self, away: bool, residual: str, limits: Limits) -> PhasePlan | None:
        if self.case.policy.cross_kv == ("vram" if away else "ram"):
            return None
        fitting = [p for p in self._contexts(away, residual, limits) if group_fits((p,), limits)]
        return min(fitting, key=lambda phase: group_key((phase,)), default=None)

    def _contexts(self, away: bool, residual: str, limits: Limits) -> Iterator[PhasePlan]:
        spec, base = self.spec, self._cost_case()
        case = replace(base, cross_kv_on_device=not away, residual=residual)
        if case.contrasted:  # both texts' are made as those of two branches are
            case = replace(case, branches=2 * case.branches, contrasted=False)
        found = OnePass(
            self.phases[0],
            self.case,
            Network.of(spec.cross_block_bytes, resident=False),
            spec.weights.rest_bytes,
            (
                *transformer.context_bytes(spec, case).told,
                *self._sampled(case),
                *self._products.items(spec.context_storage or spec.storage),
                *self.case.libraries(),
            ),
            (*self._host_kept(case), *self._saved(RESTORED, restored_bytes)),
            transformer.context_flops(spec, case),
            visits=case.branches * spec.num_layers,
            rest_stays=True,
        )
        for phase in found.shapes(limits):
            yield replace(phase, cross_kv_on_device=not away)

    def _sampled(self, case: transformer.DenoiseCase) -> Items:
        """Return what the steps before have left: there are some before the second
        transformer's."""
        if not self.second:
            return ()
        return (("sampler state", transformer.sampler_state_bytes(self.spec, case)),)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: the smallest chunk, rings of one, and residents in at most one memory. Bytes
        alone are asked of these: their streams are not timed."""
        least = self._residuals[0]
        for shape in self._shapes:
            if (shape.cost.residual, shape.cost.chunk_tokens) != (least, min(self._chunks)):
                continue
            context = min(
                self._contexts(not shape.cost.cross_kv_on_device, least, limits),
                key=lambda phase: phase.vram_bytes + phase.ram_bytes,
            )
            for stream in least_streams(self._network, from_disk=self.case.policy.disk != "never"):
                yield context, self._phase(shape, stream, limits)

    @property
    def _chunks(self) -> tuple[int, ...]:
        tokens = transformer.grid_tokens(self.spec, self._cost_case().latent)
        fixed = self.case.policy.chunk_tokens
        if self.case.policy.attending.backend.whole:
            return (tokens,)
        if fixed is not None:
            return (min(fixed, tokens),)
        return (tokens, *(chunk for chunk in CHUNKS if chunk < tokens))

    def _cost_case(self) -> transformer.DenoiseCase:
        manifest, workload, whole = self.case.manifest, self.case.workload, latent_of(self.case)
        frames, windows = whole[0], 1
        if workload.windows is not None:
            cut = workload.windows.latent(manifest.vae.temporal_factor)
            frames, windows = min(cut.length, whole[0]), len(cut.starts(whole[0]))
        return transformer.DenoiseCase(
            latent=(frames, *whole[1:]),
            windows=windows,
            frames=whole[0],
            chunk_tokens=1,
            branches=workload.branches,
            visit_branches=workload.branches,
            steps=workload.steps,
            image_tokens=manifest.image_tokens,
            fused_norms=self.case.fused_norms,
            attention=self.case.policy.attending.kind,
            cached_latents=cached_tensors(self.case),
            contrasted=workload.contrasted,
            still=manifest.tokenwise and pictures_of(self.case) > 0,
        )

    @cached_property
    def _shapes(self) -> tuple[Shape, ...]:
        """All ways to cut the forward, the fastest first."""
        policy = self.case.policy
        places = {"auto": (True, False), "vram": (True,), "ram": (False,)}[policy.cross_kv]
        base = self._cost_case()
        shapes = [
            self._shape(
                replace(
                    base,
                    chunk_tokens=chunk,
                    visit_branches=visit,
                    residual=residual,
                    cross_kv_on_device=place,
                )
            )
            for residual in self._residuals
            for visit in self._visits(base)
            for chunk in self._chunks
            for place in places
        ]
        return tuple(sorted(shapes, key=lambda shape: (shape.least_seconds, shape.work_bytes)))

    def _visits(self, cost: transformer.DenoiseCase) -> tuple[int, ...]:
        """Return how many branches may share a visit: those of as many windows as make one pass
        fewer; or one at a time. What is asked for is of each window."""
        fixed, branches = self.case.policy.branches, cost.branches
        if fixed == 1:
            return (1,)
        windows = {-(-cost.windows // passes) for passes in range(1, cost.windows + 1)}
        together = sorted((branches * count for count in windows), reverse=True)
        alone = (1,) if fixed is None and branches > 1 else ()
        return (*together, *alone)

    def _shape(self, cost: transformer.DenoiseCase) -> Shape:
        work = (
            *transformer.denoise_bytes(self.spec, cost).told,
            *self._products.items(),
            *self.case.libraries(),
        )
        kinds = self._kinds(cost)
        passes = sum(count for count, _ in kinds)
        compute_s, *others = (self._compute_s(each) for _, each in kinds)
        if others:  # the mean: what a pass of both branches waits less for, one of one waits more
            each_s = zip(kinds, (compute_s, *others), strict=True)
            compute_s = sum(count * seconds for (count, _), seconds in each_s) / passes
        fetched = sum(count * self._fetched_bytes(each) for count, each in kinds)
        return Shape(cost, work, compute_s, passes, fetched)

    def _kinds(self, cost: transformer.DenoiseCase) -> list[tuple[int, transformer.DenoiseCase]]:
        """Return passes of the steps with each number of branches, as cost."""
        found: dict[int, int] = {}
        for each in self._stretches:
            found[each.branches] = found.get(each.branches, 0) + each.forwards[1]
        cases = [(count, replace(cost, branches=branches)) for branches, count in found.items()]
        return [(count * case.passes, case) for count, case in cases]

    @property
    def _stretches(self) -> tuple[Stretch, ...]:
        work = self.case.workload
        alike = Stretch(range(work.steps), work.branches, self.case.policy.caching)
        return self.stretches or (alike,)

    @property
    def _forwards(self) -> tuple[int, int]:
        fewest, most = zip(*(each.forwards for each in self._stretches), strict=True)
        return sum(fewest), sum(most)

    @cached_property
    def _products(self) -> MatrixProducts:
        spec, case = self.spec, self.case
        return MatrixProducts(spec.storage, max(spec.weights.block_bytes), case.policy, case.rates)

    def _compute_s(self, cost: transformer.DenoiseCase) -> float:
        """Return the seconds of one pass over all blocks, fetching cross-attention K/V included."""
        spec, rates = self.spec, self.case.rates
        tokens = transformer.grid_tokens(spec, cost.latent)
        chunks = -(-tokens // cost.chunk_tokens) * spec.num_layers
        texts = cost.branch_text_tokens
        flops = transformer.denoise_flops(spec, tokens, cost.image_tokens, texts)
        attended = (tokens + texts + cost.image_tokens) * spec.inner_dim
        word = self.case.policy.attention
        chunk_s = (
            rates.chunk_overhead_s(cost.chunk_tokens, attended)
            + self._products.decode_s
            + rates.requantise_s(word, tokens * spec.inner_dim, spec.weights.itemsize)
        )
        branch = (
            flops.linear / self._products.flops_per_s
            + flops.self_attention * rates.self_attention_s(word, self._dense)
            + flops.cross_attention / (rates.attention_flops or rates.flops)
            + chunks * chunk_s
            + tokens * spec.inner_dim * spec.num_layers * rates.element_s
        )
        fetched_s = self._fetched_bytes(cost) / rates.copy_bytes_per_s
        return branch * cost.windows * cost.branches / cost.passes + fetched_s

    @property
    def _dense(self) -> float:
        """The share of the steps to which torch attends, whatever is asked."""
        steps = [step for each in self._stretches for step in each.steps]
        return sum(step < self.dense_steps for step in steps) / len(steps)

    def _fetched_bytes(self, cost: transformer.DenoiseCase) -> int:
        """Return the cross-attention K/V that one pass fetches: a branch's serve all windows of a
        visit."""
        if cost.cross_kv_on_device:
            return 0
        one = transformer.cross_kv_bytes(self.spec, replace(cost, branches=1))
        return one * min(cost.visit_branches, cost.branches)

    def _host_kept(self, cost: transformer.DenoiseCase) -> Items:
        return (
            ("encoder states", encoder_state_bytes(self.case)),
            ("condition", condition_bytes(self.case)),
            *(
                ()
                if cost.cross_kv_on_device
                else (("cross-attention K/V", transformer.cross_kv_bytes(self.spec, cost)),)
            ),
            OBJECTS,
        )

    def _host_work(self, shape: Shape) -> Items:
        return (
            *self._host_kept(shape.cost),
            ("latents", latents_bytes(self.case)),
            *self._saved("saved state", saved_state_bytes),
        )

    def _saved(self, label: str, bytes_of: Callable[[WanCase], int]) -> Items:
        return ((label, bytes_of(self.case)),) if self.case.workload.saved else ()

    def _phase(self, shape: Shape, stream: Stream, limits: Limits) -> PhasePlan:
        spec, cost, place = self.spec, shape.cost, stream.placement
        held = self._host_work(shape)
        room = limits.ram_bytes - sum(count for _, count in held)
        return PhasePlan(
            self.phases[1],
            weights=(("non-block weights", spec.weights.rest_bytes), *stream.device_items),
            work=shape.work,
            ram_weights=stream.host_items(room),
            ram_work=held,
            stream=stream.plan,
            chunk_tokens=cost.chunk_tokens,
            branches=cost.visit_branches,
            windows=cost.windows,
            residual=cost.residual,
            cross_kv_on_device=cost.cross_kv_on_device,
            forwards=self._forwards,
            pinned_bytes=stream.pinned_bytes if self.case.pins else 0,
            read_bytes=place.device_bytes + place.host_bytes + shape.passes * place.read_bytes,
            copied_bytes=place.device_bytes
            + shape.passes * place.copied_bytes
            + shape.fetched_bytes,
            seconds=stream.timing.seconds + loading_s(spec.weights.rest_bytes, self.case.rates),
            bound=stream.timing.bound,
            facts=_told(cost, self._stretches, inside=self.case.workload.guided_within is not None),
        )


def _told(
    cost: transformer.DenoiseCase, stretches: Sequence[Stretch], *, inside: bool
) -> tuple[str, ...]:
    """Return how the forward pass is cut, for people.

    Args:
        inside: guidance was asked for inside an interval of noise levels.
    """
    passes, together = cost.branches * cost.windows, cost.visit_branches
    told = [f"{cost.chunk_tokens:,} tokens a chunk"]
    if cost.windows > 1:
        told.append(f"{cost.windows} windows a step")
    steps = sum(len(each.steps) for each in stretches)
    if cost.branches == 1 and inside:
        told.append(f"classifier-free guidance in none of {steps} steps")
    if cost.branches > 1:
        guided = sum(len(each.steps) for each in stretches if each.branches > 1)
        when = "on" if guided == steps else f"in {guided} of {steps} steps"
        told.append(f"classifier-free guidance {when} (two forward passes)")
    if passes > 1 and together == 1:
        told.append(f"each of a step's {passes} forward passes visits the blocks by itself")
    elif passes > 1:
        shared = "all" if together >= passes else str(together)
        told.append(f"{shared} of a step's {passes} forward passes share each visit of a block")
    told.append(f"cross-attention K/V in {'VRAM' if cost.cross_kv_on_device else 'RAM'}")
    return tuple(told)
