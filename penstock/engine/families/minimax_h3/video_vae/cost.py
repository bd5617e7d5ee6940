"""What the video VAE takes, in closed form, and its two phases in a plan.

Bytes are those of live tensors other than weights at the worst moment of the modules beside this
file: never under what is measured, and within 5 % of it at the true shapes. FLOPs count a
multiply-add as two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from penstock.engine.families.minimax_h3.terms import (
    condition_bytes,
    latents_bytes,
    latents_of,
    pictures_of,
    state_bytes,
)
from penstock.engine.families.minimax_h3.video_vae.spec import ClipVaeSpec
from penstock.engine.families.minimax_h3.video_vae.tiles import Axis, Tiling
from penstock.errors import RequestError
from penstock.profiles.phases import OBJECTS, Group, best_of, group_key, loading_s
from penstock.profiles.plan import Items, PhasePlan
from penstock.profiles.policy import Limits
from penstock.profiles.streams import (
    Network,
    Pace,
    Stream,
    best_stream,
    least_streams,
    staging_bytes,
)

if TYPE_CHECKING:
    from penstock.engine.families.minimax_h3.terms import H3Case

_SINGLE = 4  # bytes of an fp32
_COLOURS = 3

PASSES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
"""Visits to each of the decoder's blocks that are tried: each serves its share of the tiles. All of
them at once read the weights once; one at a time take the least memory."""


READING_COST = 0.01
"""Share of the fastest time that may be spent to read fewer weights: a disk has other users."""


def encode_bytes(spec: ClipVaeSpec, height: int, width: int) -> int:
    """Return the peak bytes of activations while a picture is encoded, its pixels included."""
    rows, columns = (Axis.over(size, spec.spatial_factor) for size in (height, width))
    moments = 2 * spec.z_dim * (rows.size // spec.spatial_factor) * (
        columns.size // spec.spatial_factor
    )  # fmt: skip
    beside = 0 if rows.count == columns.count == 1 else 2 * moments * _SINGLE
    pixels = _COLOURS * height * width * (_SINGLE + 1)
    return pixels + beside + tile_encode_bytes(spec, rows.length, columns.length)


def tile_encode_bytes(spec: ClipVaeSpec, height: int, width: int) -> int:
    """Return the peak bytes while the CNN encodes one tile. A convolution in time sees two frames
    of zeros before the one there is."""
    most, into = _convolved(_COLOURS, spec.widths[0], height, width, 0), spec.widths[0]
    for out, temporal, spatial in zip(spec.widths, spec.temporal, spec.spatial, strict=True):
        for _ in range(spec.layers):
            most = max(most, _resnet(into, out, height, width))
            into = out
        if temporal * spatial > 1:
            wider = (height + 1) * (width + 1) if spatial == 2 else height * width
            below = -(-height // spatial), -(-width // spatial)
            most = max(
                most, out * (height * width + max(4 * wider, 3 * wider + below[0] * below[1]))
            )
            height, width = below
    last = _convolved(into, 2 * spec.z_dim, height, width, into * height * width)
    return max(most, last) * _SINGLE


def _resnet(into: int, out: int, height: int, width: int) -> int:
    """Return the elements: the input; what the first convolution gave; the second at work."""
    area = height * width
    first = _convolved(into, out, height, width, into * area)
    second = _convolved(out, out, height, width, (into + out) * area)
    return max(first, second)


def _convolved(into: int, out: int, height: int, width: int, held: int) -> int:
    """Return the elements: what is held, the input, the same with its borders, and with two frames
    before."""
    area, wider = height * width, (height + 2) * (width + 2)
    return held + into * area + max(4 * into * wider, 3 * into * wider + out * area)


def encode_flops(spec: ClipVaeSpec, height: int, width: int) -> int:
    """Return the FLOPs of encoding a picture, zeros before it included."""
    rows, columns = (Axis.over(size, spec.spatial_factor) for size in (height, width))
    high, wide, into, total = rows.length, columns.length, spec.widths[0], 0
    total += 27 * _COLOURS * into * high * wide
    for out, temporal, spatial in zip(spec.widths, spec.temporal, spec.spatial, strict=True):
        for _ in range(spec.layers):
            total += (27 * out * (into + out) + (into * out if into != out else 0)) * high * wide
            into = out
        if temporal * spatial > 1:
            high, wide = -(-high // spatial), -(-wide // spatial)
            total += 27 * out * out * high * wide
    total += 27 * into * 2 * spec.z_dim * high * wide
    return 2 * total * rows.count * columns.count


def tokens_of(spec: ClipVaeSpec, tiling: Tiling) -> int:
    """Count the tokens of a tile, those that stand for no latent included."""
    return tiling.tokens + spec.registers + 1


def held_bytes(spec: ClipVaeSpec, tiling: Tiling, tiles: int) -> int:
    """Return the states of so many tiles, fp32."""
    return tiles * tokens_of(spec, tiling) * spec.width * _SINGLE


def tile_bytes(spec: ClipVaeSpec, tiling: Tiling, itemsize: int | None = None) -> int:
    """Return the peak bytes of activations while one tile goes through the decoder, beside the
    states that are held."""
    item = itemsize or spec.decoder.itemsize
    tokens = tokens_of(spec, tiling)
    states = tokens * spec.width
    waves = 2 * tokens * spec.turned * item
    clips = tiling.clips
    pixels = (
        _COLOURS * clips.length * clips.factor * tiling.rows.length * tiling.columns.length * item
    )
    beside = tokens * spec.factor_volume * _COLOURS * item - pixels
    feed = (1 + 3 * spec.ffn_mult) * states * item
    wide = _SINGLE if item < _SINGLE else 0
    placed = 3 * item + 2 * wide + max(_SINGLE, item)
    attended = max(4 * item + wide, placed + 2 * item) * states
    return waves + max(
        feed,
        attended,
        (2 * item + wide) * states,
        states * item + 2 * pixels + max(0, beside),
    )


def canvas_bytes(tiling: Tiling, itemsize: int) -> int:
    """Return the most that laying tiles into clips and clips into frames holds in RAM, a tile's
    pixels included and the video's own frames not."""
    rows, columns, clips = tiling.rows, tiling.columns, tiling.clips
    deep = _COLOURS * clips.length * clips.factor * itemsize
    whole, tile = deep * rows.size * columns.size, deep * rows.length * columns.length
    tail = whole // (clips.length * clips.factor) * clips.tail
    below = deep * max(rows.overlaps, default=0) * columns.length
    beside = deep * max(columns.overlaps, default=0) * rows.length
    strips = (columns.count + 1) * below + 2 * beside + 3 * max(below, beside)
    frame = _COLOURS * rows.size * columns.size * _SINGLE
    return whole + tile + max(strips + tail, 4 * tail, tail + 2 * frame) + 4096


