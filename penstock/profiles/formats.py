"""Bytes of a quantised matrix, by format, without torch: what a plan needs to know of a format.

The formats themselves are `penstock.quant`; a test holds both to the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from penstock.errors import ProfileError

Shape = tuple[int, int]

_DECODE_CHUNK = 1 << 22
"""Elements that a GGUF type decodes at once on a GPU."""


@dataclass(frozen=True)
class WeightFormat:
    """Bytes of one matrix ``(rows, columns)``.

    Attributes:
        name: as in `penstock.quant.format.FORMATS`.
        block: elements that are stored together, in ``block_bytes`` bytes.
        row_scale_bytes: of the scale that each row has besides.
        block_scale_bytes: of the scale that each block has, stored apart.
        is_plain: needs no decoding where it is the compute dtype.
        decode_bytes: temporaries of decoding, an element of a chunk.
    """

    name: str
    block: int
    block_bytes: int
    row_scale_bytes: int = 0
    block_scale_bytes: int = 0
    is_plain: bool = False
    decode_bytes: int = 0

    def fits(self, shape: Shape) -> bool:
        """Whether rows are whole blocks; other matrices stay plain."""
        return shape[1] % self.block == 0

    def tensor_bytes(self, shape: Shape) -> tuple[int, ...]:
        """Bytes of each stored tensor."""
        rows, columns = shape
        blocks = rows * columns // self.block
        scales = rows * self.row_scale_bytes + blocks * self.block_scale_bytes
        return (blocks * self.block_bytes, scales) if scales else (blocks * self.block_bytes,)

    def workspace_bytes(self, shape: Shape) -> int:
        """Most bytes that decoding allocates on a GPU besides its output: the rows' scales in fp32,
        and what a chunk of whole rows takes."""
        rows, columns = shape
        chunk = columns * min(rows, max(1, _DECODE_CHUNK // columns))
        return rows * self.row_scale_bytes + chunk * self.decode_bytes


def _by_name(*formats: WeightFormat) -> Mapping[str, WeightFormat]:
    return MappingProxyType({each.name: each for each in formats})


FORMATS: Mapping[str, WeightFormat] = _by_name(
    WeightFormat("bf16", 1, 2, is_plain=True),
    WeightFormat("fp16", 1, 2, is_plain=True),
    WeightFormat("fp8", 1, 1, row_scale_bytes=4),
    WeightFormat("int8", 1, 1, row_scale_bytes=4),
    WeightFormat("nf4", 64, 32, block_scale_bytes=4),
    WeightFormat("gguf-q8_0", 32, 34, decode_bytes=7),
    WeightFormat("gguf-q6_k", 256, 210, decode_bytes=7),
    WeightFormat("gguf-q5_k", 256, 176, decode_bytes=7),
    WeightFormat("gguf-q4_k", 256, 144, decode_bytes=7),
)


def get_format(name: str) -> WeightFormat:
    """The format called ``name``.

    Raises:
        ProfileError: no such format; lists those there are.
    """
    if name not in FORMATS:
        raise ProfileError(
            "unknown weight format", expected="one of " + ", ".join(FORMATS), found=repr(name)
        )
    return FORMATS[name]
