"""Formats and attention: every path and kernel on the same inputs, for the GPU suite."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu_context import Case, Context, finish
from penstock.engine.attention.kernels import attention, self_attention_of
from penstock.formats.formats import get_format
from penstock.formats.scaled import Gemm
from penstock.profiles.attending import INT8, SOL, Attending
from penstock.quant.arithmetic import quantise
from penstock.quant.compute import Operands, strategy_for
from penstock.quant.paths import Computing, Scratch
from penstock.quant.probe import MICRO, in_blocks, probe, probe_kitchen, probe_micro, working


def formats(context: Context) -> Iterator[Case]:
    """Every path of a quantised linear, and every attention kernel, on the same inputs."""
    reports = probe(context.device)

    @cache
    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        return weight_and_inputs(context)

    for path, report in reports.items():
        yield f"path {path}", lambda report=report: vars(report)  # type: ignore[misc]
    for name in ("bf16", "fp8", "int8", "nf4"):
        for mode in ("exact", "fast"):

            def work(name: str = name, mode: Any = mode) -> dict[str, Any]:
                return product(context, name, mode, working(reports), *operands())

            yield f"{name}, {mode}", work
    yield "path int8-kitchen", lambda: vars(probe_kitchen(context.device))
    for name in ("int8", "int8-convrot"):

        def kitchens(name: str = name) -> dict[str, Any]:
            return product(context, name, "fast", frozenset({"int8", "int8-kitchen"}), *operands())

        yield f"{name}, comfy-kitchen", kitchens
    for name in MICRO:

        def by_blocks(name: Gemm = name) -> dict[str, Any]:
            return product(context, name, "fast", frozenset({name}), *operands())

        yield f"path {name}", lambda name=name: vars(probe_micro(context.device)[name])  # type: ignore[misc]
        yield f"{name}, comfy-kitchen", by_blocks
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

        def kernel(backend: str = backend) -> dict[str, Any]:
            return attend(context, backend)

        yield f"attention {backend.lower()}", kernel
    yield "attention int8 (comfy-kitchen)", lambda: attend_by(context, INT8)
    yield "attention sol (comfy-kitchen)", lambda: attend_by(context, SOL)


def weight_and_inputs(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest matrix of a block (on the host) and what it is multiplied with, both random."""
    rows, columns = context.scale.matrix
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw).mul_(0.02).to(torch.bfloat16)
    x = torch.randn(context.scale.tokens, columns, generator=draw)
    return weight, x.to(context.device, torch.bfloat16)


def product(
    context: Context,
    name: str,
    mode: Any,
    works: frozenset[Any],
    weight: torch.Tensor,
    x: torch.Tensor,
) -> dict[str, Any]:
    """Seconds of a linear over ``weight`` in a format."""
    rows, columns = context.scale.matrix
    device, fmt = context.device, get_format(name)
    made = quantise(fmt, weight) if fmt.writable else in_blocks(name, weight)  # type: ignore[arg-type]
    stored = {suffix: each.to(device) for suffix, each in made.items()}
    computing = Computing(Scratch(2 * rows * columns, device), mode, works)
    path = strategy_for(computing, fmt, (rows, columns))
    operands = Operands(fmt, (rows, columns), stored, None)
    seconds = seconds_of(lambda: path(operands, x), context)
    reference = F.linear(x.float(), weight.to(device).float())
    error = (path(operands, x).float() - reference).norm() / reference.norm()
    flops = 2 * context.scale.tokens * rows * columns
    return {"path": path.path, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12,
            "relative_error": float(error)}  # fmt: skip


HEAD_WIDTH = 128
"""Of the 14B model."""


def attend(context: Context, backend: str) -> dict[str, Any]:
    """Seconds of a chunk of queries against all keys, by one of torch's kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = 1 if backend == "MATH" else context.scale.heads  # its scores would not fit
    q, k, v = (x.transpose(1, 2).contiguous() for x in random_qkv(context, heads))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        seconds = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v), context)
    return attended(context, heads, seconds)


def attend_by(context: Context, word: str) -> dict[str, Any]:
    """The same as ``--attention`` makes it, its quantising and its copy back included; and its
    error against torch's own. Of random tokens, which no sparse attention does justice to; one that
    wants all queries at once gets them."""
    other, whole = self_attention_of(word), Attending.of(word).backend.whole
    q, k, v = random_qkv(context, context.scale.heads, whole=whole)
    seconds = seconds_of(lambda: other(q, k, v), context)
    sdpa_seconds = seconds_of(lambda: attention(q, k, v), context)
    reference = attention(q, k, v).float()
    error = (other(q, k, v).float() - reference).norm() / reference.norm()
    return attended(context, context.scale.heads, seconds, q.shape[1]) | {
        "sdpa_ms": 1e3 * sdpa_seconds,
        "relative_error": float(error),
    }


def random_qkv(context: Context, heads: int, *, whole: bool = False) -> list[torch.Tensor]:
    """A chunk of queries (``whole``: all), and the keys and values of all tokens: (1, tokens,
    heads, width)."""
    draw = torch.Generator(device=context.device).manual_seed(0)
    keys = context.scale.context
    counts = (keys if whole else context.scale.tokens, keys, keys)
    return [
        torch.randn(
            (1, tokens, heads, HEAD_WIDTH), generator=draw, device=context.device,
            dtype=torch.bfloat16,
        )
        for tokens in counts
    ]  # fmt: skip


def attended(
    context: Context, heads: int, seconds: float, queries: int | None = None
) -> dict[str, Any]:
    """What is told of attention that took so long, as if all keys had been attended to."""
    queries = queries or context.scale.tokens
    flops = 4 * queries * context.scale.context * heads * HEAD_WIDTH
    return {"heads": heads, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}


def seconds_of(work: Callable[[], object], context: Context) -> float:
    """The median of some repetitions after one that does not count."""
    work()
    times = []
    for _ in range(context.scale.repeats):
        finish(context)
        started = time.perf_counter()
        work()
        finish(context)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
