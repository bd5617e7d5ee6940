"""What this machine really computes and moves a second, measured on the engine's own operations."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.wan import forward
from penstock.engine.wan.attention import attention
from penstock.engine.wan.vae_layers import Past, residual
from penstock.offload.files import WeightFile
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import DeviceTier, HostTier, open_link
from penstock.profiles.cost.transformer import Flops, denoise_flops
from penstock.profiles.cost.vae import residual_work
from penstock.profiles.manifest import TransformerSpec, Weights
from penstock.profiles.rates import SMALL_CHUNK, TINY_CHUNK, Rates
from penstock.profiles.tiling import Window
from penstock.units import MIB

_WIDTH, _HEADS, _FFN = 128, 8, 2048
_READ_PIECE = 8 * MIB


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        tokens: of the products and of attention.
        copy_bytes, read_bytes: moved once, for the bandwidths.
        seconds: each operation is repeated for at least as long.
        clock: times operations that compute; `time.thread_time` leaves out what others compute on a
            shared machine.
    """

    tokens: int
    copy_bytes: int
    read_bytes: int
    seconds: float
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def on(cls, device: torch.device) -> Effort:
        """What fills the device, and takes some seconds in all."""
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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        conv_flops, conv_element_s = _vae(device, dtype, effort)
        rates = Rates(
            flops=_matmul(device, dtype, effort),
            copy_bytes_per_s=copy_rate(device, effort),
            read_bytes_per_s=_read(folder, effort),
            attention_flops=_attention(device, dtype, effort),
            conv_flops=conv_flops,
            conv_element_s=conv_element_s,
            eight_bit_flops=_int8(device, effort),
            fp8_flops=_fp8(device, dtype, effort),
            memory_bytes_per_s=_decode(device, dtype, effort),
        )
        overhead_s, element_s = _forward(device, dtype, effort, rates)
        return replace(
            rates,
            overhead_s=overhead_s,
            tiny_overhead_s=_tiny_overhead(device, dtype, effort),
            element_s=element_s,
        )


