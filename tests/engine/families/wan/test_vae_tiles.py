"""Tiled decoding and encoding equal diffusers' own on whole frames, and tiles are no larger than
they must be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from penstock.engine.families.wan import vae_decode, vae_encode, vae_layers
from penstock.engine.families.wan.vae_decode import decode_frames, decode_tiled, to_uint8
from penstock.engine.families.wan.vae_encode import encode_tiled, first_frame_then_zeros
from penstock.errors import CheckpointError, JobCancelled, RequestError
from penstock.profiles.tiling import (
    DecodeTile,
    EncodeTile,
    Span,
    TileGrid,
    VaeLevels,
    Window,
    decode_tiles,
    encode_tiles,
)
from tests.engine.families.wan.tiny_vae import tiny_vae, whole_decode, whole_encode

EXACT = 1e-10
CASES = [
    # num_res_blocks, latents (t, h, w), grid
    (2, (1, 5, 7), (1, 1)),
    (1, (3, 9, 13), (2, 2)),
    (2, (2, 11, 17), (3, 2)),
    (2, (4, 9, 11), (4, 4)),
    (1, (2, 13, 3), (4, 1)),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def latents_of(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def clip_of(frames: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return (torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1).to(dtype)


def assembled(vae, latents: Tensor, grid: TileGrid) -> Tensor:
    """The tiled video as floats; pixels that no piece reached are NaN."""
    frames = 1 + 4 * (latents.shape[2] - 1)
    height, width = (8 * side for side in latents.shape[-2:])
    video = torch.full((3, frames, height, width), torch.nan, dtype=latents.dtype)
    for piece in decode_tiled(vae, latents, grid):
        rows, cols = piece.window.inside(Window.whole(height, width))
        assert video[:, piece.frame, rows, cols].isnan().all()
        video[:, piece.frame, rows, cols] = piece.pixels
    return video[None]


def crop(clip: Tensor) -> Callable[[int, Window], Tensor]:
    def pixels(frame: int, window: Window) -> Tensor:
        rows, cols = window.inside(Window.whole(*clip.shape[-2:]))
        return clip[:, :, frame : frame + 1, rows, cols]

    return pixels


@pytest.mark.parametrize(("blocks", "shape", "grid"), CASES)
def test_decoded_tiles_equal_whole_frames(blocks, shape, grid) -> None:
    vae, latents = tiny_vae(num_res_blocks=blocks), latents_of(shape)
    whole = whole_decode(vae, latents)
    assert 0.02 < whole.std() < 0.8 and (whole.abs() == 1).float().mean() < 0.2
    assert (assembled(vae, latents, TileGrid(*grid)) - whole).abs().max() < EXACT


@pytest.mark.parametrize(("blocks", "shape", "grid"), CASES)
def test_encoded_tiles_equal_whole_frames(blocks, shape, grid) -> None:
    vae = tiny_vae(num_res_blocks=blocks)
    clip = clip_of(1 + 4 * (shape[0] - 1), 8 * shape[1], 8 * shape[2])
    tiled = encode_tiled(vae, crop(clip), clip.shape[2:], TileGrid(*grid))
    whole = whole_encode(vae, clip)
    assert tiled.shape == whole.shape and whole.std() > 0.05
    assert (tiled - whole).abs().max() < EXACT


@pytest.mark.parametrize(
    "config",
    [
        {"dim_mult": [1, 2], "temperal_downsample": [True]},
        {"dim_mult": [1, 3, 2], "temperal_downsample": [True, False]},
        {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [True, False, True], "base_dim": 6},
    ],
)
def test_other_depths(config) -> None:
    vae = tiny_vae(num_res_blocks=1, **config)
    temporal, spatial = 1 << sum(config["temperal_downsample"]), 1 << len(config["dim_mult"]) - 1
    latents = latents_of((3, 7, 9))
    pieces = list(decode_tiled(vae, latents, TileGrid(2, 3)))
    whole = whole_decode(vae, latents)
    assert max(piece.frame for piece in pieces) == 2 * temporal
    for piece in pieces:
        rows, cols = piece.window.inside(Window.whole(7 * spatial, 9 * spatial))
        assert (piece.pixels - whole[0, :, piece.frame, rows, cols]).abs().max() < EXACT
    if temporal == 4:  # diffusers cuts every clip into chunks of four frames
        clip = clip_of(9, 7 * spatial, 9 * spatial)
        tiled = encode_tiled(vae, crop(clip), clip.shape[2:], TileGrid(2, 3))
        assert (tiled - whole_encode(vae, clip)).abs().max() < EXACT


def test_conditioning_clip_is_the_first_frame_then_zeros() -> None:
    vae, clip = tiny_vae(num_res_blocks=1), torch.zeros(1, 3, 13, 72, 88, dtype=torch.float64)
    clip[:, :, :1] = clip_of(1, 72, 88)
    source = first_frame_then_zeros(clip[0, :, 0])
    tiled = encode_tiled(vae, source, (13, 72, 88), TileGrid(2, 2))
    assert (tiled - whole_encode(vae, clip)).abs().max() < EXACT


# What is equal in a row is computed once, and the result is the same to the bit.

LONG = 97
"""Frames after which even the last layer's results are steady, with one residual block a level."""


