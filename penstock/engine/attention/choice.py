"""What self-attention runs on: as asked, or torch's own where that does not work here.

Free of torch until another is asked for.
"""

from __future__ import annotations

from penstock.profiles.attending import SDPA
from penstock.profiles.manifest import Heads
from penstock.profiles.profile import Chosen, with_torchs_attention

TAGS = {2: "BF16", 4: "F32"}
"""The dtype that a model without files computes in, by its bytes an element."""


def attending_on(
    chosen: Chosen, heads: Heads, tag: str | None = None
) -> tuple[Chosen, tuple[str, ...]]:
    """Return ``chosen`` with the attention that works on its device, and what is to be said of it.

    Args:
        chosen: whose device is here; what a described machine can is not asked.
        heads: of the network that shall attend.
        tag: safetensors tag of the dtype it computes in; None: by its bytes an element.
    """
    word = chosen.policy.attention
    if word == SDPA:
        return chosen, ()
    from penstock.engine.attention.probe import probe
    from penstock.offload.checkpoint import torch_dtype

    report = probe(
        word,
        chosen.hardware.place,
        torch_dtype(tag or TAGS[heads.itemsize]),
        heads.count,
        heads.width,
    )
    if report.works:
        return chosen, (f"{word} attention: it works here (cosine {report.cosine:.4f} to fp32)",)
    told = f"{word} attention: not here, torch's own attends ({report.reason})"
    return with_torchs_attention(chosen, report.reason), (told,)


def attention_numerics(attention: str) -> str:
    """Return what a fingerprint says of the attention: results depend on the library's version."""
    if attention == SDPA:
        return attention
    from penstock.engine.software import package_version

    return f"{attention}, comfy-kitchen {package_version('comfy-kitchen')}"