def _seconds(work: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """The median of repetitions, after two to warm up."""
    times: list[float] = []
    for _ in range(2):
        work()
    _finish(device)
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < effort.seconds:
        before = effort.clock()
        work()
        _finish(device)
        times.append(effort.clock() - before)
    return sorted(times)[len(times) // 2]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    inner = _WIDTH * _HEADS
    x = torch.randn(effort.tokens, inner, device=device, dtype=dtype)
    weight = torch.randn(4 * inner, inner, device=device, dtype=dtype)
    seconds = _seconds(lambda: F.linear(x, weight), device, effort)
    return 2 * effort.tokens * inner * 4 * inner / seconds


def _attention(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    shape = (1, effort.tokens, _HEADS, _WIDTH)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    seconds = _seconds(lambda: attention(q, k, v), device, effort)
    return 4 * effort.tokens**2 * _HEADS * _WIDTH / seconds


def _vae(device: torch.device, dtype: torch.dtype, effort: Effort) -> tuple[float, float]:
    """Operations a second of the VAE's convolutions, and seconds of an element that they read.

    A wide residual block is bound by the one, a narrow one by the other: two equations.
    """
    side = 4 * math.isqrt(effort.tokens)
    narrow = _residual(32, side, device, dtype, effort)
    wide = _residual(192, max(1, round(side / math.sqrt(6))), device, dtype, effort)  # same bytes
    (few, few_elements, narrow_s), (many, many_elements, wide_s) = narrow, wide
    both = many * few_elements - few * many_elements
    flop_s = max(1e-18, (wide_s * few_elements - narrow_s * many_elements) / both)
    return 1 / flop_s, max(1e-13, (narrow_s - few * flop_s) / few_elements)


def _residual(
    width: int, side: int, device: torch.device, dtype: torch.dtype, effort: Effort
) -> tuple[int, int, float]:
    """FLOPs, elements and seconds of a residual block on the next frame."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    block = WanResidualBlock(width, width).to(device, dtype)
    frame = torch.randn(1, width, 1, side, side, device=device, dtype=dtype)
    past: Past = {}
    windows = (Window.whole(side, side),) * 3
    work = residual_work(width, side)
    seconds = _seconds(lambda: residual(block, past, windows, frame), device, effort)
    return work.flops, work.elements, seconds


def _int8(device: torch.device, effort: Effort) -> float | None:
    """int8 products, where they are faster than the compute dtype's: on GPUs that can."""
    return _eight_bit(torch.int8, torch._int_mm, device, effort)


def _fp8(device: torch.device, dtype: torch.dtype, effort: Effort) -> float | None:
    """fp8 products, on GPUs that can."""
    one = torch.ones((), device=device)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return torch._scaled_mm(x, weight, scale_a=one, scale_b=one, out_dtype=dtype)

    return _eight_bit(torch.float8_e4m3fn, product, device, effort)


def _eight_bit(
    kind: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    effort: Effort,
) -> float | None:
    if device.type != "cuda":
        return None
    inner = _WIDTH * _HEADS
    x = torch.ones(effort.tokens, inner, device=device).to(kind)
    weight = torch.ones(4 * inner, inner, device=device).to(kind).T  # as a linear's is stored
    try:
        seconds = _seconds(lambda: product(x, weight), device, effort)
    except RuntimeError:  # "not supported on this device": nothing to measure
        return None
    return 2 * effort.tokens * inner * 4 * inner / seconds


def _decode(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    """Bytes read and written by decoding an int8 weight."""
    stored = torch.ones(effort.copy_bytes // 8, device=device, dtype=torch.int8)
    out = torch.empty(stored.shape, device=device, dtype=dtype)
    seconds = _seconds(lambda: out.copy_(stored).mul_(0.5), device, effort)
    return (stored.nbytes + out.nbytes) / seconds


@dataclass(frozen=True)
class _Forward:
    """One block of the lean forward on random weights, as a plan counts it."""

    model: Any
    latents: Tensor
    cross: list[list[forward.CrossKV]]
    step: forward.StepModulation
    rope: forward.Rope

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, tokens: int) -> _Forward:
        from diffusers import WanTransformer3DModel

        side = 2 * math.isqrt(tokens)
        model = WanTransformer3DModel(
            num_attention_heads=_HEADS, attention_head_dim=_WIDTH // 2, in_channels=16,
            out_channels=16, text_dim=64, freq_dim=64, ffn_dim=_FFN, num_layers=1,
        ).to(device, dtype)  # fmt: skip
        text = torch.randn(1, forward.TEXT_TOKENS, 64, device=device, dtype=dtype)
        context = forward.prepare_context(model, text, None)
        return cls(
            model,
            torch.randn(1, 16, 1, side, side, device=device, dtype=dtype),
            [[forward.cross_kv(model.blocks[0].attn2, context)]],
            forward.step_modulation(model, torch.zeros(1, device=device), dtype)[0],
            forward.rope_tables(model, (1, side, side), device),
        )

    def __call__(self, chunk_tokens: int) -> object:
        blocks = enumerate(self.model.blocks)
        return forward.denoise_forward(
            self.model, blocks, self.latents, self.cross, self.step, self.rope, chunk_tokens
        )

    def flops(self) -> Flops:
        """As the planner counts it."""
        config = self.model.config
        spec = TransformerSpec(
            weights=Weights(0, (0,), 4), cross_block_bytes=(0,), num_layers=1,
            num_attention_heads=_HEADS, attention_head_dim=_WIDTH // 2, ffn_dim=config.ffn_dim,
            in_channels=16, out_channels=16, text_dim=64, freq_dim=64, patch_size=(1, 2, 2),
        )  # fmt: skip
        return denoise_flops(spec, self.tokens, 0)

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return (self.latents.shape[-1] // 2) ** 2


def _forward(
    device: torch.device, dtype: torch.dtype, effort: Effort, rates: Rates
) -> tuple[float, float]:
    """Seconds of a chunk, and of an element besides the products: a forward in few large chunks and
    in many small ones, less what the products take."""
    work = _Forward.make(device, dtype, effort.tokens)
    whole = _seconds(lambda: work(work.tokens), device, effort)
    chunks = work.tokens // SMALL_CHUNK
    cut = _seconds(lambda: work(-(-work.tokens // chunks)), device, effort)
    overhead = max(1e-6, (cut - whole) / (chunks - 1))
    flops = work.flops()
    attention = flops.self_attention + flops.cross_attention
    products = flops.linear / rates.flops + attention / (rates.attention_flops or rates.flops)
    rest = max(1e-13, (whole - products - overhead) / (work.tokens * _WIDTH // 2 * _HEADS))
    return overhead, rest


def _tiny_overhead(device: torch.device, dtype: torch.dtype, effort: Effort) -> float:
    """Of few tokens, as it takes many chunks."""
    work = _Forward.make(device, dtype, min(effort.tokens, 256))
    whole = _seconds(lambda: work(work.tokens), device, effort)
    cut = _seconds(lambda: work(TINY_CHUNK), device, effort)
    return max(1e-6, (cut - whole) / (work.tokens // TINY_CHUNK - 1))


def copy_rate(device: torch.device, effort: Effort) -> float:
    """Bytes a second from host memory to the device, through the engine's own tiers: from pinned
    memory on a GPU, plain copies on a CPU."""
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
    """Sequential reads of a fresh file, past the page cache where the platform allows that."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="penstock-doctor-") as scratch:
        path = Path(scratch) / "read"
        block = bytes(range(256)) * (_READ_PIECE // 256)
        with path.open("wb") as file:
            for _ in range(effort.read_bytes // _READ_PIECE):
                file.write(block)
        ledger, cpu = ByteLedger("calibration", 1 << 62), torch.device("cpu")
        with (
            HostTier(ledger, cpu).buffers("target", [_READ_PIECE]) as (buffer,),
            WeightFile(path, direct=True) as weights,
        ):
            started = time.perf_counter()
            for offset in range(0, effort.read_bytes, _READ_PIECE):
                weights.read_into(buffer.view, offset, on_page=True)
            return effort.read_bytes / (time.perf_counter() - started)
