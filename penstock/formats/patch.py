"""What a LoRA of any kind does to one weight, in numbers (`penstock.quant.values.patch` computes).

Kinds and their sources, as the projects that train them write them (kohya-ss/sd-scripts, LyCORIS,
PEFT) and as ComfyUI's ``weight_adapter`` reads them:

- lora: ``W + s up down`` (arXiv:2106.09685); diff: ``W + D``; set: ``D`` in the place of W.
- loha: ``W + s (a1 b1) * (a2 b2)``, elementwise; lokr: ``W + s w1 (x) w2``, Kronecker's product
  (LyCORIS, arXiv:2309.14859).
- glora: ``W + s (W a1 a2 + b1 b2)`` (arXiv:2306.07967).
- oft: the outputs, in blocks, turned by Cayley's ``(I + Q) (I - Q)^-1`` (arXiv:2306.07280); boft:
  in stages, as a butterfly (arXiv:2311.06243). Either may scale the rows afterwards.
- DoRA (arXiv:2402.09353): lora, loha or lokr with a ``magnitude``: the sum's rows or columns are
  brought to that norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from penstock.formats.rows import Shape, Spec, chunk_rows

Kind: TypeAlias = Literal["lora", "diff", "set", "loha", "lokr", "glora", "oft", "boft"]

MAGNITUDE = "magnitude"
_SINGLE = 4  # bytes of an fp32
_IN_WORK = 5
"""Copies of a slice's fp32 values that are alive at once: they, their change, and its factors."""
_TURNED = 9
"""The same of a rotation's slice, and of its blocks while they are inverted."""


@dataclass(frozen=True)
class Patch:
    """One LoRA's change of one weight.

    Attributes:
        index: which LoRA; its tensors are called ``lora.{index}.{role}`` beside the weight.
        kind: see above.
        strength: what the change is multiplied by; a "set" has none.
        scale: alpha / rank; of oft and boft the largest norm of Q (0: any).
        tensors: dtype tag and shape of each, by role.
        turned: the halves of its rows change places first; of "lora" alone.
    """

    index: int
    kind: Kind
    strength: float
    scale: float
    tensors: tuple[tuple[str, Spec], ...]
    turned: bool = False

    def name(self, role: str) -> str:
        """Return the tensor's name beside the weight."""
        return f"lora.{self.index}.{role}"

    def storage(self) -> dict[str, Spec]:
        """Return the dtype tag and shape of each tensor by that name."""
        return {self.name(role): spec for role, spec in self.tensors}

    @property
    def roles(self) -> tuple[str, ...]:
        """Of its tensors."""
        return tuple(role for role, _ in self.tensors)

    @property
    def is_sum(self) -> bool:
        """Whether it can be added as a product of its own, without the weight's values."""
        return self.kind in ("lora", "diff") and MAGNITUDE not in self.roles

    @property
    def is_rotation(self) -> bool:
        """Whether it mixes rows, so that it is computed by columns."""
        return self.kind in ("oft", "boft")

    @property
    def by_rows(self) -> bool:
        """Whether some of a weight's rows can be changed without the others: nothing mixes them,
        and no magnitude is that of a column, (1, columns)."""
        _, magnitude = dict(self.tensors).get(MAGNITUDE, ("", ()))
        return not self.is_rotation and not (len(magnitude) > 1 and magnitude[0] == 1)

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return the most bytes that changing a weight of ``shape`` takes besides it, on a device
        of the type ``device`` ("cpu", "cuda")."""
        rows, columns = shape
        if self.kind == "set":
            return 0
        small = sum(
            math.prod(dims) for role, (_, dims) in self.tensors if role not in ("diff", "set")
        )
        if self.is_rotation:
            return _SINGLE * _TURNED * (small + rows * chunk_rows(columns, rows, device))
        made = rows + columns + small + self._factors()
        return _SINGLE * (made + _IN_WORK * columns * chunk_rows(rows, columns, device))

    def _factors(self) -> int:
        """Return the elements of lokr's factors, where they are products themselves."""
        shapes = {role: dims for role, (_, dims) in self.tensors}
        pairs = [(shapes.get(f"{w}_a"), shapes.get(f"{w}_b")) for w in ("w1", "w2")]
        if self.kind != "lokr":
            return 0
        return sum(a[0] * math.prod(b[1:]) for a, b in pairs if a is not None and b is not None)
