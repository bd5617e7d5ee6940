"""Which way each linear over quantised storage computes, and what that takes; how is
`penstock.quant.compute`'s.

Free of torch until a scratch buffer has bytes: a plan counts with what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from penstock.errors import LedgerOverflow
from penstock.formats.formats import QuantFormat
from penstock.formats.micro import Micro
from penstock.formats.plain import Plain
from penstock.formats.rows import Shape
from penstock.formats.scaled import Scaled8
from penstock.formats.tags import ITEM_BYTES
from penstock.units import MIB

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Path: TypeAlias = Literal["dequant", "fp8", "int8", "nvfp4", "mxfp8"]
Mode: TypeAlias = Literal["exact", "fast"]

Kernel: TypeAlias = Literal["fp8", "fp8-rowwise", "int8", "int8-kitchen", "nvfp4", "mxfp8"]
"""An 8-bit product that a device may have. "fp8-rowwise" takes the scales of tokens and rows, and
the bias, and writes bf16: it makes the path "fp8" faster where that works. "int8-kitchen" is
comfy-kitchen's, which quantises the tokens, and scales inside the product: likewise of "int8".
"nvfp4" and "mxfp8" are comfy-kitchen's too, on cards whose tensor cores take such blocks."""

KITCHEN_BYTES = 32 * MIB
"""What comfy-kitchen 0.2.40 keeps on a card for cuBLAS, where its own kernel does not serve."""

DEFAULT_CHUNK_BYTES = 128 * MIB

GEMM_MULTIPLE = 16
"""What both sides of an 8-bit product's weight must be a multiple of."""

_MOST_PADDED = 2 * GEMM_MULTIPLE + 1
"""Tokens whose bytes a single one may take on a GPU: its own, and those it is padded to."""


class Scratch:
    """One buffer that every dequantised weight passes through.

    Owned by the engine; a phase of a job reserves its bytes and holds them. A weight in it lives
    for one matrix product.

    Args:
        nbytes: of the largest weight in the compute dtype; 0 for a buffer that `held` makes.
        device: where the linears compute.

    Attributes:
        device: its name, such as "cuda:0".
    """

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        self.device = str(device)
        self._buffer = self._make(nbytes)

    def _make(self, nbytes: int) -> Tensor | None:
        # None asks nothing of the device: a plan may be for one that is not here.
        if not nbytes:
            return None
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @property
    def device_type(self) -> str:
        """Of `device`: "cpu", "cuda"."""
        return self.device.partition(":")[0]

    @property
    def nbytes(self) -> int:
        """What it holds now."""
        return 0 if self._buffer is None else self._buffer.numel()

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        """Provide a buffer of ``nbytes`` until the context ends."""
        self._buffer = self._make(nbytes)
        try:
            yield
        finally:
            self._buffer = self._make(0)

    def view(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the start of the buffer as an uninitialised ``shape`` of ``dtype``.

        Raises:
            LedgerOverflow: the buffer is smaller than that.
        """
        need = shape[0] * shape[1] * dtype.itemsize
        if self._buffer is None or need > self.nbytes:
            raise LedgerOverflow(
                "the scratch buffer is too small for a weight",
                expected=f"at least {need:,} bytes for {shape[0]}x{shape[1]}",
                found=f"{self.nbytes:,} bytes",
            )
        return self._buffer[:need].view(dtype).view(shape)


@dataclass(frozen=True)
class Computing:
    """The choice of paths for a run: ``--compute exact`` decodes everything; ``fast`` multiplies in
    8 bits where the format allows it and the device has shown that it can.

    Attributes:
        working: 8-bit products that `penstock.quant.probe` found to work on the device.
    """

    scratch: Scratch
    mode: Mode = "exact"
    working: frozenset[Kernel] = frozenset()
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    def path_for(self, fmt: QuantFormat, shape: Shape) -> Path:
        """Return the path of one linear. Its product needs both sides to be multiples of 16, or of
        what the format fills them up to."""
        gemm, multiple = fmt.gemm, fmt.padding if isinstance(fmt, Micro) else GEMM_MULTIPLE
        aligned = shape[0] % multiple == 0 and shape[1] % multiple == 0
        if self.mode == "exact" or gemm is None or gemm not in self.working or not aligned:
            return "dequant"
        return gemm

    def workspace_bytes(self, fmt: QuantFormat, shape: Shape) -> int:
        """Return the most bytes that one linear allocates beside scratch and output, for any token
        count."""
        if self.path_for(fmt, shape) == "dequant":
            return fmt.workspace_bytes(shape, self.scratch.device_type)
        device = self.scratch.device_type
        rotated = isinstance(fmt, Scaled8) and bool(fmt.rotation)
        kitchen = self.is_kitchens(fmt, shape)
        token = gemm_token_bytes(shape, device, rotated=rotated, kitchen=kitchen)
        least = token * (1 if device == "cpu" else _MOST_PADDED)
        kept = KITCHEN_BYTES if kitchen else 0
        return kept + max(self.chunk_bytes, gemm_fixed_bytes(shape) + least)

    def is_kitchens(self, fmt: QuantFormat, shape: Shape) -> bool:
        """Return whether comfy-kitchen multiplies one linear."""
        path = self.path_for(fmt, shape)
        return path in ("nvfp4", "mxfp8") or (path == "int8" and "int8-kitchen" in self.working)


def gemm_fixed_bytes(shape: Shape) -> int:
    """Return what an 8-bit product makes once a linear: the rows' scales and the bias in fp32, a
    unit."""
    return 8 * shape[0] + 4


def gemm_token_bytes(
    shape: Shape,
    device: str,
    *,
    rowwise: bool = False,
    rotated: bool = False,
    kitchen: bool = False,
) -> int:
    """Return the most bytes that a token takes in an 8-bit product on a ``device`` of that type.

    First its codes, the quotients in fp32 that they are rounded from, its norm and its scale; then
    the codes, the scale and the 32-bit product, which is scaled in place. A CPU casts what it
    reads or writes in a copy beside. A ``rowwise`` product lies in the output. What is ``rotated``
    is so in fp32, by way of a copy and a half-turned one. ``kitchen``'s product is a tensor of its
    own, which is copied into the output.
    """
    rows, columns = shape
    fp32 = 8 if device == "cpu" else 4
    codes = columns + 8 + (12 * columns if rotated else 0) + (4 * rows if kitchen else 0)
    return codes + fp32 * (columns if rowwise else max(columns, rows))


def scratch_bytes(weights: Iterable[tuple[QuantFormat, Shape]], compute_dtype: str) -> int:
    """Return the bytes that a `Scratch` needs for ``weights``: the largest that must be decoded, in
    ``compute_dtype`` (a safetensors tag)."""
    return max(
        (
            shape[0] * shape[1] * ITEM_BYTES[compute_dtype]
            for fmt, shape in weights
            if not (isinstance(fmt, Plain) and fmt.tag == compute_dtype)
        ),
        default=0,
    )