def decode_flops(spec: ClipVaeSpec, tiling: Tiling) -> int:
    """Return the FLOPs of decoding all tiles."""
    tokens, width = tokens_of(spec, tiling), spec.width
    linear = width * width * (4 + 3 * spec.ffn_mult)
    layer = tokens * (linear + 2 * tokens * width)
    ends = tokens * width * (spec.z_dim + _COLOURS * spec.factor_volume)
    return 2 * tiling.count * (len(spec.decoder.block_bytes) * layer + ends)


def encode_step(case: H3Case) -> EncodePictures:
    """Return the phase "encode"."""
    return EncodePictures(case)


def decode_step(case: H3Case) -> DecodeTiles:
    """Return the phase "decode".

    Raises:
        RequestError: other tiles than the makers' are asked for.
    """
    if case.policy.tiles is not None:
        raise RequestError(
            "the tiles of MiniMax-H3's VAE are the makers' own",
            expected="no --tiles",
            found="{}x{}".format(*case.policy.tiles),
            remedy="Leave --tiles out: they overlap and blend, and others give another picture.",
        )
    return DecodeTiles(case)


@dataclass(frozen=True)
class EncodePictures:
    """The encoder over the given pictures, one after the other."""

    case: H3Case

    @property
    def phases(self) -> tuple[str, ...]:
        """As `penstock.profiles.phases.Step`."""
        return ("encode",)

    def best(self, limits: Limits) -> Group | None:
        """As `penstock.profiles.phases.Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `penstock.profiles.phases.Step`: there is one way."""
        case, spec = self.case, self.case.manifest.vae
        shape, count = case.workload.shape, pictures_of(case)
        weights = spec.encoder.rest_bytes
        work = encode_bytes(spec, shape.height, shape.width)
        convolution = 5 * spec.widths[0] * 258 * 258 * _SINGLE
        held = (
            ("text states", state_bytes(case)),
            ("pictures", count * _COLOURS * shape.height * shape.width),
            ("condition", 3 * condition_bytes(case)),
            OBJECTS,
        )
        room = limits.ram_bytes - sum(nbytes for _, nbytes in held)
        flops = count * encode_flops(spec, shape.height, shape.width)
        yield (
            PhasePlan(
                "encode",
                weights=(("VAE encoder", weights),),
                work=(("activations", work), *case.libraries(convolution)),
                ram_weights=(("weights staging", staging_bytes(weights, room)),),
                ram_work=held,
                read_bytes=weights,
                copied_bytes=weights,
                seconds=flops / case.rates.flops + loading_s(weights, case.rates),
            ),
        )


def _told(tiles: int, groups: int) -> str:
    passes = "one pass" if groups == 1 else f"{groups} passes"
    return f"the makers' {tiles} overlapping tiles in {passes} over the decoder's blocks"