def still_clip(changes, frames: int, dtype: torch.dtype) -> Tensor:
    clip = clip_of(frames, 32, 24, dtype)
    for frame in range(1, frames):
        if frame not in changes:
            clip[:, :, frame] = clip[:, :, frame - 1]
    return clip


MANY = (0, 1, 2, 30, 31, 33, 60)
OFTEN = [
    ((1, 1), torch.float32, (0, 1)), ((1, 1), torch.bfloat16, MANY),
    ((1, 1), torch.float32, (0,)), ((1, 1), torch.bfloat16, (0, 4, 96)),
    ((2, 2), torch.float32, MANY), ((2, 2), torch.bfloat16, (0, 1, LONG - 1)),
]  # fmt: skip
"""Each way in which frames may change, each grid and dtype; together in `make faults`."""


@pytest.mark.parametrize(
    ("grid", "dtype", "changes"),
    [
        case if case in OFTEN else pytest.param(*case, marks=pytest.mark.faults)
        for case in product(
            [(1, 1), (2, 2)],
            [torch.float32, torch.bfloat16],
            [(0, 1), (0, 1, LONG - 1), (0,), MANY, (0, 4, 96)],
        )
    ],
)
def test_equal_frames_are_encoded_once_to_the_same_bits(changes, grid, dtype) -> None:
    vae, clip = tiny_vae(dtype, num_res_blocks=1), still_clip(changes, LONG, dtype)
    args = vae, crop(clip), clip.shape[2:], TileGrid(*grid)
    every, once = Calls(), Calls()
    with every:
        expected = encode_tiled(*args)
    with once:
        found = encode_tiled(*args, changes=changes)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert once.convolutions < 0.75 * every.convolutions


def test_the_first_frame_and_zeros_take_a_quarter_of_the_work() -> None:
    vae, image = tiny_vae(torch.float32), clip_of(1, 16, 16, torch.float32)[0, :, 0]
    args = vae, first_frame_then_zeros(image), (81, 16, 16), TileGrid(1, 1)
    with FlopCounterMode(display=False) as every:
        expected = encode_tiled(*args)
    with FlopCounterMode(display=False) as once:
        found = encode_tiled(*args, changes=(0, 1))
    assert torch.equal(found, expected)
    assert once.get_total_flops() < 0.28 * every.get_total_flops()


class Calls(TorchDispatchMode):
    """Counts convolutions."""

    convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func.overloadpacket == torch.ops.aten.convolution
        return func(*args, **(kwargs or {}))


REACHING = 8
"""Layers of an encoder with one residual block a level that see frames before."""


@pytest.mark.parametrize("layer", range(REACHING))
def test_a_reach_one_short_shows(monkeypatch, layer) -> None:
    vae, clip = tiny_vae(num_res_blocks=1), still_clip((0, 1), LONG, torch.float64)
    args = vae, crop(clip), clip.shape[2:], TileGrid(1, 1)
    expected, made = encode_tiled(*args), 0

    class Short(vae_layers.through):
        def __init__(self, step, runs, reach=0):
            nonlocal made
            super().__init__(step, runs, reach - (reach > 0 and made == layer))
            made += reach > 0

    for module in (vae_layers, vae_encode):
        monkeypatch.setattr(module, "through", Short)
    found = encode_tiled(*args, changes=(0, 1))
    assert made == REACHING and not torch.equal(found, expected)


