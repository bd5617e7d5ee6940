"""Speed of decoding a weight on this CPU: ours beside each library's own.

    python -m benchmarks.dequantise [--shapes 1024x5120,5120x5120] [--rounds 11] [--threads 1]
        [--formats nf4,int8,...]

CPU time is measured, so that a busy machine disturbs little. The two sides take turns within one
run, the one that begins as well; a ratio is ours / theirs, so below 1 ours is faster: the median of
the rounds' ratios, with their quartiles as the spread. The row "control" is one function against
itself: what noise alone does. Ours decodes into a buffer that is reused, as the engine does; theirs
return a new tensor, for they have no other form on a CPU (bitsandbytes' ``out=`` has kernels for
CUDA only). For fp8 and int8 of ours the other side is the plain torch expression that gives the
same values; "torch, rounded" is a shorter one that gives others, for it rounds the scale to the
dtype before the product. For int8 there is bitsandbytes' own row-wise int8 besides. The last line
on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from penstock.formats.formats import QuantFormat, get_format
from penstock.formats.gguf import GGUF_FORMATS, Gguf
from penstock.quant.arithmetic import dequantise, quantise


@dataclass(frozen=True)
class Case:
    """One comparison: two functions that decode the same weight to ``dtype``."""

    name: str
    other: str
    dtype: torch.dtype
    ours: Callable[[], object]
    theirs: Callable[[], object]


def seconds(function: Callable[[], object]) -> float:
    """CPU time of one call, all threads together: other processes take none of it."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(case: Case, rounds: int) -> dict[str, object]:
    """Median milliseconds of both sides and quartiles of their ratios, after two calls of each that
    are not counted (the second finds the allocator as the later ones do)."""
    pairs = [_pair(case, turn) for turn in range(-2, rounds)][2:]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4, method="inclusive")
    return {
        "format": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "against": case.other,
        "ours_ms": round(1e3 * ours, 3),
        "theirs_ms": round(1e3 * theirs, 3),
        "ratio": round(middle, 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def _pair(case: Case, turn: int) -> tuple[float, float]:
    if turn % 2:
        theirs = seconds(case.theirs)
        return seconds(case.ours), theirs
    return seconds(case.ours), seconds(case.theirs)


def ours(fmt: QuantFormat, stored: dict[str, Tensor], out: Tensor) -> Callable[[], object]:
    """Decoding into ``out``."""
    shape = (out.shape[0], out.shape[1])
    return lambda: dequantise(fmt, stored, shape, out.dtype, out)


def torch_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """fp8 and int8 against the plain expression."""
    for name in ("fp8", "int8"):
        fmt = get_format(name)
        stored = quantise(fmt, weight)
        data, scale = stored["weight"], stored["weight_scale"]

        def plain(data: Tensor = data, scale: Tensor = scale) -> Tensor:
            return (data.float() * scale).to(out.dtype)

        def rounded(data: Tensor = data, scale: Tensor = scale) -> Tensor:
            return data.to(out.dtype) * scale.to(out.dtype)

        yield Case(name, "torch", out.dtype, ours(fmt, stored, out), plain)
        if name == "fp8":
            data = data.float().to(torch.float8_e5m2)
            plain = partial(plain, data, scale)
            e5m2 = ours(get_format("fp8-e5m2"), stored | {"weight": data}, out)
            yield Case("fp8-e5m2", "torch", out.dtype, e5m2, plain)
        if out.dtype != torch.float32:
            yield Case(name, "torch, rounded", out.dtype, ours(fmt, stored, out), rounded)
    yield Case("control", "itself", out.dtype, plain, plain)


def kitchen_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """ComfyUI's layouts against comfy-kitchen's own functions for the CPU."""
    from comfy_kitchen import tensor as kitchen

    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("int8-convrot", kitchen.TensorWiseINT8Layout, {"per_channel": True, "convrot": True}),
        ("nvfp4", kitchen.TensorCoreNVFP4Layout, {}),
        ("mxfp8", kitchen.TensorCoreMXFP8Layout, {}),
    ]
    for name, layout, options in kinds:
        codes, params = layout.quantize(weight.to(out.dtype), **options)
        stored = {f"weight{k}": v for k, v in layout.state_dict_tensors(codes, params).items()}
        theirs = partial(layout.dequantize, codes, params)
        yield Case(name, "comfy-kitchen", out.dtype, ours(get_format(name), stored, out), theirs)


def bitsandbytes_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """NF4, and int8 by rows, whose scales are the rows' maxima and whose result is fp32."""
    from bitsandbytes import functional

    codes, maxima, _ = functional.int8_vectorwise_quant(weight.half())
    fmt = get_format("int8")
    yield Case(
        "int8",
        "bitsandbytes",
        out.dtype,
        ours(fmt, quantise(fmt, weight), out),
        lambda: functional.int8_vectorwise_dequant(codes, maxima).to(out.dtype),
    )
    fmt = get_format("nf4")
    stored = quantise(fmt, weight)
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
            ours(fmt, quantise(fmt, source), out),
            theirs.dequantize,
        )


