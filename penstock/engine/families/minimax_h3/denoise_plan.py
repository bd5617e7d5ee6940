"""The transformer's two phases: what is made once a job, and the steps over streamed blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from penstock.engine.families.minimax_h3 import cost
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.engine.families.minimax_h3.terms import (
    H3Case,
    condition_bytes,
    evaluations,
    latents_bytes,
    packed_case,
    places_bytes,
    restored_bytes,
    saved_state_bytes,
    state_bytes,
    tables_bytes,
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
from penstock.profiles.policy import Limits
from penstock.profiles.streams import (
    LINK_CARE,
    Network,
    Pace,
    Stream,
    best_stream,
    least_streams,
)

log = logging.getLogger(__name__)

CONTEXT, DENOISE = "context", "denoise"

CHUNKS = (1 << 16, 1 << 15, 1 << 14, 1 << 13, 4096, 2048, 1024, 512, 256, 128, 64, 32)
"""Rows a chunk that are tried, besides all of them in one."""


@dataclass(frozen=True)
class Cut:
    """How the forward is cut.

    Attributes:
        chunk_rows: rows of a chunk.
        work: bytes in VRAM besides weights.
        compute_s: of one pass over all blocks.
    """

    chunk_rows: int
    work: Items
    compute_s: float

    @property
    def work_bytes(self) -> int:
        """Sum of ``work``."""
        return sum(count for _, count in self.work)


@dataclass(frozen=True)
class DenoisePacked:
    """The group of what is made once, and the steps that need it."""

    case: H3Case

    @property
    def phases(self) -> tuple[str, ...]:
        """As `penstock.profiles.phases.Step`."""
        return CONTEXT, DENOISE

    @property
    def spec(self) -> PackedSpec:
        """The transformer."""
        return self.case.manifest.transformer

    def best(self, limits: Limits) -> Group | None:
        """As `penstock.profiles.phases.Step`: ways to cut by what they compute, until none can
        win."""
        context = self._once(limits)
        if context is None:
            return None
        best: Group | None = None
        objective = float("inf")
        for cut in self._cuts:
            if cut.compute_s * self._forwards[1] > objective:
                break
            stream = self._stream(cut, limits, objective)
            if stream is None:
                log.debug("refused, no stream fits or is faster: %s", cut)
                continue
            found = (context, self._phase(cut, stream, limits))
            reached = stream.timing.objective
            if best is None or (reached, group_key(found)) < (objective, group_key(best)):
                best, objective = found, reached
        return best

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: the smallest chunk, rings of one, and residents in at most one memory."""
        context = min(
            self._once_shapes(limits), key=lambda phase: phase.vram_bytes + phase.ram_bytes
        )
        least = min(self._cuts, key=lambda cut: cut.chunk_rows)
        for stream in least_streams(self._network, from_disk=self.case.policy.disk != "never"):
            yield context, self._phase(least, stream, limits)

    def _once(self, limits: Limits) -> PhasePlan | None:
        fitting = [phase for phase in self._once_shapes(limits) if group_fits((phase,), limits)]
        return min(fitting, key=lambda phase: group_key((phase,)), default=None)

    def _once_shapes(self, limits: Limits) -> Iterator[PhasePlan]:
        spec, case = self.spec, packed_case(self.case)
        steps = evaluations(self.case)
        saved = ((RESTORED, restored_bytes(self.case)),) if self.case.workload.saved else ()
        once = OnePass(
            CONTEXT,
            self.case,
            Network.of(spec.table_block_bytes, resident=False),
            spec.once_bytes,
            (
                ("latents", latents_bytes(self.case)),
                *cost.once_items(spec, case, steps),
                *self._products.items(spec.table_storage),
                *self.case.libraries(),
            ),
            (*self._host_kept, *saved),
            cost.once_flops(spec, case, steps),
            visits=steps * spec.num_layers,
        )
        return once.shapes(limits)

    def _stream(self, cut: Cut, limits: Limits, better_than: float) -> Stream | None:
        held_vram = cut.work_bytes + self.spec.weights.rest_bytes
        held_ram = sum(count for _, count in self._host_work)
        room = limits.beside(held_vram, held_ram, pins=self.case.pins)
        care = LINK_CARE if self.case.policy.disk == "spare" else 0.0
        return best_stream(
            self._network,
            Pace(cut.compute_s, self._forwards[1], care),
            self.case.rates,
            room,
            from_disk=self.case.policy.disk != "never",
            better_than=better_than,
        )

    @cached_property
    def _network(self) -> Network:
        return Network.of(self.spec.weights.block_bytes)

    @cached_property
    def _cuts(self) -> tuple[Cut, ...]:
        """All ways to cut the forward, the fastest first."""
        rows, fixed = packed_case(self.case).rows, self.case.policy.chunk_tokens
        sizes = (rows, *(chunk for chunk in CHUNKS if chunk < rows))
        if self.case.policy.attending.backend.whole:
            sizes = (rows,)
        elif fixed is not None:
            sizes = (min(fixed, rows),)
        cuts = [self._cut(chunk) for chunk in sizes]
        return tuple(sorted(cuts, key=lambda cut: (cut.compute_s, cut.work_bytes)))

    def _cut(self, chunk: int) -> Cut:
        work = (
            *cost.denoise_items(self.spec, packed_case(self.case, chunk)),
            *self._products.items(),
            *self.case.libraries(),
        )
        return Cut(chunk, work, self._compute_s(chunk))

    @property
    def _forwards(self) -> tuple[int, int]:
        return self.case.policy.caching.forwards(evaluations(self.case))

    @cached_property
    def _products(self) -> MatrixProducts:
        spec, case = self.spec, self.case
        return MatrixProducts(spec.storage, max(spec.weights.block_bytes), case.policy, case.rates)

    def _compute_s(self, chunk: int) -> float:
        """Return the seconds of one pass over all blocks."""
        spec, rates = self.spec, self.case.rates
        case = packed_case(self.case, chunk)
        flops = cost.pass_flops(spec, case)
        chunks = -(-case.rows // chunk) * spec.num_layers
        word, steps = self.case.policy.attention, evaluations(self.case)
        dense = self.case.policy.attending.dense_steps(steps) / steps
        chunk_s = (
            rates.chunk_overhead_s(chunk, case.rows * spec.inner_dim)
            + self._products.decode_s
            + rates.requantise_s(word, case.rows * spec.inner_dim, spec.weights.itemsize)
        )
        return (
            flops.linear / self._products.flops_per_s
            + flops.attention * rates.self_attention_s(word, dense)
            + chunks * chunk_s
            + case.rows * spec.hidden_size * spec.num_layers * rates.element_s
        )

    @property
    def _host_kept(self) -> Items:
        return (
            ("text states", state_bytes(self.case)),
            ("condition", condition_bytes(self.case)),
            ("AdaLN tables", tables_bytes(self.case)),
            OBJECTS,
        )

    @property
    def _host_work(self) -> Items:
        saved = (("saved state", saved_state_bytes(self.case)),)
        return (
            *self._host_kept,
            ("latents", latents_bytes(self.case)),
            ("places", places_bytes(self.case)),
            *(saved if self.case.workload.saved else ()),
        )

    def _phase(self, cut: Cut, stream: Stream, limits: Limits) -> PhasePlan:
        spec, place, passes = self.spec, stream.placement, self._forwards[1]
        room = limits.ram_bytes - sum(count for _, count in self._host_work)
        tables = spec.table_bytes(packed_case(self.case).timesteps)
        return PhasePlan(
            DENOISE,
            weights=(("non-block weights", spec.weights.rest_bytes), *stream.device_items),
            work=cut.work,
            ram_weights=stream.host_items(room),
            ram_work=self._host_work,
            stream=stream.plan,
            chunk_tokens=cut.chunk_rows,
            branches=1,
            residual="fp32" if spec.weights.itemsize == cost.FP32_BYTES else "bf16",
            forwards=self._forwards,
            pinned_bytes=stream.pinned_bytes if self.case.pins else 0,
            read_bytes=place.device_bytes + place.host_bytes + passes * place.read_bytes,
            copied_bytes=place.device_bytes + passes * (place.copied_bytes + tables),
            seconds=stream.timing.seconds + loading_s(spec.weights.rest_bytes, self.case.rates),
            bound=stream.timing.bound,
            facts=(
                f"{cut.chunk_rows:,} tokens a chunk",
                "one forward pass a step, over text, pictures, video and sound together",
                "AdaLN tables of all steps in RAM",
            ),
        )