class Fresh(TorchDispatchMode):
    """Keeps track of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.living: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty) or not any(
            each.alias_info for each in func._schema.returns
        ):
            self.living.update(
                leaf.untyped_storage() for leaf in tree_iter(made) if isinstance(leaf, Tensor)
            )
        return made


def test_nothing_new_outlives_a_frame_when_the_past_is_full() -> None:
    vae, window = tiny_vae(torch.float32, num_res_blocks=1), Window.whole(9, 7)
    block, past = vae.decoder.up_blocks[1].resnets[0], vae_layers.Past()
    frames = torch.randn(1, block.in_dim, 6, 9, 7).split(1, dim=2)
    living = []
    for frame in frames:
        with torch.no_grad(), Fresh() as fresh:
            vae_layers.residual(block, past, (window,) * 3, frame)
        living.append(len(fresh.living))
    assert living == [3, 2, 0, 0, 0, 0]  # a place for each convolution, twice, and the room


# One pixel less of halo at one level, on one side, must show.


def shortened(span: Span, side: str, size: int) -> Span:
    if side == "lo":
        return Span(span.lo + 1, span.hi) if span.lo > 0 else span
    return Span(span.lo, span.hi - 1) if span.hi < size else span


def clipped(window: Window, limit: Window) -> Window:
    spans = [
        Span(max(a.lo, b.lo), min(a.hi, b.hi))
        for a, b in ((window.rows, limit.rows), (window.cols, limit.cols))
    ]
    return Window(*spans)


def short_window(window: Window, axis: str, side: str, size: tuple[int, int]) -> Window:
    return replace(window, **{axis: shortened(getattr(window, axis), side, size[axis == "cols"])})


def short_decode_tile(tile: DecodeTile, level: int, axis: str, side: str, size) -> DecodeTile:
    tail = short_window(tile.tail, axis, side, size) if level == 0 else tile.tail
    levels, limit = [], tail.scaled(2)
    for at, windows in enumerate(tile.levels, start=1):
        full = size[0] << at, size[1] << at
        entry = short_window(windows[0], axis, side, full) if level == at else windows[0]
        kept = [clipped(entry, limit)]
        for window in windows[1:]:
            kept.append(clipped(window, kept[-1]))
        levels.append(tuple(kept))
        limit = kept[-1].scaled(2)
    return DecodeTile(tail, tuple(levels))


def short_encode_tile(tile: EncodeTile, level: int, axis: str, side: str, size) -> EncodeTile:
    levels = list(tile.levels)
    full = size[0] * 8 >> level, size[1] * 8 >> level
    kept = [short_window(levels[level][0], axis, side, full)]
    for window in levels[level][1:-1]:
        kept.append(clipped(window, kept[-1]))
    levels[level] = (*kept, levels[level][-1])
    return EncodeTile(tuple(levels))


SIDES = [("rows", "lo"), ("rows", "hi"), ("cols", "lo"), ("cols", "hi")]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("axis", "side"), SIDES)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_decoding_breaks_with_a_halo_one_short(monkeypatch, blocks, level, axis, side) -> None:
    size, grid = (19, 18), TileGrid(2, 2)
    vae, latents = tiny_vae(num_res_blocks=blocks), latents_of((1, *size))
    whole = whole_decode(vae, latents)
    tiles = decode_tiles(VaeLevels(4, blocks), grid, *size)
    short = [short_decode_tile(tile, level, axis, side, size) for tile in tiles]
    assert short != tiles and [t.output for t in short] == [t.output for t in tiles]
    monkeypatch.setattr(vae_decode, "decode_tiles", lambda *_: short)
    assert (assembled(vae, latents, grid) - whole).abs().max() > EXACT


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("axis", "side"), SIDES)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_encoding_breaks_with_a_halo_one_short(monkeypatch, blocks, level, axis, side) -> None:
    size, grid = (13, 12), TileGrid(2, 2)
    vae, clip = tiny_vae(num_res_blocks=blocks), clip_of(1, 8 * size[0], 8 * size[1])
    tiles = encode_tiles(VaeLevels(4, blocks), grid, *size)
    short = [short_encode_tile(tile, level, axis, side, size) for tile in tiles]
    assert short != tiles
    monkeypatch.setattr(vae_encode, "encode_tiles", lambda *_: short)
    if level > 0:
        monkeypatch.setattr(vae_encode, "_tile_frames", _cropping(vae_encode._tile_frames))
    tiled = encode_tiled(vae, crop(clip), clip.shape[2:], grid)
    assert (tiled - whole_encode(vae, clip)).abs().max() > EXACT


def _cropping(run):
    """Crops between levels; exact tiles never need it, a level makes what the next one reads."""

    def tile_frames(encoder, frames, tile, patch_size):
        halved = vae_encode.halved_size
        entries = {
            level[-1]: after[0] for level, after in zip(tile.levels, tile.levels[1:], strict=False)
        }

        def cropped(downsampler, past, before, after, frame):
            out = halved(downsampler, past, before, after, frame)
            rows, cols = entries.get(after, after).inside(after)
            return out[..., rows, cols]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vae_encode, "halved_size", cropped)
            return run(encoder, frames, tile, patch_size)

    return tile_frames


# What diffusers' pipeline would have shown.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_equal_those_of_diffusers(dtype) -> None:
    vae, latents = tiny_vae(dtype, num_res_blocks=2), latents_of((3, 9, 13), dtype)
    frames = VideoProcessor().postprocess_video(whole_decode(vae, latents), "pil")[0]
    expected = torch.stack(
        [torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in frames]
    ).view(9, 72, 104, 3)
    found = decode_frames(vae, latents, TileGrid(3, 2))
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (1 if dtype == torch.float32 else 6)
    assert (difference > 0).float().mean() < (0.001 if dtype == torch.float32 else 0.3)


def test_layers_on_whole_frames_are_bit_equal_in_fp32() -> None:
    vae = tiny_vae(torch.float32, num_res_blocks=1)
    block, window = vae.decoder.up_blocks[1].resnets[0], Window.whole(9, 7)
    frames = torch.randn(1, block.in_dim, 3, 9, 7)
    past = vae_layers.Past()
    cache: list[Tensor | None] = [None] * 3
    with torch.no_grad():
        for frame in frames.split(1, dim=2):
            ours = vae_layers.residual(block, past, (window,) * 3, frame)
            assert torch.equal(ours, block(frame, feat_cache=cache, feat_idx=[0]))


def test_rounding_is_that_of_the_video_processor() -> None:
    pixels = torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(3, 64, 64)
    expected = VideoProcessor().postprocess(pixels[None], "pil")[0]
    assert to_uint8(pixels).numpy().tobytes() == expected.tobytes()


# Encoder and decoder are loaded apart; work can be stopped; the rest is refused.


def test_decoding_touches_only_the_decoder() -> None:
    vae, latents = tiny_vae(num_res_blocks=1), latents_of((2, 4, 4))
    expected = assembled(vae, latents, TileGrid(2, 1))
    vae.encoder.to("meta"), vae.quant_conv.to("meta")
    assert torch.equal(assembled(vae, latents, TileGrid(2, 1)), expected)


def test_encoding_touches_only_the_encoder() -> None:
    vae, clip = tiny_vae(num_res_blocks=1), clip_of(5, 32, 32)
    expected = encode_tiled(vae, crop(clip), clip.shape[2:], TileGrid(1, 2))
    vae.decoder.to("meta"), vae.post_quant_conv.to("meta")
    assert torch.equal(encode_tiled(vae, crop(clip), clip.shape[2:], TileGrid(1, 2)), expected)


@pytest.mark.parametrize("calls", [1, 3, 9])
def test_should_stop_ends_the_work(calls) -> None:
    vae, clip, count = tiny_vae(num_res_blocks=1), clip_of(9, 16, 16), 0

    def should_stop() -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        decode_frames(vae, latents_of((3, 2, 2)), TileGrid(2, 1), should_stop=should_stop)
    assert count == calls
    count = 0
    with pytest.raises(JobCancelled):
        encode_tiled(vae, crop(clip), (9, 16, 16), TileGrid(2, 1), should_stop=should_stop)
    assert count == calls


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"patch_size": 2, "in_channels": 12, "out_channels": 12}, "patch_size=2"),
        ({"decoder_base_dim": 8}, "decoder_base_dim=8"),
        ({"attn_scales": [1.0]}, "attn_scales=[1.0]"),
    ],
)
def test_other_vaes_are_refused(config, named) -> None:
    with torch.device("meta"):
        vae = tiny_vae(num_res_blocks=1, **config)
    with pytest.raises(CheckpointError, match="not a Wan 2.1 VAE") as caught:
        next(decode_tiled(vae, latents_of((1, 2, 2)), TileGrid(1, 1)))
    assert named in str(caught.value)


@pytest.mark.parametrize("size", [(4, 16, 16), (0, 16, 16), (5, 12, 16), (5, 16, 20)])
def test_clips_that_do_not_divide_are_refused(size) -> None:
    with pytest.raises(RequestError, match="does not divide"):
        encode_tiled(tiny_vae(num_res_blocks=1), crop(clip_of(5, 16, 16)), size, TileGrid(1, 1))
