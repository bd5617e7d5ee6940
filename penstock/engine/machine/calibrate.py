"""What this machine really computes and moves a second, measured on the engine's own operations."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch.nn import functional as F

from penstock.engine.attention.kernels import Attention, attention, self_attention_of
from penstock.engine.attention.probe import probe as probe_attention
from penstock.engine.family.protocol import families
from penstock.engine.machine.disk import IN_FLIGHT, read_rate
from penstock.engine.machine.samples import SampledFamily, Samples
from penstock.formats.formats import get_format
from penstock.formats.scaled import Gemm
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import DeviceTier, HostTier, open_link
from penstock.profiles.attending import INT8, SOL
from penstock.profiles.rates import SMALL_CHUNK, TINY_CHUNK, Rates
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.compute import KitchenMicro, LinearPath, Operands, strategy_for
from penstock.quant.paths import Computing, Scratch
from penstock.quant.probe import in_blocks, probe, probe_kitchen, probe_micro, working
from penstock.units import MIB

_WIDTH, _HEADS, _FFN = 128, 8, 2048
_WRITTEN_AT_ONCE = 8 * MIB
_TINY_TOKENS = 256
_NARROW = 32
_READS = 3
_RESIDUALS = ((16, 1), (32, 1), (64, 1), (192, 1), (16, 16), (64, 4))
"""Channels of the VAE's residual blocks that are measured, and what part of the side of a frame."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        tokens: of the products and of attention.
        copy_bytes, read_bytes: moved once, for the bandwidths.
        seconds: each operation is repeated for at least as long.
        clock: times operations that compute; `time.thread_time` leaves out what others compute on a
            shared machine.
        spreads: of each operation that was timed, its median seconds over those that were kept, in
            order: 1 on a machine that does nothing else.
    """

    tokens: int
    copy_bytes: int
    read_bytes: int
    seconds: float
    clock: Callable[[], float] = time.perf_counter
    spreads: list[float] = field(default_factory=list)

    @classmethod
    def on(cls, device: torch.device) -> Effort:
        """Return what fills the device, and takes some seconds in all."""
        if device.type == "cuda":
            return cls(16384, 512 * MIB, 1024 * MIB, 0.5)
        return cls(1024, 64 * MIB, 256 * MIB, 0.4)


def calibrate(
    device: torch.device, folder: Path | None = None, effort: Effort | None = None
) -> Rates:
    """Measure the rates of ``device`` and of the disk that ``folder`` is on.

    Args:
        folder: where a file is written and read back (the temporary directory by default).
    """
    effort = effort or Effort.on(device)
    samples = cast("SampledFamily", families()[0]).samples()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        rates = Rates(
            flops=_matmul(device, dtype, effort),
            copy_bytes_per_s=copy_rate(device, effort),
            read_bytes_per_s=_read(folder, effort),
            attention_flops=_attention(attention, device, dtype, effort),
            int8_attention_flops=_other_attention(INT8, device, dtype, effort),
            sol_attention_flops=_other_attention(SOL, device, dtype, effort),
            **_vae(samples, device, dtype, effort),
            eight_bit_flops=_eight_bit("int8", device, dtype, effort),
            fp8_flops=_eight_bit("fp8", device, dtype, effort),
            nvfp4_flops=_by_blocks("nvfp4", device, dtype, effort),
            mxfp8_flops=_by_blocks("mxfp8", device, dtype, effort),
            memory_bytes_per_s=_decode(device, dtype, effort),
        )
        overhead_s, element_s = _forward(samples, device, dtype, effort, rates)
        return replace(
            rates,
            overhead_s=overhead_s,
            **_tiny(samples, device, dtype, effort, rates.attention_flops or rates.flops),
            element_s=element_s,
        )


def _seconds(work: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """Return the seconds of ``work``, as `_in_turns` takes them."""
    return _in_turns([work], device, effort)[0]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _inner(device: torch.device) -> int:
    """Return the columns of the products: a GPU reaches its rate at the 14B model's width only."""
    return 5120 if device.type == "cuda" else _WIDTH * _HEADS