@dataclass(frozen=True)
class DecodeTiles:
    """The decoder over its tiles: all of a group go through a block in one visit."""

    case: H3Case

    @property
    def phases(self) -> tuple[str, ...]:
        """As `penstock.profiles.phases.Step`."""
        return ("decode",)

    def best(self, limits: Limits) -> Group | None:
        """As `penstock.profiles.phases.Step`."""
        found: list[PhasePlan] = []
        for passes in self._passes:
            stream = self._stream(passes, limits)
            if stream is not None:
                found.append(self._phase(passes, stream, limits))
        if not found:
            return None
        fast = (1 + READING_COST) * min(phase.seconds for phase in found)
        near = (phase for phase in found if phase.seconds <= fast)
        return (min(near, key=lambda each: (each.read_bytes, group_key((each,)))),)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `penstock.profiles.phases.Step`."""
        for passes in {self._passes[0], self._passes[-1]}:
            from_disk = self.case.policy.disk != "never"
            for stream in least_streams(self._network, from_disk=from_disk):
                yield (self._phase(passes, stream, limits),)

    @cached_property
    def _tiling(self) -> Tiling:
        sizes = latents_of(self.case)
        return self.case.manifest.vae.tiling((sizes.frames, sizes.height, sizes.width))

    @cached_property
    def _passes(self) -> tuple[int, ...]:
        count = self._tiling.count
        return (*(each for each in PASSES if each < count), count)

    @cached_property
    def _network(self) -> Network:
        return Network.of(self.case.manifest.vae.decoder.block_bytes)

    def _size(self, passes: int) -> int:
        """Return the tiles of a group."""
        return -(-self._tiling.count // passes)

    def _work(self, passes: int) -> Items:
        spec, latents = self.case.manifest.vae, latents_bytes(self.case)
        activations = tile_bytes(spec, self._tiling)
        return (
            ("tiles", held_bytes(spec, self._tiling, self._size(passes))),
            ("activations", activations + latents),
            *spec.storage.items,
            *self.case.libraries(),
        )

    @cached_property
    def _host_work(self) -> Items:
        spec, shape = self.case.manifest.vae, self.case.workload.shape
        return (
            ("latents", 2 * latents_bytes(self.case)),
            ("video frames", _COLOURS * shape.frames * shape.height * shape.width),
            ("clips", canvas_bytes(self._tiling, spec.decoder.itemsize)),
            OBJECTS,
        )

    def _stream(self, passes: int, limits: Limits) -> Stream | None:
        case, spec = self.case, self.case.manifest.vae
        vram = sum(count for _, count in self._work(passes)) + spec.decoder.rest_bytes
        ram = sum(count for _, count in self._host_work)
        room = limits.beside(vram, ram, pins=case.pins)
        pace = Pace(self._compute_s / passes, passes)
        return best_stream(
            self._network, pace, case.rates, room, from_disk=case.policy.disk != "never"
        )

    @cached_property
    def _compute_s(self) -> float:
        case, spec = self.case, self.case.manifest.vae
        layers = len(spec.decoder.block_bytes) * self._tiling.count
        elements = layers * tokens_of(spec, self._tiling) * spec.width
        return (
            decode_flops(spec, self._tiling) / case.rates.flops
            + layers * case.rates.overhead_s
            + elements * case.rates.element_s
        )

    def _host_weights(self, stream: Stream, room: int) -> Items:
        """Return the items in RAM: what is outside the blocks comes before the stream opens."""
        streamed = stream.host_items(room)
        staged = staging_bytes(self.case.manifest.vae.decoder.rest_bytes, room)
        if sum(count for _, count in streamed) >= staged:
            return streamed
        return (("weights staging", staged),)

    def _phase(self, passes: int, stream: Stream, limits: Limits) -> PhasePlan:
        spec, place = self.case.manifest.vae, stream.placement
        size = self._size(passes)
        groups = -(-self._tiling.count // size)
        rest = spec.decoder.rest_bytes
        room = limits.ram_bytes - sum(count for _, count in self._host_work)
        return PhasePlan(
            "decode",
            weights=(("VAE decoder outside its blocks", rest), *stream.device_items),
            work=self._work(passes),
            ram_weights=self._host_weights(stream, room),
            ram_work=self._host_work,
            stream=stream.plan,
            tiles=(groups, size),
            pinned_bytes=stream.pinned_bytes if self.case.pins else 0,
            read_bytes=rest + place.device_bytes + place.host_bytes + groups * place.read_bytes,
            copied_bytes=rest + place.device_bytes + groups * place.copied_bytes,
            seconds=stream.timing.seconds + loading_s(rest, self.case.rates),
            bound=stream.timing.bound,
            facts=(_told(self._tiling.count, groups),),
        )
