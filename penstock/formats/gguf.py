"""GGUF's block quantisation, as files hold it.

Source: the block layouts of ggml (`ggml-common.h`). A stored row is a run of blocks; a block is
its fp16 scales and codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from penstock.formats.rows import Shape, Spec, chunk_rows

PREFIX = "GGUF_"
"""Begins the dtype tag of an entry whose bytes are blocks of a ggml type: ``"GGUF_Q8_0"``."""

# ggml type id -> (tag, elements of a block, bytes of a block). Source: ggml's `ggml.h`.
GGML_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("GGUF_Q4_0", 32, 18),
        3: ("GGUF_Q4_1", 32, 20),
        6: ("GGUF_Q5_0", 32, 22),
        7: ("GGUF_Q5_1", 32, 24),
        8: ("GGUF_Q8_0", 32, 34),
        10: ("GGUF_Q2_K", 256, 84),
        11: ("GGUF_Q3_K", 256, 110),
        12: ("GGUF_Q4_K", 256, 144),
        13: ("GGUF_Q5_K", 256, 176),
        14: ("GGUF_Q6_K", 256, 210),
        16: ("GGUF_IQ2_XXS", 256, 66),
        17: ("GGUF_IQ2_XS", 256, 74),
        18: ("GGUF_IQ3_XXS", 256, 98),
        19: ("GGUF_IQ1_S", 256, 50),
        20: ("GGUF_IQ4_NL", 32, 18),
        21: ("GGUF_IQ3_S", 256, 110),
        22: ("GGUF_IQ2_S", 256, 82),
        23: ("GGUF_IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("GGUF_IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("GGUF_TQ1_0", 256, 54),
        35: ("GGUF_TQ2_0", 256, 66),
        39: ("GGUF_MXFP4", 32, 17),
        40: ("GGUF_NVFP4", 64, 36),
        41: ("GGUF_Q1_0", 128, 18),
    }
)
BLOCK_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {tag: (block, nbytes) for tag, block, nbytes in GGML_TYPES.values()}
)
"""Elements and bytes of a block, by dtype tag."""


def block_size(dtype: str) -> tuple[int, int]:
    """Return the elements and bytes of one block of a ``GGUF_*`` dtype tag.

    Raises:
        KeyError: not such a tag.
    """
    return BLOCK_SIZES[dtype]


@dataclass(frozen=True)
class Gguf:
    """One ggml type: ``block`` elements in ``block_bytes`` bytes.

    Stored as raw bytes ``(rows, columns / block * block_bytes)``. Rows must be whole blocks;
    weights that are not are kept plain when a model is packed.
    """

    name: str
    ggml_type: str
    block: int
    block_bytes: int

    plain: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True
    gemm: ClassVar[None] = None

    @property
    def writable(self) -> bool:
        """Whether weights can be quantised to it: to Q8_0; the others are read."""
        return self.ggml_type == "Q8_0"

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    def fits(self, shape: Shape) -> bool:
        """Return whether rows are whole blocks."""
        return shape[1] % self.block == 0

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...]:
        """Return the same: blocks are known by the shape of their numbers."""
        return data

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return the blocks' bytes."""
        rows, columns = shape
        return {"weight": ("U8", (rows, columns // self.block * self.block_bytes))}

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return a chunk in fp32, its codes in bytes, and as much again for upper bits and
        scales."""
        return 7 * shape[1] * chunk_rows(*shape, device)


_READ = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0",
)  # fmt: skip

GGUF_FORMATS: tuple[Gguf, ...] = tuple(
    Gguf(f"gguf-{kind.lower()}", kind, *BLOCK_SIZES[PREFIX + kind]) for kind in _READ
)
"""Those that `penstock.quant.values.gguf` decodes."""
