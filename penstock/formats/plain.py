"""Weights that are stored as they are: bf16, fp16, fp32, fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.formats.rows import Shape, Spec


@dataclass(frozen=True)
class Plain:
    """A floating-point weight without scales; ``tag`` is its safetensors dtype."""

    name: str
    tag: str

    plain: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True
    gemm: ClassVar[None] = None

    @property
    def writable(self) -> bool:
        """Whether weights can be cast to it; nothing computes in fp64, so it is read."""
        return self.tag != "F64"

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    def fits(self, shape: Shape) -> bool:
        """Return True: every shape can be stored."""
        return True

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...]:
        """Return the same."""
        return data

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return one tensor, whatever the compute dtype."""
        return {"weight": (self.tag, shape)}

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Nothing beside the output."""
        return 0
