"""Predicted bytes and arithmetic of the VAE against what torch operations do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from penstock.engine.families.wan.cost.vae import (
    VaeWork,
    decode_bytes,
    decode_work,
    encode_bytes,
    encode_work,
)
from penstock.engine.families.wan.spec import VaeSpec
from penstock.engine.families.wan.vae_decode import decode_frames, decode_tiled
from penstock.engine.families.wan.vae_encode import encode_tiled, first_frame_then_zeros
from penstock.profiles.manifest import Weights
from penstock.profiles.phases import FIRST_FRAME
from penstock.profiles.rates import Rates
from penstock.profiles.tiling import TileGrid
from tests.engine.families.wan.tiny_vae import tiny_vae
from tests.meter import StorageMeter, allocated_peak

NONE = Weights(0, (), 2)
WAN = VaeSpec(NONE, NONE, 96, 16, (1, 2, 4, 4), 2, (False, True, True))
BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]


@st.composite
def cases(draw):
    depth = draw(st.sampled_from([4, 3, 2]))
    spec = VaeSpec(
        NONE,
        NONE,
        draw(st.sampled_from([2, 4, 6])),
        draw(st.sampled_from([2, 4, 16])),
        tuple(draw(st.lists(st.sampled_from([1, 2, 4]), min_size=depth, max_size=depth))),
        draw(st.sampled_from([1, 2])),
        tuple(draw(st.lists(st.booleans(), min_size=depth - 1, max_size=depth - 1))),
    )
    latent = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(2, 4))
    grid = TileGrid(
        draw(st.integers(1, min(2, latent[1]))), draw(st.integers(1, min(2, latent[2])))
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return spec, latent, grid, dtype, draw(st.sampled_from(BACKENDS))


def vae_of(spec: VaeSpec, dtype: torch.dtype):
    return tiny_vae(
        dtype,
        base_dim=spec.base_dim,
        z_dim=spec.z_dim,
        dim_mult=list(spec.dim_mult),
        num_res_blocks=spec.num_res_blocks,
        temperal_downsample=list(spec.temporal_downsample),
    )


def run_decode(vae, spec: VaeSpec, latent, grid: TileGrid, dtype: torch.dtype) -> None:
    for piece in decode_tiled(vae, torch.zeros(1, spec.z_dim, *latent, dtype=dtype), grid):
        del piece


def run_encode(
    vae, spec: VaeSpec, latent, grid: TileGrid, dtype: torch.dtype, changes=FIRST_FRAME
) -> None:
    frames = 1 + (latent[0] - 1) * spec.temporal_factor
    size = latent[1] * spec.spatial_factor, latent[2] * spec.spatial_factor
    picture = torch.zeros(3, *size, dtype=dtype)
    encode_tiled(vae, first_frame_then_zeros(picture), (frames, *size), grid, changes=changes)


encode_first_bytes = partial(encode_bytes, changes=FIRST_FRAME)
encode_first_work = partial(encode_work, changes=FIRST_FRAME)


JOINING = VaeSpec(NONE, NONE, 2, 2, (1, 2), 1, (False,))
"""So narrow that joining the latents is the encoder's peak."""


@settings(max_examples=8, deadline=None)
@given(case=cases())
@example(case=(JOINING, (3, 2, 2), TileGrid(1, 1), torch.bfloat16, SDPBackend.MATH))
def test_measured_bytes_never_pass_the_prediction(case) -> None:
    spec, latent, grid, dtype, backend = case
    vae, itemsize = vae_of(spec, dtype), torch.empty(0, dtype=dtype).itemsize
    for run, predict in (
        (run_decode, decode_bytes),
        (run_encode, encode_first_bytes),
        (run_encode, encode_bytes),  # a clip that is not known holds for any
        (partial(run_encode, changes=None), encode_bytes),
    ):
        with StorageMeter(vae.parameters()) as meter, sdpa_kernel(backend):
            run(vae, spec, latent, grid, dtype)
        assert meter.peak <= predict(spec, latent, grid, itemsize).device_bytes


