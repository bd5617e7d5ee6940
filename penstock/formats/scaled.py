"""Eight bits a weight and a scale a row: fp8 (e4m3fn, e5m2) and symmetric int8, in every spelling.

One storage, several authors: ours, LightX2V's and ComfyUI's (``weight`` + ``weight_scale``) and
optimum-quanto's (``weight._data`` + ``weight._scale``) differ in names and in the scale's shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

from penstock.formats.rows import Shape, Spec, chunk_rows

ScaleLayout: TypeAlias = Literal["none", "scalar", "one", "one_one", "row", "column"]
"""Shape of the scale: absent, (), (1,), (1, 1), (rows,) or (rows, 1)."""

Gemm: TypeAlias = Literal["fp8", "int8", "nvfp4", "mxfp8"]

ROTATIONS = (4, 16, 64, 256, 1024)
"""Sizes that ConvRot's groups may have: powers of 4."""

E4M3_MAX = 448.0
INT8_MAX = 127.0


def scale_shape(layout: ScaleLayout, rows: int) -> tuple[int, ...]:
    """Return the shape that ``layout`` names for a weight of ``rows`` rows."""
    shapes: dict[str, tuple[int, ...]] = {
        "scalar": (),
        "one": (1,),
        "one_one": (1, 1),
        "row": (rows,),
        "column": (rows, 1),
    }
    return shapes[layout]


@dataclass(frozen=True)
class Scaled8:
    """A weight of one byte an element: ``value = stored * scale``.

    Quantising rounds ``weight / scale`` to nearest even with ``scale = max |row| / largest`` (448
    for e4m3fn, 127 for int8); a row of zeros gets the smallest scale. One scale for the whole
    tensor is read but is no default: a few outliers cost int8 eight times the error.

    Attributes:
        tag: "F8_E4M3", "F8_E5M2" or "I8".
        gemm: the 8-bit matrix product that can use it; None where the file forbids that.
        scale: layout of the scale; "none" is a raw cast.
        scale_tag: dtype of the scale; None means the compute dtype, as optimum-quanto does.
        rotation: columns of a group that was rotated before it was quantised (ConvRot: a Hadamard
            matrix of that size, a power of 4, spreads outliers over it); 0: none was.
    """

    name: str
    tag: Literal["F8_E4M3", "F8_E5M2", "I8"]
    gemm: Gemm | None
    scale: ScaleLayout = "column"
    scale_tag: str | None = "F32"
    weight_key: str = "weight"
    scale_key: str = "weight_scale"
    rotation: int = 0

    plain: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tag == "I8" and self.scale == "none":
            raise ValueError("int8 without a scale has no meaning")

    @property
    def writable(self) -> bool:
        """Whether weights can be quantised to it; e5m2 is read: e4m3fn takes as much and errs half
        as far."""
        return self.tag != "F8_E5M2"

    @property
    def is_quanto(self) -> bool:
        """Whether optimum-quanto reads it, and so quantises to it."""
        return self.weight_key != "weight"

    @property
    def label(self) -> str:
        """Its name, and for the spellings of several authors how it is scaled."""
        if self.is_quanto:
            return self.name
        scaled = {"none": "raw", "row": "per row", "column": "per row"}.get(self.scale)
        return f"{self.name} {scaled or 'per tensor'}"

    def fits(self, shape: Shape) -> bool:
        """Return True: every shape can be stored; a rotated one if its rows are whole groups."""
        return not self.rotation or shape[1] % self.rotation == 0

    def suited(self, shape: Shape) -> Scaled8:
        """Return, of a rotated format, that with the largest group of 16 up to its own that
        ``shape`` has whole; others, and where there is none, itself."""
        sizes = [s for s in ROTATIONS if 16 <= s <= self.rotation and shape[1] % s == 0]
        return replace(self, rotation=max(sizes)) if sizes else self

    def logical(self, data: tuple[int, ...]) -> tuple[int, ...]:
        """Return the same."""
        return data

    def storage(self, shape: Shape, compute_dtype: str) -> dict[str, Spec]:
        """Return the weight's bytes and, unless raw, its scale."""
        stored: dict[str, Spec] = {self.weight_key: (self.tag, shape)}
        if self.scale != "none":
            tag = self.scale_tag or compute_dtype
            stored[self.scale_key] = (tag, scale_shape(self.scale, shape[0]))
        return stored

    def workspace_bytes(self, shape: Shape, device: str) -> int:
        """Return the scale in fp32, and on a CPU a chunk in fp32, for fp8 its bits besides and the
        largest of them; other devices decode in place. A rotation takes half a chunk, and two more
        while it turns, and its matrices."""
        if self.rotation:
            rows, columns = shape
            return 8 * rows + 12 * columns * chunk_rows(rows, 2 * columns, device) + 4096
        if device != "cpu":
            return 4 * shape[0]
        item = 4 if self.tag == "I8" else 4 + 2 + 1
        return 4 * shape[0] + item * shape[1] * chunk_rows(*shape, device) + 1
