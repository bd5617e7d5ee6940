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
"""Around each of what oneDNN keeps in its workspace: the copy of the bias, and sums."""

_ROWS_BYTES, _TILES_BYTES = 4 * MIB, 128 * KIB
"""Of 16-bit inputs on a CPU with a matrix unit (AMX), the most rows that one thread arranges for it
at a time, and the unit's own tiles: the most seen."""

_MOST_PIXELS = 30
"""Of a row that oneDNN computes at once; it rounds sums up to whole rows."""


def call_bytes(widths: tuple[int, int], area: int, made: int, taps: int, itemsize: int) -> int:
    """Return the most that a convolution of one picture holds at a time, its result included.

    It is that of one thread. Where there are more, oneDNN sets aside workspace for each in 16-bit
    types; of that for sums, a thread touches only what it computes.

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
    workspace = max(_rows_bytes(wide_in * area * itemsize), _sums_bytes(wide_out, made, taps))
    return max(copied + workspace, 2 * result) + blocked


def _rows_bytes(nbytes: int) -> int:
    """Return the workspace for an input of 16-bit elements on a CPU with a matrix unit."""
    return min(2 * nbytes, _ROWS_BYTES) + _TILES_BYTES


def _sums_bytes(wide_out: int, made: int, taps: int) -> int:
    """Return the workspace on one without: where the kernel is a single pixel, oneDNN's
    ``jit_bf16_1x1`` takes room for all of its result in fp32."""
    if taps > 1:
        return 0
    return wide_out * (made + _MOST_PIXELS - 1) * _SINGLE + _ALIGNMENT_BYTES


def _filled(channels: int) -> int:
    return -(-channels // _BLOCK_CHANNELS) * _BLOCK_CHANNELS
