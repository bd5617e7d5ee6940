"""What computing with the stored matrices of a network takes besides their bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from penstock.engine.files.keys import ComponentSource
from penstock.formats.formats import QuantFormat
from penstock.formats.rows import Shape
from penstock.formats.tags import ITEM_BYTES
from penstock.profiles.manifest import ComputePath, Storage
from penstock.quant.paths import Computing, scratch_bytes
from penstock.quant.policy import default_policy

Matrices = Sequence[tuple[QuantFormat, Shape]]
"""The quantised matrices of one block."""


def block_format(source: ComponentSource) -> str:
    """Return the format in which most parameters of a transformer's block matrices are stored; for
    other networks, most of all parameters."""
    names = default_policy(source.shapes) if source.kind.is_packed else ()
    counts: Counter[str] = Counter()
    for name in names:
        if name in source.weights:
            counts[source.weights[name].label] += math.prod(source.shapes[name])
    label = counts.most_common(1)[0][0] if counts else source.label()
    return label.partition(" ")[0]


def storage_of(
    name: str, blocks: Iterable[Matrices], computing: Computing, tag: str, cast_bytes: int
) -> Storage:
    """Return the planner's view of a network's quantised matrices.

    Args:
        name: of the format.
        blocks: the matrices of each block.
        computing: says which path each takes, and on which device.
        tag: safetensors tag of the compute dtype.
        cast_bytes: other tensors of a block that are cast or decoded for a visit.
    """
    blocks = list(blocks)
    matrices = [matrix for block in blocks for matrix in block]
    decoded = [each for each in matrices if computing.path_for(*each) == "dequant"]
    multiplied = [each for each in matrices if computing.path_for(*each) != "dequant"]
    return Storage(
        format=name,
        scratch_bytes=scratch_bytes(decoded, tag),
        workspace_bytes=_most_workspace(decoded, computing),
        decoded_bytes=max((_decoded_bytes(block, computing, tag) for block in blocks), default=0),
        eight_bit_bytes=_most_workspace(multiplied, computing),
        cast_bytes=cast_bytes,
        path=_path_of_most(matrices, computing),
    )


def _most_workspace(matrices: Matrices, computing: Computing) -> int:
    return max((computing.workspace_bytes(*each) for each in set(matrices)), default=0)


def _decoded_bytes(block: Matrices, computing: Computing, tag: str) -> int:
    return sum(
        rows * columns * ITEM_BYTES[tag]
        for fmt, (rows, columns) in block
        if computing.path_for(fmt, (rows, columns)) == "dequant"
    )


def _path_of_most(matrices: Matrices, computing: Computing) -> ComputePath:
    counts: Counter[ComputePath] = Counter()
    for fmt, shape in matrices:
        counts[computing.path_for(fmt, shape)] += math.prod(shape)
    return counts.most_common(1)[0][0] if counts else "plain"