SCALES: Mapping[str, tuple[int, ...]] = MappingProxyType({
    "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82),
    "Q5_1": (0, 2), "Q4_1": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (),
    "IQ1_M": (),
})  # fmt: skip
"""Where a block's fp16 scales begin; 0 for the other types."""


def gguf_blocks(fmt: Gguf, rows: int, columns: int) -> Tensor:
    """Random blocks; speed does not depend on their values, but NaN would be unlike a real file."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, columns // fmt.block, fmt.block_bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    for start in SCALES.get(fmt.ggml_type, (0,)):
        blocks[:, :, start : start + 2] = (
            torch.full(size[:2], 0.01).half()[:, :, None].view(torch.uint8)
        )
    if fmt.ggml_type == "IQ1_M":  # the scale's four nibbles top the last four 16-bit numbers
        blocks[:, :, [49, 51, 53, 55]] &= 15
        blocks[:, :, 55] |= 0x20
    return blocks.view(rows, -1)


def gguf_cases(weight: Tensor, out: Tensor) -> Iterator[Case]:
    """Every type; the gguf package gives fp32."""
    for fmt in GGUF_FORMATS:
        stored = gguf_blocks(fmt, *weight.shape)
        kind, data = GGMLQuantizationType[fmt.ggml_type], stored.numpy()

        def theirs(data: object = data, kind: GGMLQuantizationType = kind) -> Tensor:
            return torch.from_numpy(gguf_dequantize(data, kind)).to(out.dtype)

        yield Case(fmt.name, "gguf", out.dtype, ours(fmt, {"weight": stored}, out), theirs)


def cases(weight: Tensor, out: Tensor, formats: Sequence[str]) -> Iterator[Case]:
    """All comparisons that decode to the dtype and shape of ``out``; some formats, if any are
    named."""
    for made in (torch_cases, kitchen_cases, bitsandbytes_cases, quanto_cases, gguf_cases):
        yield from (case for case in made(weight, out) if not formats or case.name in formats)


def sized(text: str) -> tuple[int, int]:
    """``1024x5120`` as rows and columns."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default="1024x5120,5120x5120")
    parser.add_argument("--formats", default="")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    formats = [name for name in options.formats.split(",") if name]
    for shape in map(sized, options.shapes.split(",")):
        weight = torch.randn(shape) * 0.02
        for dtype in (torch.bfloat16, torch.float32):
            for case in cases(weight, torch.empty(shape, dtype=dtype), formats):
                results.append({"shape": list(shape)} | measure(case, options.rounds))
                print(line(results[-1]), flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**machine, "threads": options.threads, "results": results}))


def line(result: Mapping[str, Any]) -> str:
    """A row for people."""
    rows, columns = result["shape"]
    return f"{rows}x{columns}".ljust(11) + (
        "{format:12} {dtype:9} {against:15} {ours_ms:9} {theirs_ms:9} {ratio:6} "
        "({low} to {high})".format(**result)
    )


if __name__ == "__main__":
    main()
