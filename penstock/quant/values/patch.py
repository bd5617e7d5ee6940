"""The arithmetic of `penstock.formats.patch`: in fp32, by slices, rounded once into the weight.

A magnitude is that of the changed weight, as the trainers (LyCORIS, PEFT) have it; ComfyUI divides
by the unchanged weight's where it lies along the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from penstock.formats.patch import MAGNITUDE, Patch
from penstock.formats.rows import row_slices

_Tensors: TypeAlias = Mapping[str, Tensor]
_Change: TypeAlias = Callable[[slice, Tensor], Tensor]
"""From rows and their fp32 values to what is added to them at strength 1."""


def apply(patch: Patch, weight: Tensor, tensors: _Tensors, first: int = 0) -> None:
    """Change ``weight`` in place.

    Args:
        weight: (rows, columns), of any floating-point type.
        tensors: by role; as stored.
        first: the weight holds the rows from this one on, and so do "diff" and "set".
    """
    if patch.turned:
        up = tensors["up"]
        tensors = {**tensors, "up": up.roll(len(up) // 2, 0)}
    if patch.kind == "set":
        weight.copy_(tensors["set"].reshape(weight.shape))
    elif patch.is_rotation:
        _turn(patch, weight, _fp32(tensors))
    else:
        _add(patch, weight, tensors, first)


def _add(patch: Patch, weight: Tensor, tensors: _Tensors, first: int) -> None:
    rows, columns = weight.shape
    change = _CHANGES[patch.kind](patch, tensors, columns)
    magnitude = _magnitude(patch, tensors, weight, change)
    for part in row_slices(rows, columns, weight.device.type):
        values = weight[part].to(torch.float32, copy=True)
        place = slice(part.start + first, part.stop + first)
        changed = change(part if patch.kind == "diff" else place, values)
        if magnitude is not None:
            changed.add_(values)
            changed.mul_(magnitude(place, changed)).sub_(values)
        weight[part].copy_(values.add_(changed, alpha=patch.strength))


def _magnitude(
    patch: Patch, tensors: _Tensors, weight: Tensor, change: _Change
) -> Callable[[slice, Tensor], Tensor] | None:
    """Return what the rows of a changed weight are multiplied by; None without a magnitude."""
    if MAGNITUDE not in tensors:
        return None
    magnitude = tensors[MAGNITUDE].float()
    tiny = torch.finfo(torch.float32).eps
    if not patch.by_rows:
        # Norms of columns need all rows: one pass of slices adds up squares, the next one scales.
        squares = torch.zeros(1, weight.shape[1], device=weight.device)
        for part in row_slices(len(weight), weight.shape[1], weight.device.type):
            values = weight[part].to(torch.float32, copy=True)
            values.add_(change(part, values))
            squares.add_(values.square_().sum(0, keepdim=True))
        by_column = magnitude.reshape(1, -1) / squares.sqrt_().add_(tiny)
        return lambda rows, changed: by_column
    by_row = magnitude.reshape(-1, 1)
    return lambda rows, changed: (
        by_row[rows] / torch.linalg.vector_norm(changed, dim=1, keepdim=True).add_(tiny)
    )


def _fp32(tensors: _Tensors) -> dict[str, Tensor]:
    return {role: tensor.float() for role, tensor in tensors.items()}


def _lora(patch: Patch, tensors: _Tensors, columns: int) -> _Change:
    # A pair for more input channels than there are: those beyond are fed zeros, and so left out.
    up, down = (tensors[role].float().flatten(1) for role in ("up", "down"))
    down = down[:, :columns]
    return lambda rows, values: (up[rows] @ down).mul_(patch.scale)


def _diff(patch: Patch, tensors: _Tensors, columns: int) -> _Change:
    diff = next(iter(tensors.values())).reshape(-1, columns)
    return lambda rows, values: diff[rows].to(torch.float32, copy=True)


def _loha(patch: Patch, tensors: _Tensors, columns: int) -> _Change:
    t = _fp32(tensors)
    return lambda rows, values: (
        (t["w1_a"][rows] @ t["w1_b"]).mul_(t["w2_a"][rows] @ t["w2_b"]).mul_(patch.scale)
    )


def _lokr(patch: Patch, tensors: _Tensors, columns: int) -> _Change:
    t = _fp32(tensors)
    w1, w2 = (t[w] if w in t else t[f"{w}_a"] @ t[f"{w}_b"] for w in ("w1", "w2"))
    w2 = w2.flatten(1)
    height = len(w2)

    def change(rows: slice, values: Tensor) -> Tensor:
        number = torch.arange(rows.start, rows.stop, device=w1.device)
        # Row r of kron(w1, w2) is kron(w1[r // h], w2[r % h]), h the rows of w2: only the rows of
        # this slice are made, never the whole product.
        left, right = w1[number // height], w2[number % height]
        return (left[:, :, None] * right[:, None, :]).view(-1, columns).mul_(patch.scale)

    return change


def _glora(patch: Patch, tensors: _Tensors, columns: int) -> _Change:
    t = _fp32(tensors)
    return lambda rows, values: (
        (values @ t["a1"] @ t["a2"]).addmm_(t["b1"][rows], t["b2"]).mul_(patch.scale)
    )


_CHANGES: Mapping[str, Callable[[Patch, _Tensors, int], _Change]] = {
    "lora": _lora, "diff": _diff, "loha": _loha, "lokr": _lokr, "glora": _glora,
}  # fmt: skip


def _turn(patch: Patch, weight: Tensor, tensors: _Tensors) -> None:
    """Turn the rows of ``weight``, and then scale them where the file says so."""
    rows, columns = weight.shape
    turns = _rotations(tensors["blocks"], patch.scale, patch.strength)
    rescale = tensors["rescale"].reshape(-1, 1) if "rescale" in tensors else None
    turn = _turned if patch.kind == "oft" else _butterfly
    for part in row_slices(columns, rows, weight.device.type):
        turned = turn(turns, weight[:, part].to(torch.float32, copy=True))
        weight[:, part].copy_(turned if rescale is None else turned.mul_(rescale))


def _rotations(blocks: Tensor, largest: float, strength: float) -> Tensor:
    """Return ``I + strength (R - I)`` of each block, R Cayley's transform of its skew part."""
    skew = blocks - blocks.mT
    if largest > 0:
        norm = torch.linalg.vector_norm(skew) + 1e-8  # as LyCORIS writes it
        skew.mul_(torch.clamp(largest / norm, max=1.0))
    unit = torch.eye(blocks.shape[-1], device=blocks.device)
    # (I + S)(I - S)^-1 with S skew: orthogonal whatever the file holds, by one solve and without an
    # inverse.
    turned: Tensor = torch.linalg.solve(unit - skew, unit + skew, left=False)
    return turned.sub_(unit).mul_(strength).add_(unit)


def _turned(turns: Tensor, values: Tensor) -> Tensor:
    """Return each block of rows by its own rotation, transposed. ``values`` (rows, n) -> the
    same."""
    count, size, _ = turns.shape
    turned: Tensor = torch.bmm(turns.mT, values.view(count, size, -1))
    return turned.view(values.shape)


def _butterfly(turns: Tensor, values: Tensor) -> Tensor:
    """Stage by stage: rows that lie 2^stage * size / 2 apart come to lie side by side, are turned
    in blocks, and go back."""
    shape, size = values.shape, turns.shape[-1]
    for stage, blocks in enumerate(turns):
        apart = 2**stage * size // 2
        # (groups, 2, apart, n) -> (groups, apart, 2, n) -> (blocks, size, n)
        beside = values.view(-1, 2, apart, shape[1]).transpose(1, 2).reshape(-1, size, shape[1])
        turned = torch.bmm(blocks, beside).view(-1, apart, 2, shape[1])
        values = turned.transpose(1, 2).reshape(shape)
    return values
