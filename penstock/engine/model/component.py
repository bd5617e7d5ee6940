"""One network of a model: the layout of its weights, and its skeleton. No weights are read.

A skeleton lies on the meta device (the class and the parameter names of diffusers or transformers,
with a single block; built when a job needs it); the places of its tensors are one layout for all
that is not in a block, and one per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.engine.files.formats import compute_tag, linear_formats
from penstock.engine.files.keys import ComponentSource
from penstock.engine.lora.place import LoraPart, PlacedLoras
from penstock.engine.model.adapters import Adapter, adapters_of, read_table_rows
from penstock.engine.model.skeleton import Formats, Skeleton
from penstock.engine.model.storage import Matrices, block_format, storage_of
from penstock.engine.packs.checked import Packs
from penstock.formats.formats import plain_format
from penstock.formats.patched import Patched
from penstock.formats.tags import ITEM_BYTES
from penstock.offload.checkpoint import Checkpoint, TensorEntry, torch_dtype
from penstock.offload.layout import BlockLayout
from penstock.profiles.manifest import Storage, Weights
from penstock.quant.paths import Computing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Component:
    """One network: its skeleton and the places of its weights.

    Attributes:
        name: what it is called in plans and reports.
        config: the network's, gaps filled with the defaults of its class.
        skeleton: the network on the meta device, with one block; ours to bind tensors to.
        prefix: of the names of the blocks' tensors, up to the number.
        rest: everything outside the blocks.
        blocks: one layout a block.
        cross: the cross-attention K/V projections of each block, which leave the stream (DiT).
        tag: safetensors tag of the dtype it computes in.
        formats: of the quantised linears of each block.
        adapters: what makes odd tensors fit: first outside the blocks, then block by block.
        source: where it comes from.
        packs: those that hold it; every block of theirs is verified as it is read.
        loras: what LoRAs add, outside the blocks and then block by block; empty without LoRAs.
    """

    name: str
    config: Mapping[str, Any]
    skeleton: Skeleton
    prefix: str
    checkpoint: Checkpoint
    rest: BlockLayout
    blocks: tuple[BlockLayout, ...]
    cross: tuple[BlockLayout, ...]
    tag: str
    formats: tuple[Formats, ...]
    adapters: tuple[Adapter, ...]
    source: ComponentSource
    packs: Packs
    loras: tuple[LoraPart, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in."""
        return torch_dtype(self.tag)

    @property
    def module(self) -> Any:
        """The network on the meta device; built now, if this is its first use."""
        return self.skeleton.module

    @property
    def templates(self) -> tuple[Any, ...]:
        """The block module of each block; blocks stored alike share one (empty: no blocks)."""
        return self.skeleton.templates

    def weights(self, device: str) -> Weights:
        """Return the bytes of it, for the planner: as stored, and what adapting the rest takes
        besides on a device of the type ``device`` ("cpu", "cuda")."""
        return Weights(
            rest_bytes=self.rest.nbytes + self.made_bytes(device),
            block_bytes=tuple(layout.nbytes for layout in self.blocks),
            itemsize=ITEM_BYTES[self.tag],
        )

    def made_bytes(self, device: str, place: int = 0) -> int:
        """Return what binding makes besides the stored tensors: outside the blocks, or in the block
        ``place - 1``."""
        added = self.loras[place].nbytes(device) if self.loras else 0
        return self.adapters[place].peak_bytes(device) + added

    def storage(
        self, computing: Computing, part: Callable[[str], bool] = lambda name: True
    ) -> Storage:
        """Return what the quantised linears of the blocks take besides their bytes, and the block
        tensors that are cast; of those linears whose local name ``part`` holds of."""
        device, places = computing.scratch.device_type, range(1, len(self.adapters))
        cast = max((self.made_bytes(device, place) for place in places), default=0)
        blocks = (self._matrices(index, part) for index in range(len(self.blocks)))
        return storage_of(block_format(self.source), blocks, computing, self.tag, cast)

    def _matrices(self, index: int, part: Callable[[str], bool]) -> Matrices:
        shapes, start = self.source.shapes, f"{self.prefix}{index}."
        linears = {
            f"{start}{name}.weight": fmt
            for name, fmt in self.formats[index].items()
            if part(f"{name}.")
        }
        return [(fmt, (shapes[name][0], shapes[name][1])) for name, fmt in linears.items()]

    def install(self, computing: Computing) -> None:
        """Let the quantised linears and the LoRAs of the block modules compute so."""
        self.skeleton.install(computing)

    @contextmanager
    def bound(self, tensors: Mapping[str, Tensor], index: int | None = None) -> Iterator[Any]:
        """Provide the block ``index`` (None: the network) with its streamed ``tensors`` bound
        inside."""
        from penstock.engine.model.binding import bound

        place = 0 if index is None else index + 1
        module = self.module if index is None else self.templates[index]
        tensors = self.adapters[place](tensors)
        with bound(module, self.loras[place](tensors) if self.loras else tensors):
            yield module

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return the rows of a table, in `dtype`, on the CPU; nothing else is kept. A table in a
        pack is read as a whole once, for its checksum.

        Raises:
            CheckpointError: the table is damaged, or no format reads it.
        """
        for entry in self.source.weights[name].tensors.values():
            self.packs.verify(entry)
        return read_table_rows(self.source, self.checkpoint, name, rows, self.dtype)


def component_of(
    source: ComponentSource,
    *,
    only: tuple[str, ...] = ("",),
    name: str | None = None,
    loras: PlacedLoras | None = None,
) -> Component:
    """Return the network that ``source`` holds.

    Args:
        only: what begins the names of the tensors outside the blocks that belong to it.
        name: in plans; None: that of its kind.
        loras: applied beside its weights.

    Raises:
        CheckpointError: a storage that no format reads.
    """
    kind, config = source.kind, {**source.kind.defaults, **source.config}
    prefix, count = kind.blocks, kind.count(config)
    loras = loras or PlacedLoras(source, (), ())
    entries = source.entries() | loras.entries()
    groups = [
        {key: entry for key, entry in entries.items() if _in_rest(key, prefix, only)},
        *(_local(entries, f"{prefix}{index}.") for index in range(count)),
    ]
    blocks = [_split(group, kind.leaves_stream) for group in groups[1:]]
    packs = Packs.of(source.raw)
    tag = compute_tag(source)
    parts = loras.parts(prefix, count, tag)
    formats = _patched(_local_formats(linear_formats(source), prefix, count), parts[1:], tag)
    return Component(
        name=name or source.component,
        config=config,
        skeleton=Skeleton(
            source.family.build,
            source.component,
            source.config,
            formats,
            [part.deltas for part in parts],
            tag,
        ),
        prefix=prefix,
        checkpoint=Checkpoint(source.raw.path, entries, {**source.raw.stamps, **loras.stamps}, {}),
        rest=packs.checked(BlockLayout.from_entries(groups[0])),
        blocks=tuple(packs.checked(BlockLayout.from_entries(part)) for part, _ in blocks),
        cross=tuple(packs.checked(BlockLayout.from_entries(part)) for _, part in blocks if part),
        tag=tag,
        formats=formats,
        adapters=adapters_of(source, prefix, count, only, tag),
        source=source,
        packs=packs,
        loras=parts,
    )


def _in_rest(key: str, prefix: str, only: tuple[str, ...]) -> bool:
    """Return whether a tensor is loaded with the network itself (the embedding is gathered by
    rows)."""
    in_block = bool(prefix) and key.startswith(prefix)
    return not in_block and not key.startswith("shared.") and key.startswith(only)


def _local(entries: Mapping[str, TensorEntry], prefix: str) -> dict[str, TensorEntry]:
    return {key[len(prefix) :]: e for key, e in entries.items() if key.startswith(prefix)}


def _split(
    group: Mapping[str, TensorEntry], leaves: Callable[[str], bool]
) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    streamed = {key: entry for key, entry in group.items() if not leaves(key)}
    return streamed, {key: entry for key, entry in group.items() if leaves(key)}


def _patched(
    formats: tuple[Formats, ...], parts: Sequence[LoraPart], tag: str
) -> tuple[Formats, ...]:
    """Return ``formats`` of the blocks, with the LoRAs that change a weight as it is decoded."""
    if not parts:
        return formats
    plain = plain_format(tag)
    return tuple(
        {
            **known,
            **{
                name: Patched(known.get(name, plain), patches)
                for name, patches in part.patches.items()
            },
        }
        for known, part in zip(formats, parts, strict=True)
    )


def _local_formats(formats: Formats, prefix: str, count: int) -> tuple[Formats, ...]:
    """Return the formats of each block's quantised linears under their local names.

    Outside the blocks nothing stays quantised: those layers are few, and errors there reach every
    token; their adapter decodes them when they are loaded.
    """
    starts = [f"{prefix}{index}." for index in range(count)]
    return tuple(
        {name[len(start) :]: fmt for name, fmt in formats.items() if name.startswith(start)}
        for start in starts
    )
