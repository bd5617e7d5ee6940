"""What self-attention runs on, by name: how it is spelled, and what each asks of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from penstock.errors import ProfileError, brief

SDPA, INT8, SOL = "sdpa", "int8", "sol"

TAU = 1.0
"""Of "sol" alone: comfy-kitchen's own. Above it fewer keys are attended to one by one."""

DENSE_ONE_IN = 5
"""Steps of a job over those at its start that sparse attention leaves dense: what a video shows and
where is decided there."""


@dataclass(frozen=True)
class Backend:
    """What a kind of attention is, and asks for.

    Attributes:
        told: who attends, and how, for people.
        rate: the field of a machine's rates for it; None: as torch's own.
        whole: all queries must come at once: the tokens of a block are one chunk.
        sparse: the first steps of a job are attended to by torch all the same.
    """

    told: str
    rate: str | None = None
    whole: bool = False
    sparse: bool = False


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        SDPA: Backend("by torch"),
        INT8: Backend("in 8 bits, by comfy-kitchen", "int8_attention_flops"),
        SOL: Backend("sparse, by comfy-kitchen", "sol_attention_flops", whole=True, sparse=True),
    }
)

_EXPECTED = "sdpa or int8, or sol or sol:TAU (sparse; a threshold above 0, such as 1)"


@dataclass(frozen=True)
class Attending:
    """An attention as it is asked for.

    Attributes:
        kind: a name of `BACKENDS`.
        tau: of "sol".
    """

    kind: str = SDPA
    tau: float = TAU

    @classmethod
    def of(cls, word: object) -> Attending:
        """Read what flags and files spell.

        Raises:
            ProfileError: no such word.
        """
        kind, colon, value = word.partition(":") if isinstance(word, str) else ("", "", "")
        if kind in BACKENDS and not colon:
            return cls(kind)
        try:
            tau = float(value) if kind == SOL else 0.0
        except ValueError:
            tau = 0.0
        if not 0 < tau < math.inf:
            raise ProfileError("illegal attention", expected=_EXPECTED, found=brief(word))
        return cls(kind, tau)

    @property
    def backend(self) -> Backend:
        """What it is."""
        return BACKENDS[self.kind]

    def dense_steps(self, steps: int) -> int:
        """Return how many of a job's steps, at its start, torch attends to."""
        return -(-steps // DENSE_ONE_IN) if self.backend.sparse else 0
