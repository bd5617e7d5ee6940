"""Bytes of tensors that no file holds: true shapes in a weight format, for descriptions without
files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod

from penstock.blocks import PAGE_BYTES, TENSOR_ALIGNMENT
from penstock.formats.formats import get_format, spec_bytes
from penstock.formats.tags import ITEM_BYTES
from penstock.profiles.manifest import Storage
from penstock.units import align_up

Shapes = Mapping[str, tuple[int, ...]]


def plain_run(shapes: Shapes, tag: str = "BF16") -> int:
    """Return one aligned run of tensors in the dtype ``tag``."""
    return _run(prod(shape) * ITEM_BYTES[tag] for shape in shapes.values())


def stored_run(shapes: Shapes, weight_format: str) -> int:
    """Return one aligned run of tensors in bf16 but its matrices, which are in ``weight_format``.

    Raises:
        ProfileError: no such format.
    """
    stored = get_format(weight_format)
    sizes: list[int] = []
    for shape in shapes.values():
        if len(shape) == 2:
            sizes += map(spec_bytes, stored.storage((shape[0], shape[1]), "BF16").values())
        else:
            sizes.append(prod(shape) * ITEM_BYTES["BF16"])
    return _run(sizes)


def stored_storage(shapes: Shapes, weight_format: str) -> Storage:
    """Return what computing with the matrices among ``shapes``, stored so, takes besides their
    bytes.

    Raises:
        ProfileError: no such format.
    """
    stored = get_format(weight_format)
    matrices = [(shape[0], shape[1]) for shape in shapes.values() if len(shape) == 2]
    sizes = [rows * columns * ITEM_BYTES["BF16"] for rows, columns in matrices]
    if stored.plain:
        cast = 0 if stored == get_format("bf16") else sum(sizes)
        return Storage(stored.name, cast_bytes=cast)
    return Storage(
        format=stored.name,
        scratch_bytes=max(sizes),
        workspace_bytes=max(stored.workspace_bytes(shape, "cuda") for shape in matrices),
        decoded_bytes=sum(sizes),
    )


def _run(tensors: Iterable[int]) -> int:
    return align_up(sum(align_up(count, TENSOR_ALIGNMENT) for count in tensors), PAGE_BYTES)


def typed_run(shapes: Shapes, single: Callable[[str], bool]) -> int:
    """Return one aligned run of tensors in bf16 but those whose names ``single`` holds of, in
    fp32."""
    tags = {name: "F32" if single(name) else "BF16" for name in shapes}
    return _run(prod(shape) * ITEM_BYTES[tags[name]] for name, shape in shapes.items())