@settings(max_examples=6, deadline=None)
@given(case=cases())
def test_flops_are_those_of_the_operations(case) -> None:
    spec, latent, grid, *_ = case
    vae = vae_of(spec, torch.float32)
    for run, predict in ((run_decode, decode_work), (run_encode, encode_first_work)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run(vae, spec, latent, grid, torch.float32)
        assert counter.get_total_flops() == predict(spec, latent, grid).flops


class Convolutions(TorchDispatchMode):
    """Counts convolutions, the elements that they read and the pixels that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.pixels = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket == torch.ops.aten.convolution:
            self.elements += args[0].numel()
            self.pixels += result[0, 0].numel()
            self.calls += 1
        return result


@settings(max_examples=6, deadline=None)
@given(case=cases())
def test_convolutions_are_those_of_the_engine(case) -> None:
    """All that they make and read, but for what the two read that lie between latents and the VAE's
    own range of them."""
    spec, latent, grid, *_ = case
    vae, volume = vae_of(spec, torch.float32), latent[0] * latent[1] * latent[2]
    for run, predict, outside in (
        (run_decode, decode_work, spec.z_dim * volume),
        (run_encode, encode_first_work, 2 * spec.z_dim * volume),
    ):
        with Convolutions() as counter:
            run(vae, spec, latent, grid, torch.float32)
        work = predict(spec, latent, grid)
        assert counter.elements - outside == work.elements
        assert (counter.pixels, counter.calls) == (work.pixels, work.calls)


def test_seconds_are_those_of_each_unit_of_work() -> None:
    work = VaeWork(flops=5_000, elements=700, pixels=80, calls=9)
    rates = Rates(1000.0, 1.0, 1.0)
    assert work.seconds(rates) == 5.0
    for name, value, more in (
        ("conv_flops", 500.0, 5.0),
        ("conv_element_s", 0.1, 70.0),
        ("conv_pixel_s", 0.1, 8.0),
        ("conv_call_s", 0.1, 0.9),
    ):
        assert work.seconds(replace(rates, **{name: value})) == pytest.approx(5.0 + more)


@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_what_is_allocated_on_a_cpu_never_passes_the_prediction(case) -> None:
    """The allocator's own count, which sees what convolutions take for themselves."""
    spec, latent, grid, dtype, _ = case
    vae, itemsize = vae_of(spec, dtype), torch.empty(0, dtype=dtype).itemsize
    for run, predict in ((run_decode, decode_bytes), (run_encode, encode_first_bytes)):
        peak = allocated_peak(lambda run=run: run(vae, spec, latent, grid, dtype))
        assert peak <= predict(spec, latent, grid, itemsize, on_cpu=True).device_bytes


@pytest.mark.parametrize("latent, grid", [((3, 16, 24), (1, 1)), ((3, 16, 24), (2, 2))])
def test_most_of_the_prediction_on_a_cpu_is_allocated(latent, grid) -> None:
    spec = VaeSpec(NONE, NONE, 16, 16, (1, 2, 4, 4), 2, (False, True, True))
    vae = vae_of(spec, torch.float32)
    for run, predict in ((run_decode, decode_bytes), (run_encode, encode_first_bytes)):
        args = spec, latent, TileGrid(*grid)
        peak = allocated_peak(lambda run=run, args=args: run(vae, *args, torch.float32))
        predicted = predict(*args, 4, on_cpu=True).device_bytes
        assert 0.95 * predicted <= peak <= predicted
        assert peak > 1.05 * predict(*args, 4).device_bytes


def test_video_and_staging_are_host_memory() -> None:
    vae, spec = tiny_vae(torch.float32, num_res_blocks=1), vae_spec_of_tiny()
    predicted = decode_bytes(spec, (2, 5, 4), TileGrid(2, 1), 4)
    video = decode_frames(vae, torch.zeros(1, 4, 2, 5, 4), TileGrid(2, 1))
    assert dict(predicted.ram) == {"video frames": video.nbytes, "staging": 24 * 32 * 3}
    assert predicted.ram_bytes == video.nbytes + 24 * 32 * 3
    assert encode_bytes(spec, (2, 5, 4), TileGrid(2, 1), 4).ram_bytes == 0


def vae_spec_of_tiny() -> VaeSpec:
    return VaeSpec(NONE, NONE, 4, 4, (1, 2, 4, 4), 1, (False, True, True))


@pytest.mark.parametrize("predict", [decode_bytes, encode_bytes])
def test_finer_grids_need_less_and_compute_more(predict) -> None:
    work_of = decode_work if predict is decode_bytes else encode_work
    grids = [TileGrid(side, side) for side in (1, 2, 3, 4)]
    peaks = [predict(WAN, (21, 90, 160), grid, 2).device_bytes for grid in grids]
    works = [work_of(WAN, (21, 90, 160), grid) for grid in grids]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4
    for name in ("flops", "elements", "pixels", "calls"):
        counts = [getattr(work, name) for work in works]
        assert counts == sorted(counts) and len(set(counts)) == 4


def test_tile_overhead_at_720p() -> None:
    whole = decode_work(WAN, (21, 90, 160), TileGrid(1, 1)).flops
    overhead = {
        grid: decode_work(WAN, (21, 90, 160), TileGrid(*grid)).flops / whole
        for grid in ((2, 2), (4, 1), (4, 4))
    }
    assert overhead[2, 2] < 1.08 and overhead[4, 1] < 1.16 and overhead[4, 4] < 1.27


@pytest.mark.parametrize("predict", [decode_bytes, encode_bytes])
def test_whole_frames_decide_where_tiles_are_small(predict) -> None:
    peaks = {predict(WAN, (21, 90, 160), TileGrid(side, side), 2).device_bytes for side in (8, 9)}
    assert len(peaks) == 1


@pytest.mark.parametrize("predict", [decode_bytes, encode_bytes])
def test_predictions_take_no_longer_for_a_longer_or_larger_video(predict) -> None:
    """In calls of functions: what it costs is a matter of tiles and layers alone."""
    calls = {
        _calls(lambda latent=latent: predict(WAN, latent, TileGrid(4, 4), 2))
        for latent in ((21, 90, 160), (81, 90, 160), (21, 270, 480))
    }
    assert len(calls) == 1 and calls.pop() < 20_000


def _calls(work: Callable[[], object]) -> int:
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
