"""Whether attention in 8 bits works on a device, found by trying it on a small problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention.kernels import attention, int8_attention

MIN_COSINE = 0.99
"""To attention in fp32, of the worst head; queries, keys and values in int8 reach some 0.999."""

_QUERIES, _KEYS, _HEADS = 200, 1100, 4
"""Tokens: more keys than 1024, from which on the kernel takes its large tiles, and no whole number
of tiles of either; heads at the most."""

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
    device = torch.device(device)
    try:
        from comfy_kitchen import int8_attention_is_available as is_available

        if not is_available(device):
            return _refusal(_not_there(device))
        draw = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, tokens, min(heads, _HEADS), width, generator=draw)
            for tokens in (_QUERIES, _KEYS, _KEYS)
        )
        k[..., ::_OUTLIERS] *= _OUTLIER
        q, k, v = (x.to(dtype) for x in (q, k, v))
        found = int8_attention()(*(x.to(device) for x in (q, k, v))).float().cpu()
    except ImportError as error:
        return _refusal(f"{error}; the extra 'fast' of penstock installs comfy-kitchen")
    except (RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        return _refusal(str(error).partition("\n")[0])
    return _verdict(found, attention(q.float(), k.float(), v.float()), q.shape[2])


def _refusal(reason: str) -> AttentionReport:
    return AttentionReport(False, None, reason)


def _not_there(device: torch.device) -> str:
    if device.type != "cuda":
        return "it needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"comfy-kitchen has no kernel for this device (sm{major}{minor}; sm75 or newer is needed)"
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