def _matmul(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    inner = _inner(device)
    x = torch.randn(effort.tokens, inner, device=device, dtype=dtype)
    weight = torch.randn(4 * inner, inner, device=device, dtype=dtype)
    seconds = _seconds(lambda: F.linear(x, weight), device, effort)
    return 2 * effort.tokens * inner * 4 * inner / seconds


def _attention(
    attend: Attention, device: torch.device, dtype: torch.dtype, effort: Effort
) -> float:
    shape = (1, effort.tokens, _HEADS, _WIDTH)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    seconds = _seconds(lambda: attend(q, k, v), device, effort)
    return 4 * effort.tokens**2 * _HEADS * _WIDTH / seconds


def _other_attention(
    word: str, device: torch.device, dtype: torch.dtype, effort: Effort
) -> float | None:
    """As ``--attention`` makes it, its quantising included, where it works."""
    if not probe_attention(word, device, dtype, _HEADS, _WIDTH).works:
        return None
    return _attention(self_attention_of(word), device, dtype, effort)


def _vae(
    samples: Samples, device: torch.device, dtype: torch.dtype, effort: Effort
) -> dict[str, float]:
    """Return what the VAE's convolutions take, for an operation, an element, a pixel and a call.

    Residual blocks of several widths on frames of the same bytes, and on small frames: one is bound
    by its operations, another by the elements that it reads, by its pixels or by the calls. They
    are measured in turns, so that what else a machine does meets all of them, and the seconds are
    fitted by least squares of relative errors, none of them negative.
    """
    side = 4 * math.isqrt(effort.tokens)
    blocks = [
        samples.residual(
            width, max(1, round(side / part * math.sqrt(_NARROW / width))), device, dtype
        )
        for width, part in _RESIDUALS
    ]
    seconds = _in_turns([step for _, step in blocks], device, effort)
    rows = [[work.flops, work.elements, work.pixels, work.calls] for work, _ in blocks]
    flop_s, element_s, pixel_s, call_s = _fitted(rows, seconds)
    return {
        "conv_flops": 1 / max(1e-18, flop_s),
        "conv_element_s": max(1e-15, element_s),
        "conv_pixel_s": max(1e-15, pixel_s),
        "conv_call_s": max(1e-9, call_s),
    }


def _in_turns(
    works: Sequence[Callable[[], object]], device: torch.device, effort: Effort
) -> list[float]:
    """Return the seconds of each of ``works``, in turns, again and again, until they are steady.

    What a machine does besides only ever adds seconds. So the best count: the fastest quarter's
    slowest, once a quarter of the repetitions come that near to the fastest, or time is up.
    """
    times: list[list[float]] = [[] for _ in works]
    for work in (*works, *works):
        work()
    _finish(device)
    while not _enough(times, effort.seconds):
        for work, found in zip(works, times, strict=True):
            before = effort.clock()
            work()
            _finish(device)
            found.append(effort.clock() - before)
    kept = [_quarter(found) for found in times]
    effort.spreads.extend(
        statistics.median(found) / best for found, best in zip(times, kept, strict=True) if best
    )
    return kept


_NEAR = 1.1
_PATIENCE = 8
"""Times as long as wanted is repeated on a machine that is not steady."""


def _enough(times: Sequence[Sequence[float]], seconds: float) -> bool:
    """Return whether operations were repeated enough: three times, for ``seconds`` each, and
    steadily."""
    spent = sum(map(sum, times)) / len(times)
    if len(times[0]) < 3 or spent < seconds:
        return False
    steady = all(_quarter(found) <= _NEAR * min(found) for found in times)
    return steady or spent >= _PATIENCE * seconds


def _quarter(times: Sequence[float]) -> float:
    """Return what a quarter of them, and two at least, are at or below."""
    return sorted(times)[max(1, len(times) // 4)]


def _fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the seconds of each unit of work, none negative, that come nearest to ``seconds``: the
    best fit of all sets of columns (those left out being zero).

    Args:
        rows: units of each kind, one row a measurement.
    """
    relative = torch.tensor(rows, dtype=torch.float64) / torch.tensor(seconds)[:, None].double()
    scale = relative.abs().amax(0)
    best, least = [0.0] * len(scale), math.inf
    for chosen in range(1, 1 << len(scale)):
        columns = [index for index in range(len(scale)) if chosen >> index & 1]
        matrix = relative[:, columns] / scale[columns]
        ones = torch.ones(len(rows), 1, dtype=torch.float64)
        found = torch.linalg.lstsq(matrix, ones, driver="gelsd").solution
        error = float((matrix @ found - ones).square().sum())
        if error < least and bool((found >= 0).all()):
            fitted = dict(zip(columns, (found[:, 0] / scale[columns]).tolist(), strict=True))
            best, least = [fitted.get(index, 0.0) for index in range(len(scale))], error
    return best


def _eight_bit(
    name: Gemm, device: torch.device, dtype: torch.dtype, effort: Effort
) -> float | None:
    """Return the products in 8 bits as ``--compute fast`` makes them, the tokens' quantising and
    the scaling of results included, on GPUs that can."""
    if device.type != "cuda":
        return None
    operands = _stored(name, 4 * _inner(device), device)
    works = working(probe(device))
    if probe_kitchen(device).works:  # what ``--compute fast`` takes then
        works |= {"int8-kitchen"}
    computing = Computing(Scratch(0, device), "fast", works)
    path = strategy_for(computing, operands.format, operands.shape)
    return None if path.path == "dequant" else _product(path, operands, device, dtype, effort)


def _by_blocks(
    name: Gemm, device: torch.device, dtype: torch.dtype, effort: Effort
) -> float | None:
    """Return the products of comfy-kitchen in such a format, likewise, on GPUs that can."""
    if not probe_micro(device)[name].works:
        return None
    shape = (4 * _inner(device), _inner(device))
    operands = Operands(get_format(name), shape, in_blocks(name, torch.randn(shape)), None)
    moved = {key: each.to(device) for key, each in operands.tensors.items()}
    path = KitchenMicro(name)
    return _product(path, replace(operands, tensors=moved), device, dtype, effort)


def _product(
    path: LinearPath, operands: Operands, device: torch.device, dtype: torch.dtype, effort: Effort
) -> float:
    """Return the operations a second of a linear on a path."""
    x = torch.randn(effort.tokens, operands.shape[1], device=device, dtype=dtype)
    seconds = _seconds(lambda: path(operands, x), device, effort)
    return 2 * effort.tokens * math.prod(operands.shape) / seconds


def _stored(name: str, rows: int, device: torch.device) -> Operands:
    """Return a random weight of so many rows in a format."""
    fmt, shape = get_format(name), (rows, _inner(device))
    stored = quantise(fmt, torch.randn(shape))
    return Operands(fmt, shape, {key: each.to(device) for key, each in stored.items()}, None)


def _decode(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    """Return the bytes read and written by decoding an int8 weight."""
    operands = _stored("int8", max(1, effort.copy_bytes // 8 // _inner(device)), device)
    out = torch.empty(operands.shape, device=device, dtype=dtype)
    decode = partial(dequantise, operands.format, operands.tensors, operands.shape, dtype, out)
    return (math.prod(operands.shape) + out.nbytes) / _seconds(decode, device, effort)


def _forward(
    samples: Samples,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    rates: Rates,
) -> tuple[float, float]:
    """Return the seconds of a chunk, and of an element besides the products: a forward in few large
    chunks and in many small ones, less what the products take."""
    work = samples.forward(device, dtype, effort.tokens)
    whole = _seconds(lambda: work(work.tokens), device, effort)
    chunks = work.tokens // SMALL_CHUNK
    cut = _seconds(lambda: work(-(-work.tokens // chunks)), device, effort)
    overhead = max(1e-6, (cut - whole) / (chunks - 1))
    flops = work.flops()
    attention = flops.self_attention + flops.cross_attention
    products = flops.linear / rates.flops + attention / (rates.attention_flops or rates.flops)
    rest = max(1e-13, (whole - products - overhead) / (work.tokens * work.width))
    return overhead, rest


def _tiny(
    samples: Samples,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    attention_flops: float,
) -> dict[str, float]:
    """Return what a chunk of few tokens takes, in a forward of many of them, and what it takes for
    each element that it attends to, besides the operations."""
    work = samples.forward(device, dtype, min(effort.tokens, _TINY_TOKENS))
    shapes = [(1, count, _HEADS, _WIDTH // 2) for count in (TINY_CHUNK, effort.tokens, TINY_CHUNK)]
    q, keys, few = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    works: list[Callable[[], object]] = [
        partial(work, work.tokens),
        partial(work, TINY_CHUNK),
        partial(attention, q, keys, keys.clone()),
        partial(attention, q, few, few.clone()),
    ]
    whole_s, cut_s, many_s, few_s = _in_turns(works, device, effort)
    operations_s = 4 * TINY_CHUNK / attention_flops
    read = keys.numel() - few.numel()
    key_s = max(1e-15, (many_s - few_s) / read - operations_s)
    attended = work.attended * work.width
    chunk_s = (cut_s - whole_s) / (work.tokens // TINY_CHUNK - 1)
    return {"tiny_overhead_s": max(1e-6, chunk_s - attended * key_s), "tiny_key_s": key_s}


def copy_rate(device: torch.device, effort: Effort) -> float:
    """Return the bytes a second from host memory to the device, through the engine's own tiers:
    from pinned memory on a GPU, plain copies on a CPU."""
    ledger = ByteLedger("calibration", 1 << 62)
    host, tier, link = HostTier(ledger, device), DeviceTier(device, ledger), open_link(device, 1)
    sizes = [effort.copy_bytes]
    with host.buffers("source", sizes) as (source,), tier.buffers("target", sizes) as (target,):
        source.tensor.fill_(1)

        def copy() -> None:
            link.copy(target, source.tensor)
            link.drain()

        return effort.copy_bytes / _seconds(copy, device, effort)


def _read(folder: Path | None, effort: Effort) -> float:
    """Measure reads of a fresh file as a stream does them: direct where the platform allows that,
    several at a time."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="penstock-doctor-") as scratch:
        path = Path(scratch) / "read"
        block = bytes(range(256)) * (_WRITTEN_AT_ONCE // 256)
        with path.open("wb") as file:
            for _ in range(effort.read_bytes // _WRITTEN_AT_ONCE):
                file.write(block)
        rates = [read_rate(path, effort.read_bytes, IN_FLIGHT) for _ in range(_READS)]
        effort.spreads.append(max(rates) / statistics.median(rates))
        return max(rates)
