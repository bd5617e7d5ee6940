"""GGUF's block quantisation, as files hold it.

Source: the block layouts of ggml (`ggml-common.h`). A stored row is a run of blocks; a block is
its fp16 scales and codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from penstock.quant.rows import Shape, Spec, chunk_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GgmlType: TypeAlias = Literal["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


@dataclass(frozen=True)
class Gguf:
    """One ggml type: ``block`` elements in ``block_bytes`` bytes.

    Stored as raw bytes ``(rows, columns / block * block_bytes)``. Rows must be whole blocks;
    weights that are not are kept plain when a model is packed.
    """

    name: str
    ggml_type: GgmlType
    block: int
    block_bytes: int

    def fits(self, shape: Shape) -> bool:
        """Whether rows are whole blocks."""
        return shape[1] % self.block == 0

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """The blocks' bytes."""
        rows, columns = shape
        return {"weight": ("U8", (rows, columns // self.block * self.block_bytes))}

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """A chunk in fp32, its codes in bytes, and as much again for upper bits and scales."""
        return 7 * shape[1] * chunk_rows(*shape, device)

    def quantise(self, weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
        """Stored bytes, for Q8_0 only: equal to ggml's reference.

        Raises:
            CheckpointError: NaN or Inf.
            UsageError: another type; those are read, not written.
            ValueError: rows are not whole blocks.
        """
        from penstock.quant.values import gguf

        return gguf.quantise(self, weight, name)

    def dequantise(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """ggml's fp32 values, rounded once to ``dtype``."""
        from penstock.quant.values import gguf

        return gguf.dequantise(self, tensors, shape, dtype, out)


GGUF_FORMATS: tuple[Gguf, ...] = (
    Gguf("gguf-q8_0", "Q8_0", 32, 34),
    Gguf("gguf-q6_k", "Q6_K", 256, 210),
    Gguf("gguf-q5_k", "Q5_K", 256, 176),
    Gguf("gguf-q4_k", "Q4_K", 256, 144),
    Gguf("gguf-q5_1", "Q5_1", 32, 24),
    Gguf("gguf-q5_0", "Q5_0", 32, 22),
    Gguf("gguf-q4_1", "Q4_1", 32, 20),
    Gguf("gguf-q4_0", "Q4_0", 32, 18),
)
