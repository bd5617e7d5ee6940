"""Speed of decoding a weight on this CPU: ours beside each library's own.

    python -m benchmarks.dequantise [--rows 5120] [--columns 5120] [--rounds 7] [--threads 1]

The two sides take turns within one run; a ratio is ours / theirs of the median times, so below 1
ours is faster. Ours decodes into a buffer that is reused, as the engine does; theirs return a new
tensor, for they have no other form on a CPU (bitsandbytes' ``out=`` has kernels for CUDA only). For
fp8 and int8 of ours the other side is the plain torch expression ``weight.to(dtype) * scale``. The
last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from penstock.quant.format import QuantFormat, get_format
from penstock.quant.gguf import GGUF_FORMATS, Gguf


@dataclass(frozen=True)
class Case:
    """One comparison: two functions that decode the same weight to ``dtype``."""

    name: str
    other: str
    dtype: torch.dtype
    ours: Callable[[], object]
    theirs: Callable[[], object]


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Median milliseconds of both sides, after one call of each that is not counted."""
    case.ours()
    case.theirs()
    pairs = [(seconds(case.ours), seconds(case.theirs)) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "format": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "against": case.other,
        "ours_ms": round(1e3 * ours, 2),
        "theirs_ms": round(1e3 * theirs, 2),
        "ratio": round(ours / theirs, 3),
    }


def ours(fmt: QuantFormat, stored: dict[str, Tensor], out: Tensor) -> Callable[[], object]:
    """Decoding into ``out``."""
    shape = (out.shape[0], out.shape[1])
    return lambda: fmt.dequantise(stored, shape, out.dtype, out)


def torch_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """fp8 and int8 against the plain expression."""
    for name in ("fp8", "int8"):
        fmt = get_format(name)
        stored = fmt.quantise(weight)
        data, scale = stored["weight"], stored["weight_scale"]

        def plain(data: Tensor = data, scale: Tensor = scale) -> Tensor:
            return data.to(out.dtype) * scale.to(out.dtype)

        yield Case(name, "torch", out.dtype, ours(fmt, stored, out), plain)


def bitsandbytes_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """NF4."""
    from bitsandbytes import functional

    fmt = get_format("nf4")
    stored = fmt.quantise(weight)
    packed, state = functional.quantize_4bit(weight.to(out.dtype), blocksize=64, quant_type="nf4")
    yield Case(
        "nf4",
        "bitsandbytes",
        out.dtype,
        ours(fmt, stored, out),
        lambda: functional.dequantize_4bit(packed, state),
    )


def quanto_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """Those of optimum-quanto; its 4-bit kernel is compiled at first use (minutes)."""
    from optimum import quanto

    kinds = {"quanto-int8": "qint8", "quanto-fp8": "qfloat8", "quanto-int4": "qint4"}
    for name, kind in kinds.items():
        qtype = getattr(quanto, kind)
        source = weight.to(out.dtype)
        layer = quanto.QLinear(*reversed(weight.shape), weights=qtype, device="meta")
        group = layer.weight_group_size
        if kind == "qint4":
            scale, shift = quanto.MaxOptimizer()(source, qtype, 0, group)
        else:
            scale, shift = quanto.AbsmaxOptimizer()(source, qtype, 0), None
        theirs = quanto.quantize_weight(source, qtype, 0, scale, shift, group, optimized=False)
        fmt = get_format(name)
        yield Case(
            name,
            "optimum-quanto",
            out.dtype,
            ours(fmt, fmt.quantise(source), out),
            theirs.dequantize,
        )


def gguf_blocks(fmt: Gguf, rows: int, columns: int) -> Tensor:
    """Random blocks; speed does not depend on their values, but NaN would be unlike a real file."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, columns // fmt.block, fmt.block_bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    for start in (208,) if fmt.ggml_type == "Q6_K" else (0, 2):
        blocks[:, :, start : start + 2] = (
            torch.full(size[:2], 0.01).half()[:, :, None].view(torch.uint8)
        )
    return blocks.view(rows, -1)


def gguf_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """Every type; the gguf package gives fp32."""
    for fmt in GGUF_FORMATS:
        stored = gguf_blocks(fmt, *weight.shape)
        kind, data = GGMLQuantizationType[fmt.ggml_type], stored.numpy()

        def theirs(data: object = data, kind: GGMLQuantizationType = kind) -> Tensor:
            return torch.from_numpy(gguf_dequantize(data, kind)).to(out.dtype)

        yield Case(fmt.name, "gguf", out.dtype, ours(fmt, {"weight": stored}, out), theirs)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight = torch.randn(options.rows, options.columns) * 0.02
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(weight.shape, dtype=dtype)
        for cases in (torch_cases, bitsandbytes_cases, quanto_cases, gguf_cases):
            for case in cases(weight, out):
                results.append(measure(case, options.rounds))
                print(
                    "{format:12} {dtype:9} {against:15} {ours_ms:9} {theirs_ms:9} {ratio:6}".format(
                        **results[-1]
                    ),
                    flush=True,
                )
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    shape = [options.rows, options.columns]
    print(json.dumps({**machine, "threads": options.threads, "shape": shape, "results": results}))


if __name__ == "__main__":
    main()
