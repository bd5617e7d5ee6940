"""Exact tiles of the Wan VAE: which pixels each convolution of each level needs, and nothing more.

Pure geometry. A tile is its core (the latents whose pixels it must produce) followed backwards
through the layers: every convolution needs one pixel more on each side that is not a border of the
picture, every resampling halves or doubles. Following it convolution by convolution is the crop
"level by level, as layers consume the halo" at its finest. True borders keep the convolutions' own
zero padding. The plan and the engine read the same windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.errors import UsageError

RADIUS = 1
"""Pixels a 3x3 convolution sees each way: all spatial convolutions of the Wan VAE are 3x3."""

CAUSAL_REACH = 2
"""Frames that a causal convolution sees before the one in hand."""

QUERY_CHUNK = 512
"""Queries attended at once in the mid block. Its one head of 384 is too wide for flash attention;
the kernel that stores its scores then stores ``QUERY_CHUNK`` x latents, not latents squared.
"""


@dataclass(frozen=True)
class Span:
    """Pixels ``lo`` to ``hi`` (exclusive) along one axis of a picture."""

    lo: int
    hi: int

    def __len__(self) -> int:
        return self.hi - self.lo

    def grown(self, before: int, after: int, size: int) -> Span:
        """Return this span wider on both sides, but not beyond a picture of ``size`` pixels."""
        return Span(max(0, self.lo - before), min(size, self.hi + after))

    def scaled(self, factor: int) -> Span:
        """Return the same pixels in a picture ``factor`` times as large."""
        return Span(self.lo * factor, self.hi * factor)

    def halved(self) -> Span:
        """Return the pixels of the half-size picture that these pixels are enlarged from."""
        return Span(self.lo // 2, -(-self.hi // 2))

    def inside(self, other: Span) -> slice:
        """Return where this span lies in an array that holds ``other``."""
        return slice(self.lo - other.lo, self.hi - other.lo)

    def convolved(self, output: Span) -> Convolved:
        """Return how a 3-wide convolution of this span gives ``output``."""
        valid = output.lo - self.lo >= RADIUS and self.hi - output.hi >= RADIUS
        padding = 0 if valid else RADIUS
        first = self.lo + RADIUS - padding
        made = Span(first, self.hi - RADIUS + padding)
        return Convolved(padding, made, output.inside(made))


@dataclass(frozen=True)
class Convolved:
    """One axis of a convolution: zero padding on both sides, pixels made, and which are kept.

    The padding is 0 inside the picture. At a true border it is the layer's own; what it spoils on
    the other side is not kept.
    """

    padding: int
    made: Span
    kept: slice


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture."""

    rows: Span
    cols: Span

    @classmethod
    def whole(cls, height: int, width: int) -> Window:
        """Return all of a picture."""
        return cls(Span(0, height), Span(0, width))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return len(self.rows), len(self.cols)

    def scaled(self, factor: int) -> Window:
        """Return the same rectangle in a picture ``factor`` times as large."""
        return Window(self.rows.scaled(factor), self.cols.scaled(factor))

    def inside(self, other: Window) -> tuple[slice, slice]:
        """Return the rows and columns of this window in an array that holds ``other``."""
        return self.rows.inside(other.rows), self.cols.inside(other.cols)


