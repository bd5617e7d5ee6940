"""Whether comfy-kitchen's attention works on a device, found by trying it on a small problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention.kernels import (
    Attention,
    attention,
    int8_attention,
    sol_attention,
)
from penstock.profiles.attending import SOL, TAU, Attending

MIN_COSINE = 0.99
"""To attention in fp32, of the worst head; queries, keys and values in int8 reach some 0.999."""

_QUERIES, _KEYS, _HEADS = 200, 1100, 4
"""Tokens: more keys than 1024, from which on the kernel takes its large tiles, and no whole number
of tiles of either; heads at the most."""

_SPARSE_BLOCKS, _SPARSE_BLOCK = 40, 64
"""Of sparse attention: blocks, and tokens of each but the last, which is half as long."""
_ALIKE = 0.1
"""How far a token is from its block's own."""

_OUTLIERS = 32
"""One channel of the keys in so many is larger than the others,"""
_OUTLIER = 8.0
"""by so much: int8 must cope with it, as trained models have such channels."""


@dataclass(frozen=True)
class AttentionReport:
    """What came of trying a backend.

    Attributes:
        cosine: to attention in fp32, of the worst head; None if the backend refused.
        reason: why it does not work; empty if it does.
    """

    works: bool
    cosine: float | None
    reason: str


def probe_int8(
    device: torch.device | str, dtype: torch.dtype, heads: int, width: int
) -> AttentionReport:
    """Try comfy-kitchen's attention on random tokens, and compare with torch's in fp32.

    Args:
        device: where it shall run.
        dtype: the compute dtype.
        heads, width: of the model; `_HEADS` of them are tried at most.
    """

    def made() -> Attention:
        from comfy_kitchen import int8_attention_is_available as is_available

        if not is_available(torch.device(device)):
            raise NotImplementedError(_not_there(torch.device(device)))
        return int8_attention()

    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, min(heads, _HEADS), width, generator=draw)
        for tokens in (_QUERIES, _KEYS, _KEYS)
    )
    k[..., ::_OUTLIERS] *= _OUTLIER
    return _tried(made, device, dtype, q, k, v)


def probe_sol(
    device: torch.device | str, dtype: torch.dtype, heads: int, width: int, tau: float = TAU
) -> AttentionReport:
    """Try sparse attention, on tokens that are alike in each block, as those of a video are among
    their neighbours: what is taken by its mean is then nearly exact.

    Args:
        tau: as `penstock.engine.attention.kernels.sol_attention`.
    """

    def made() -> Attention:
        from comfy_kitchen import sol_attn_is_available as is_available

        if not is_available(torch.device(device)):
            raise NotImplementedError(_not_there(torch.device(device), "sm80"))
        return sol_attention(tau)

    draw = torch.Generator().manual_seed(0)
    shape = (1, _SPARSE_BLOCKS, 1, min(heads, _HEADS), width)
    apart = (1, _SPARSE_BLOCKS, _SPARSE_BLOCK, min(heads, _HEADS), width)
    q, k, v = (
        (torch.randn(shape, generator=draw) + _ALIKE * torch.randn(apart, generator=draw)).flatten(
            1, 2
        )[:, : -_SPARSE_BLOCK // 2]
        for _ in range(3)
    )
    return _tried(made, device, dtype, q, k, v)


def probe(
    word: str, device: torch.device | str, dtype: torch.dtype, heads: int, width: int
) -> AttentionReport:
    """Try the attention that ``word`` asks for."""
    asked = Attending.of(word)
    if asked.kind == SOL:
        return probe_sol(device, dtype, heads, width, asked.tau)
    return probe_int8(device, dtype, heads, width)


def _tried(
    made: Callable[[], Attention],
    device: torch.device | str,
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> AttentionReport:
    q, k, v = (x.to(dtype) for x in (q, k, v))
    try:
        found = made()(*(x.to(device) for x in (q, k, v))).float().cpu()
    except ImportError as error:
        return _refusal(f"{error}; the extra 'fast' of penstock installs comfy-kitchen")
    except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        return _refusal(str(error).partition("\n")[0])
    return _verdict(found, attention(q.float(), k.float(), v.float()), q.shape[2])


def _refusal(reason: str) -> AttentionReport:
    return AttentionReport(False, None, reason)


def _not_there(device: torch.device, least: str = "sm75") -> str:
    if device.type != "cuda":
        return "it needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"comfy-kitchen has no kernel for this device (sm{major}{minor}; {least} or newer is "
        "needed)"
    )


def _verdict(found: Tensor, reference: Tensor, heads: int) -> AttentionReport:
    """Return both (1, tokens, heads * width), fp32."""
    if found.shape != reference.shape:
        return _refusal(f"a result of shape {tuple(found.shape)}, not {tuple(reference.shape)}")
    if not bool(torch.isfinite(found).all()):
        return _refusal("the result is not finite")
    pairs = zip(_heads(found, heads), _heads(reference, heads), strict=True)
    cosine = min(float(F.cosine_similarity(mine, theirs, dim=0)) for mine, theirs in pairs)
    if not cosine >= MIN_COSINE:
        return AttentionReport(False, cosine, f"cosine {cosine:.4f}, at least {MIN_COSINE} wanted")
    return AttentionReport(True, cosine, "")


def _heads(x: Tensor, heads: int) -> list[Tensor]:
    """Map (1, tokens, heads * width) -> for each head (tokens * width,)."""
    return [each.flatten() for each in x.chunk(heads, dim=2)]
