"""What a convolution allocates on a CPU besides its operands.

torch (2.13, `ATen/native/Convolution.cpp`) gives one of 2D to oneDNN, which copies input and
weights into layouts of its own, in fp32 blocked by channels, and its result back out of one. Small
ones in fp32 torch does itself: each pixel is copied for every tap, then multiplied as a matrix.
"""

from __future__ import annotations

from penstock.units import KIB, MIB

_BLOCK_CHANNELS = 16
"""Of oneDNN's layouts with 512-bit vectors; narrower vectors have smaller blocks."""

_SMALL_ELEMENTS = 20480
"""Of an input that torch does not give to oneDNN in fp32."""

_SINGLE = 4

_ALIGNMENT_BYTES = 128
"""Around the copy of the bias."""

_ROWS_BYTES, _TILES_BYTES = 4 * MIB, 128 * KIB
"""Of 16-bit inputs, the most rows that one thread arranges for the matrix unit at a time, and the
unit's own tiles: the most seen."""


def call_bytes(widths: tuple[int, int], area: int, made: int, taps: int, itemsize: int) -> int:
    """The most that a convolution of one picture holds at a time, its result included.

    Args:
        widths: channels of the input and of the result.
        area, made: their pixels.
        taps: of the kernel, in one plane.
        itemsize: bytes of an element; 2 takes a CPU on which oneDNN computes 16-bit types.
    """
    result = widths[1] * made * itemsize
    if itemsize == _SINGLE and widths[0] * area <= _SMALL_ELEMENTS:
        return result + (widths[0] * taps * made * itemsize if taps > 1 else 0)
    wide_in, wide_out = map(_filled, widths)
    copied = (wide_in * (area + wide_out * taps) + wide_out) * itemsize + _ALIGNMENT_BYTES
    blocked = wide_out * made * itemsize
    if itemsize == _SINGLE:
        return max(copied, result) + blocked
    rows = min(2 * wide_in * area * itemsize, _ROWS_BYTES) + _TILES_BYTES
    return max(copied + rows, 2 * result) + blocked


def _filled(channels: int) -> int:
    return -(-channels // _BLOCK_CHANNELS) * _BLOCK_CHANNELS