@dataclass(frozen=True)
class TileGrid:
    """Rows and columns of tiles; ``TileGrid(1, 1)`` is the whole frame."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise UsageError(
                "a tile grid is too small",
                expected="1 row and 1 column or more",
                found=f"{self.rows}x{self.cols}",
                remedy="Use 1x1 for whole frames.",
            )

    def cores(self, height: int, width: int) -> Iterator[tuple[Span, Span]]:
        """Yield the cores over ``height`` x ``width`` latents, row by row; each latent is in
        exactly one.

        Raises:
            UsageError: more tiles than latents along an axis.
        """
        if self.rows > height or self.cols > width:
            raise UsageError(
                "a tile grid is finer than the latents",
                expected=f"at most {height} rows and {width} columns",
                found=f"{self.rows}x{self.cols}",
                remedy="Use fewer tiles.",
            )
        for rows in _split(height, self.rows):
            for cols in _split(width, self.cols):
                yield rows, cols


def _split(size: int, parts: int) -> list[Span]:
    # Cores of nearly equal size that cover each latent once: halos overlap, cores never do.
    edges = [size * index // parts for index in range(parts + 1)]
    return [Span(lo, hi) for lo, hi in zip(edges, edges[1:], strict=False)]


@dataclass(frozen=True)
class VaeLevels:
    """What the geometry needs of the architecture.

    Attributes:
        levels: resolutions, each half the next (`len(dim_mult)`).
        num_res_blocks: of the config; the decoder has one more at each level.
        patch: pixels of the video in one of the picture that is convolved, each way. All windows
            are of that picture.
    """

    levels: int
    num_res_blocks: int
    patch: int = 1

    def __post_init__(self) -> None:
        if self.levels < 2 or self.num_res_blocks < 1:
            raise UsageError(
                "this VAE has nothing to tile",
                expected="2 levels and 1 residual block or more",
                found=f"{self.levels} levels, {self.num_res_blocks} residual blocks",
            )

    @property
    def scale(self) -> int:
        """Pixels of the picture that is convolved a latent, each way."""
        return 1 << (self.levels - 1)

    @property
    def factor(self) -> int:
        """Pixels of the video a latent, each way."""
        return self.scale * self.patch


@dataclass(frozen=True)
class DecodeTile:
    """Windows of one tile on its way up.

    Attributes:
        tail: features of the first up block's residual blocks that enter its upsampler.
        levels: for each further up block the windows at the input of its first convolution, after
            that one, and so on; the last level ends with the output convolution, hence the core.
    """

    tail: Window
    levels: tuple[tuple[Window, ...], ...]

    @property
    def output(self) -> Window:
        """Pixels this tile makes."""
        return self.levels[-1][-1]


@dataclass(frozen=True)
class EncodeTile:
    """Windows of one tile on its way down.

    Attributes:
        levels: for each level that ends in a downsampler, the windows at the input of its first
            convolution (the first level starts with the input convolution), after that one, and so
            on; the last window is the downsampler's output, at half the size.
    """

    levels: tuple[tuple[Window, ...], ...]

    @property
    def pixels(self) -> Window:
        """Pixels this tile reads."""
        return self.levels[0][0]

    @property
    def output(self) -> Window:
        """Latents whose features this tile makes."""
        return self.levels[-1][-1]


def decode_tiles(arch: VaeLevels, grid: TileGrid, height: int, width: int) -> list[DecodeTile]:
    """Return the tiles over ``height`` x ``width`` latents, in the order of `TileGrid.cores`.

    Raises:
        UsageError: more tiles than latents along an axis.
    """
    return [
        _decode_tile(_up_spans(arch, rows, height), _up_spans(arch, cols, width))
        for rows, cols in grid.cores(height, width)
    ]


def encode_tiles(arch: VaeLevels, grid: TileGrid, height: int, width: int) -> list[EncodeTile]:
    """Return the tiles over the pixels of ``height`` x ``width`` latents, in the order of
    `TileGrid.cores`.

    Raises:
        UsageError: more tiles than latents along an axis.
    """
    tiles = []
    for rows, cols in grid.cores(height, width):
        levels = zip(_down_spans(arch, rows, height), _down_spans(arch, cols, width), strict=True)
        tiles.append(EncodeTile(tuple(_windows(*level) for level in levels)))
    return tiles


def _windows(rows: list[Span], cols: list[Span]) -> tuple[Window, ...]:
    return tuple(Window(r, c) for r, c in zip(rows, cols, strict=True))


def _decode_tile(rows: list[list[Span]], cols: list[list[Span]]) -> DecodeTile:
    (tail,), *levels = (_windows(*level) for level in zip(rows, cols, strict=True))
    return DecodeTile(tail, tuple(levels))


def _through(convs: int, output: Span, size: int) -> list[Span]:
    """Return the spans at the input of each of ``convs`` convolutions, then ``output``."""
    spans = [output]
    for _ in range(convs):
        spans.insert(0, spans[0].grown(RADIUS, RADIUS, size))
    return spans


def _up_spans(arch: VaeLevels, core: Span, size: int) -> list[list[Span]]:
    need, convs = core.scaled(arch.scale), 2 * (arch.num_res_blocks + 1)
    found: list[list[Span]] = []
    # From the pixels back to the latents: each level adds the halo of its own convolutions to what
    # the level after it needs. One convolution forgotten shows as a seam.
    for level in range(arch.levels - 1, 0, -1):
        full, last = size << level, level == arch.levels - 1
        found.insert(0, _through(convs + (1 if last else 0), need, full))
        # The upsampler's own convolution works on the enlarged picture: its halo is taken there,
        # and only then halved to the pixels of the level below.
        need = found[0][0].grown(RADIUS, RADIUS, full).halved()
    return [[need], *found]


def _down_spans(arch: VaeLevels, core: Span, size: int) -> list[list[Span]]:
    need, convs = core, 2 * arch.num_res_blocks
    found: list[list[Span]] = []
    for level in range(arch.levels - 2, -1, -1):
        full = size * arch.scale >> level
        # Output j of the stride-2 convolution reads pixels 2j, 2j+1 and 2j+2.
        read = need.scaled(2).grown(0, 1, full)
        found.insert(0, [*_through(convs + (1 if level == 0 else 0), read, full), need])
        need = found[0][0]
    return found
