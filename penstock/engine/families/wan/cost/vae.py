"""Bytes and arithmetic of the tiled VAE, by walking its layers as the engine does.

The walk mirrors `penstock.engine.families.wan.vae_layers`, `vae_decode` and `vae_encode` statement
by statement: which frames are alive when the next is made, and which of them are made at all. It
assumes the worst moment, with every causal past full, and the attention kernel that stores its
scores. What convolutions take for themselves is in it on a CPU
(`penstock.engine.families.wan.cost.convolution`); on a GPU it is the largest convolution's, told
apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.engine.families.wan.cost.convolution import call_bytes
from penstock.engine.families.wan.cost.runs import after_halving, after_layer, clip_runs
from penstock.engine.families.wan.spec import VaeSpec
from penstock.profiles.rates import Rates
from penstock.profiles.tiling import (
    CAUSAL_REACH,
    QUERY_CHUNK,
    DecodeTile,
    EncodeTile,
    TileGrid,
    VaeLevels,
    Window,
    decode_tiles,
    encode_tiles,
)

_PIXELS = 3
_INDEX = 8  # bytes of an int64
_WIDE_ITEMSIZE = 4


@dataclass(frozen=True)
class VaeBytes:
    """Peak bytes of one pass above the weights, by what holds them at that moment.

    Attributes:
        device: ``(label, bytes)`` in device memory.
        ram: ``(label, bytes)`` in host memory.
        convolution_bytes: input and result of the largest convolution.
    """

    device: tuple[tuple[str, int], ...]
    ram: tuple[tuple[str, int], ...]
    convolution_bytes: int

    @property
    def device_bytes(self) -> int:
        """Sum of the device items."""
        return sum(count for _, count in self.device)

    @property
    def ram_bytes(self) -> int:
        """Sum of the host items."""
        return sum(count for _, count in self.ram)


def levels_of(spec: VaeSpec) -> VaeLevels:
    """Return the geometry of a VAE."""
    return VaeLevels(len(spec.dim_mult), spec.num_res_blocks, spec.patch)


def decode_bytes(
    spec: VaeSpec,
    latent: tuple[int, int, int],
    grid: TileGrid,
    itemsize: int,
    *,
    on_cpu: bool = False,
) -> VaeBytes:
    """Return the peak of `penstock.engine.families.wan.vae_decode.decode_frames` above the
    decoder's weights.

    Args:
        spec: the VAE.
        latent: latent frames, height and width.
        grid: rows and columns of tiles.
        itemsize: bytes of one activation element.
        on_cpu: whether what convolutions allocate on a CPU counts.

    Raises:
        UsageError: more tiles than latents along an axis.
    """
    frames, height, width = latent
    plane = height * width * itemsize
    features = (2 if spec.residual else 1) * spec.decoder_widths[0] * plane
    whole = _decode_whole(spec, latent, _Walk(itemsize, [1] * frames, on_cpu))
    tiles = decode_tiles(levels_of(spec), grid, height, width)
    walks = [_decode_tile(spec, tile, _Walk(itemsize, [1] * frames, on_cpu)) for tile in tiles]
    _share_past(walks)
    largest = max(walks, key=lambda walk: walk.peak_bytes)
    if whole.peak_bytes - features > largest.peak_bytes:
        items = whole.items(features=(frames - 1) * features)
    else:
        items = largest.items(features=frames * features)
    out_frames = 1 + (frames - 1) * spec.temporal_factor
    area = height * width * spec.spatial_factor**2
    staging = max(_area(tile.output) for tile in tiles) * spec.colours
    return VaeBytes(
        (*items, ("latents", spec.z_dim * frames * plane)),
        (("video frames", out_frames * area * _PIXELS), ("staging", staging)),
        max(walk.convolution for walk in (whole, *walks)),
    )


def encode_bytes(
    spec: VaeSpec,
    latent: tuple[int, int, int],
    grid: TileGrid,
    itemsize: int,
    *,
    changes: Sequence[int] | None = None,
    on_cpu: bool = False,
) -> VaeBytes:
    """Return the peak of `penstock.engine.families.wan.vae_encode.encode_tiled` above the encoder's
    weights.

    Arguments and errors are those of `decode_bytes`; the picture is counted, the clip never exists.

    Args:
        changes: as `penstock.engine.families.wan.cost.runs.clip_runs` takes them. None: not known
            yet, so that the peak is that of any.
    """
    frames, height, width = latent
    plane = height * width * itemsize
    features = spec.base_dim * spec.dim_mult[-2] * plane
    runs = _clip(spec, frames, changes)
    tiles = encode_tiles(levels_of(spec), grid, height, width)
    walks = [
        _encode_tile(
            spec, tile, _Walk(itemsize, runs, on_cpu, holds=changes is None, lone=frames == 1)
        )
        for tile in tiles
    ]
    largest = max(walks, key=lambda walk: walk.peak_bytes)
    left = largest.runs
    candidates = [largest.items(features=len(left) * features)]
    convolutions = [walk.convolution for walk in walks]
    again = next((at for at, length in enumerate(left) if length > 1), 0)
    for done in {0, min(1, len(left) - 1), min(2, len(left) - 1), again, len(left) - 1}:
        walk = _Walk(itemsize, left[: done + 1], on_cpu, holds=changes is None, lone=frames == 1)
        whole = _encode_whole(spec, latent, walk)
        modes = len(whole.runs) + (frames if done == len(left) - 1 else 0)
        items = whole.items(features=(len(left) - 1 - done) * features)
        candidates.append((*items, ("latents", spec.z_dim * modes * plane)))
        convolutions.append(whole.convolution)
    items = max(candidates, key=lambda found: sum(count for _, count in found))
    picture = _PIXELS * plane * spec.spatial_factor**2
    return VaeBytes((*items, ("picture", picture)), (), max(convolutions))


def _clip(spec: VaeSpec, frames: int, changes: Sequence[int] | None) -> list[int]:
    """Return the lengths of the runs of a clip of so many latent frames."""
    return [length for _, length in clip_runs(1 + (frames - 1) * spec.temporal_factor, changes)]


@dataclass(frozen=True)
class VaeWork:
    """What one pass computes, halos included.

    Attributes:
        flops: floating-point operations, two for each multiply-add.
        elements: read by convolutions: each was normed, activated, enlarged or joined to others.
        pixels: made by convolutions, those that tiles do not keep included.
        calls: convolutions.
    """

    flops: int
    elements: int
    pixels: int
    calls: int

    @classmethod
    def of(cls, walks: Iterable[_Walk]) -> VaeWork:
        """Make it of several walks, one after the other."""
        walks = list(walks)
        return cls(
            sum(walk.flops for walk in walks),
            sum(walk.elements for walk in walks),
            sum(walk.pixels for walk in walks),
            sum(walk.calls for walk in walks),
        )

    def seconds(self, rates: Rates) -> float:
        """On a machine of these rates."""
        return (
            self.flops / (rates.conv_flops or rates.flops)
            + self.elements * (rates.conv_element_s or 0.0)
            + self.pixels * (rates.conv_pixel_s or 0.0)
            + self.calls * (rates.conv_call_s or 0.0)
        )


def residual_work(width: int, side: int) -> VaeWork:
    """Return the work of a residual block that keeps ``width`` channels, on one square frame."""
    walk = _Walk(1, [1], on_cpu=False)
    walk.residual(width, width, (Window.whole(side, side),) * 3)
    return VaeWork.of([walk])


def decode_work(spec: VaeSpec, latent: tuple[int, int, int], grid: TileGrid) -> VaeWork:
    """Return the work of a decoding. Arguments are those of `decode_bytes`."""
    tiles, runs = decode_tiles(levels_of(spec), grid, *latent[1:]), [1] * latent[0]
    walks = [_decode_tile(spec, tile, _Walk(1, runs, on_cpu=False)) for tile in tiles]
    return VaeWork.of((_decode_whole(spec, latent, _Walk(1, runs, on_cpu=False)), *walks))


def encode_work(
    spec: VaeSpec,
    latent: tuple[int, int, int],
    grid: TileGrid,
    *,
    changes: Sequence[int] | None = None,
) -> VaeWork:
    """Return the work of an encoding. Arguments are those of `encode_bytes`."""
    tiles, runs = encode_tiles(levels_of(spec), grid, *latent[1:]), _clip(spec, latent[0], changes)
    walks = [_encode_tile(spec, tile, _Walk(1, runs, on_cpu=False)) for tile in tiles]
    whole = _encode_whole(spec, latent, _Walk(1, walks[0].runs, on_cpu=False))
    return VaeWork.of((whole, *walks))


def _share_past(walks: Sequence[_Walk]) -> None:
    """Let the tiles have one after the other what the largest of them takes."""
    places, room = max(walk.places for walk in walks), max(walk.room for walk in walks)
    for walk in walks:
        walk.past += places - walk.places
        walk.places, walk.room = places, room


def _area(window: Window) -> int:
    return window.shape[0] * window.shape[1]


def _made(before: Window, after: Window) -> int:
    """Return the pixels a 3x3 convolution makes, those it does not keep included."""
    return len(before.rows.convolved(after.rows).made) * len(before.cols.convolved(after.cols).made)


class _Walk:
    """One pass through layers, frame by frame: what is alive at the worst moment.

    Attributes:
        runs: lengths of the runs of equal frames that enter the next layer.
        past: what causal layers remember.
        places: of it, what lies in places of their own.
        room: where they join it; given back while the mid block attends.
        waiting: what other frames on their way hold.
        holds: frames are held, whatever the runs.
        held: a frame that a residual block adds again and again while what is made of it changes.
            One at most: a block takes the next frame when it is done with one, and gets a run when
            those before it are done.
        frame: the storage of the one in hand.
        lone: there is no other frame: what a layer remembers is not there before it computes.
        convolution: the most that the input and the result of a convolution take.
    """

    def __init__(
        self,
        itemsize: int,
        runs: Sequence[int],
        on_cpu: bool,
        holds: bool = False,
        lone: bool = False,
    ) -> None:
        self.itemsize, self.runs, self.on_cpu, self.holds = itemsize, [*runs], on_cpu, holds
        self.lone, self._worst = lone, (0, 0)
        self.past = self.places = self.room = self.waiting = self.held = self.frame = 0
        self.flops = self.elements = self.pixels = self.calls = self.convolution = 0
        self._working = self._attending = 0

    @property
    def worst(self) -> tuple[int, int]:
        """What is remembered at the worst moment, and the most that a layer needs besides."""
        if self.lone:
            return self._worst
        return self.past, max(self.room + self._working, self._attending)

    @property
    def peak_bytes(self) -> int:
        return sum(self.worst)

    def items(self, features: int) -> tuple[tuple[str, int], ...]:
        past, working = self.worst
        return (
            ("features", features),
            ("causal past", past),
            ("working set", working),
        )

    def need(self, *live: int) -> None:
        needed = self.waiting + self.held + sum(live)
        self._working = max(self._working, needed)
        self._worst = max(self._worst, (self.past, self.room + needed), key=sum)

    def need_attending(self, *live: int) -> None:
        needed = self.waiting + self.held + sum(live)
        self._attending = max(self._attending, needed)
        self._worst = max(self._worst, (self.past, needed), key=sum)

    def bytes(self, channels: int, area: int) -> int:
        return channels * area * self.itemsize

    def normalised(self, channels: int, area: int) -> int:
        """Return the bytes besides ``channels`` and the result: lengths, and on a CPU both in
        fp32."""
        wide = channels * area * _WIDE_ITEMSIZE
        copies = 2 * wide if self.on_cpu and self.itemsize < _WIDE_ITEMSIZE else 0
        return area * max(self.itemsize, _WIDE_ITEMSIZE) + copies

    def join(self, channels: int, area: int) -> None:
        """Join the next frame to the two before it, if it is not the first or second."""
        nbytes = self.bytes(channels, area)
        kept = min(CAUSAL_REACH, len(self.runs)) * nbytes
        self.past += kept
        self.places += kept
        self.take(CAUSAL_REACH * nbytes + nbytes)

    def take(self, nbytes: int) -> None:
        self.room = max(self.room, nbytes)

    def convolve(
        self,
        widths: tuple[int, int],
        area: int,
        made: int,
        taps: int,
        *live: int,
        norming: Sequence[int] = (),
    ) -> int:
        """Count a causal convolution; ``taps`` weights a channel pair. Bytes made.

        Args:
            norming: what is alive while a norm writes what it sees; empty: there is no norm.
        """
        self.join(widths[0], area)
        if norming:
            self.need(*norming, self.normalised(widths[0], area))
        self.runs = after_layer(self.runs, CAUSAL_REACH)
        merged = (CAUSAL_REACH + 1) * widths[0], widths[1]
        return self.multiply(merged, area, made, taps // (CAUSAL_REACH + 1), *live)

    def multiply(self, widths: tuple[int, int], area: int, made: int, taps: int, *live: int) -> int:
        """Count a convolution of one picture; ``taps`` weights a channel pair. Bytes made."""
        out = self.bytes(widths[1], made)
        self.need(*live, self.called(widths, area, made, taps))
        self.count(widths, area, made, taps)
        return out

    def called(self, widths: tuple[int, int], area: int, made: int, taps: int) -> int:
        """Return the bytes that a convolution takes with its result."""
        out = self.bytes(widths[1], made)
        self.convolution = max(self.convolution, self.bytes(widths[0], area) + out)
        return call_bytes(widths, area, made, taps, self.itemsize) if self.on_cpu else out

    def count(self, widths: tuple[int, int], area: int, made: int, taps: int) -> None:
        """Its arithmetic, for each run."""
        frames = len(self.runs)
        self.flops += 2 * widths[0] * widths[1] * taps * made * frames
        self.elements += widths[0] * area * frames
        self.pixels += made * frames
        self.calls += frames

    def rescale(self, channels: int, area: int) -> None:
        """Latents into the VAE's own range or out of it: one convolution of single pixels, whose
        bytes are counted elsewhere."""
        self.flops += 2 * channels**2 * area * len(self.runs)
        self.pixels += area * len(self.runs)
        self.calls += len(self.runs)

    def residual(self, width_in: int, width_out: int, windows: Sequence[Window]) -> None:
        x, area_in = self.frame, _area(windows[0])
        holds = self.holds or max(self.runs) > 1
        made = _made(windows[0], windows[1])
        h = self.convolve((width_in, width_out), area_in, made, 27, x, norming=(x,))
        between, kept = _area(windows[1]), _area(windows[2])
        made = _made(windows[1], windows[2])
        h = self.convolve((width_out, width_out), between, made, 27, x, norming=(x, h))
        if width_in != width_out:
            cropped = self.bytes(width_in, kept)
            self.multiply((width_in, width_out), kept, kept, 1, x, h, cropped)
        self.frame = h
        self.held = max(self.held, x if holds else 0)

    def middle(self, width: int, window: Window) -> None:
        self.residual(width, width, (window,) * 3)
        self.attend(width, _area(window))
        self.residual(width, width, (window,) * 3)

    def attend(self, width: int, area: int) -> None:
        x, one, need = self.frame, self.bytes(width, area), self.need_attending
        need(x, one, self.normalised(width, area))
        projected = (width, 3 * width), area, area, 1
        need(x, one, self.called(*projected))
        self.count(*projected)
        need(x, 3 * one, 3 * one)
        wide = max(self.itemsize, _WIDE_ITEMSIZE)
        cast = 2 * width * area * wide if self.itemsize < _WIDE_ITEMSIZE else 0
        chunk = min(QUERY_CHUNK, area)
        queries, keys, scores = (
            count * wide for count in (chunk * width, area * width, chunk * area)
        )
        # The last of it, where half precision was cast: weights, result, and both cast back.
        result = scores // 2 + queries + queries // 2 if cast else 0
        need(x, 3 * one, one, cast, 2 * queries, scores, max(keys, scores, result))
        need(x, one, one, one)
        projected = (width, width), area, area, 1
        need(x, one, self.called(*projected))
        self.count(*projected)
        self.flops += 4 * width * area**2 * len(self.runs)
        self.frame = one

    def head(self, width: int, width_out: int, before: Window, after: Window) -> None:
        area, x = _area(before), self.frame
        holds = self.holds or max(self.runs) > 1
        made = _made(before, after)
        self.frame = self.convolve((width, width_out), area, made, 27, x, norming=(x,))
        self.held = max(self.held, x if holds else 0)


def _decode_whole(spec: VaeSpec, latent: tuple[int, int, int], walk: _Walk) -> _Walk:
    window = Window.whole(*latent[1:])
    width, area = spec.decoder_widths[0], _area(window)
    walk.rescale(spec.z_dim, area)
    latents = walk.bytes(spec.z_dim, area)
    walk.frame = walk.convolve((spec.z_dim, width), area, area, 27, latents)
    walk.middle(width, window)
    given = walk.frame if spec.residual else 0
    for index in range(spec.num_res_blocks + 1):
        walk.residual(width, width, (window,) * 3)
        walk.waiting += given if index == 0 else 0
    if spec.residual:
        walk.need(walk.frame, given + walk.frame)  # joined, beside both
    return walk


def _decode_tile(spec: VaeSpec, tile: DecodeTile, walk: _Walk) -> _Walk:
    if spec.residual:
        return _decode_residual_tile(spec, tile, walk)
    widths = spec.decoder_widths
    # The piece before this one may still be in its reader's hands.
    walk.waiting = walk.bytes(_PIXELS, _made(*tile.levels[-1][-2:]))
    low = tile.tail
    for level, windows in enumerate(tile.levels):
        _enlarge(walk, spec, level, widths[level], low, windows[0])
        width = widths[level] // 2
        for index in range(spec.num_res_blocks + 1):
            walk.residual(width, widths[level + 1], windows[2 * index : 2 * index + 3])
            width = widths[level + 1]
        low = windows[2 * (spec.num_res_blocks + 1)]
    walk.head(widths[-1], _PIXELS, *tile.levels[-1][-2:])
    pixels = _PIXELS * _area(tile.output)
    walk.need(walk.frame, pixels * (walk.itemsize + _WIDE_ITEMSIZE + 2))
    return walk


def _decode_residual_tile(spec: VaeSpec, tile: DecodeTile, walk: _Walk) -> _Walk:
    """As `penstock.engine.families.wan.vae_residual.tile_frames`: each block waits with what it was
    given while its frames go on through those after it."""
    widths = spec.decoder_widths
    widths = (widths[0], *widths)
    area = _area(tile.output)
    walk.waiting = walk.bytes(spec.colours, area)
    low = tile.tail
    for level, windows in enumerate(tile.levels):
        _enlarge(walk, spec, level, widths[level + 1], low, windows[0], widths[level + 1])
        part = -(-windows[0].shape[0] // 2) * -(-windows[0].shape[1] // 2)
        indices = 4 * _INDEX * widths[level + 1]
        walk.need(walk.frame, walk.bytes(widths[level + 1], part), indices)
        width, given = widths[level + 1], walk.frame
        for index in range(spec.num_res_blocks + 1):
            walk.residual(width, widths[level + 2], windows[2 * index : 2 * index + 3])
            walk.waiting += given if index == 0 else 0
            width = widths[level + 2]
        low = windows[2 * (spec.num_res_blocks + 1)]
    walk.waiting -= given
    walk.head(widths[-1], spec.colours, *tile.levels[-1][-2:])
    shuffled = 0 if spec.patch == 1 else walk.bytes(spec.colours, area)
    walk.need(walk.frame, shuffled, spec.colours * area * (walk.itemsize + _WIDE_ITEMSIZE + 2))
    return walk


def _enlarge(
    walk: _Walk,
    spec: VaeSpec,
    level: int,
    width: int,
    low: Window,
    after: Window,
    width_out: int = 0,
) -> None:
    """``width_out``: of the result; 0: half of ``width``."""
    area, frame = _area(low), walk.frame
    if spec.temporal_downsample[::-1][level] and len(walk.runs) > 1:
        walk.runs = walk.runs[1:]  # the first passes by
        # The past is the frames themselves; at the first level they are views of the features.
        walk.past += min(CAUSAL_REACH, len(walk.runs)) * frame
        walk.take((CAUSAL_REACH + 1) * walk.bytes(width, area))
        walk.need(frame)
        merged = (CAUSAL_REACH + 1) * width, 2 * width
        walk.waiting += walk.multiply(merged, area, area, 1)
        walk.runs = [1] * (1 + 2 * len(walk.runs))
        frame = 0
    walk.take(walk.bytes(width, 4 * area))
    made = _made(low.scaled(2), after)
    walk.frame = walk.multiply((width, width_out or width // 2), 4 * area, made, 9, frame)


def _encode_whole(spec: VaeSpec, latent: tuple[int, int, int], walk: _Walk) -> _Walk:
    window = Window.whole(*latent[1:])
    width, area = spec.base_dim * spec.dim_mult[-2], _area(window)
    walk.frame = given = walk.bytes(width, area)
    for index in range(spec.num_res_blocks):
        walk.residual(width, spec.base_dim * spec.dim_mult[-1], (window,) * 3)
        walk.waiting += given if spec.residual and index == 0 else 0
        width = spec.base_dim * spec.dim_mult[-1]
    if spec.residual:
        walk.need(walk.frame, 2 * given, walk.frame)
        walk.waiting -= given
    walk.middle(width, window)
    walk.head(width, 2 * spec.z_dim, window, window)
    walk.need(walk.frame, walk.frame, walk.frame)
    walk.rescale(2 * spec.z_dim, area)
    return walk


def _encode_tile(spec: VaeSpec, tile: EncodeTile, walk: _Walk) -> _Walk:
    width, first = spec.base_dim, tile.levels[0]
    pixels = walk.bytes(spec.colours, _area(first[0]))
    made = _made(first[0], first[1])
    widths = spec.colours, width
    walk.frame = walk.convolve(widths, _area(first[0]), made, 27, pixels)
    walk.held = pixels if walk.holds else walk.itemsize  # a frame of zeros is one element
    for level, windows in enumerate(tile.levels):
        width_out, at = spec.base_dim * spec.dim_mult[level], 1 if level == 0 else 0
        given, narrow = walk.frame, width
        for index in range(spec.num_res_blocks):
            walk.residual(width, width_out, windows[at : at + 3])
            walk.waiting += given if spec.residual and index == 0 else 0
            width, at = width_out, at + 2
        in_time = spec.temporal_downsample[level]
        # A VAE with shortcuts encodes one frame, and nothing of it in time
        _reduce(walk, in_time and not spec.residual, width, windows[-2], windows[-1])
        if spec.residual:
            seen = walk.bytes(narrow, 4 * _area(windows[-1])) * (2 if in_time else 1)
            walk.need(walk.frame, 2 * seen, walk.frame)
            walk.waiting -= given
    return walk


def _reduce(walk: _Walk, in_time: bool, width: int, before: Window, made: Window) -> None:
    rows, cols = 2 * len(made.rows) + 1, 2 * len(made.cols) + 1
    read, copied = walk.bytes(width, rows * cols), 0
    if before.shape != (rows, cols):
        walk.take(read)
    else:
        copied = read  # of a crop, before it is convolved
    out = walk.multiply((width, width), rows * cols, _area(made), 9, walk.frame, copied)
    walk.frame = out
    if in_time:
        # The last frame and the one that waits for its pair.
        walk.past += 2 * out
        walk.take(3 * out)
        left = after_halving(walk.runs)
        walk.runs = left[1:]
        if walk.runs:
            walk.multiply((3 * width, width), _area(made), _area(made), 1, out)
        walk.runs = left
