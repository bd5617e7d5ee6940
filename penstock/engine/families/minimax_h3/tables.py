"""The AdaLN tables: what the time embedding becomes in each block, computed once a job.

40 % of a block's weights make nothing but these from the timestep. The distinct timesteps of a step
go through the projection together, as they do in diffusers' module: how a row is rounded depends
on how many there are. All of them lie in host memory, those of a step on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.families.minimax_h3.config import MODALITIES
from penstock.engine.families.minimax_h3.modules import TimeCurve

HELD = 0.999
"""The timestep that given pictures are held at, or the video's where that is larger."""


@dataclass(frozen=True)
class StepTimes:
    """The timesteps of one step.

    Attributes:
        values: the distinct ones, (n,), fp32, rising.
        index: of "video", "sound" and "given" (where pictures are), among them.
    """

    values: Tensor
    index: dict[str, int]

    @classmethod
    def of(cls, video: float, sound: float, pictures: bool) -> StepTimes:
        """Make it of a step that tells the video and the sound so."""
        told = {"video": video, "sound": sound}
        if pictures:
            told["given"] = max(video, HELD)
        every = torch.tensor(list(told.values()), dtype=torch.float32)
        values, inverse = torch.unique(every, sorted=True, return_inverse=True)
        return cls(values, dict(zip(told, inverse.tolist(), strict=True)))


@dataclass(frozen=True)
class StepTables:
    """The tables of one step, on one device.

    Attributes:
        times: of the step.
        blocks: (blocks, 6, rows, d): shift, scale and gate of attention and feed-forward, each
            scale plus one; a row is a timestep and a modality.
        out: of the last norm: (2, timesteps, d), shift and scale plus one; fp32 of a pruned model.
    """

    times: StepTimes
    blocks: Tensor
    out: Tensor

    def row(self, time: str, tag: int) -> int:
        """Return the row of a block's tables for rows of that timestep and modality."""
        return self.times.index[time] * MODALITIES + tag

    def time(self, time: str) -> int:
        """Return the row of the last norm's tables."""
        return self.times.index[time]

    def block(self, index: int) -> Tensor:
        """Return (6, rows, d) of a block."""
        return self.blocks[index]

    def to(self, device: torch.device) -> StepTables:
        """Return the same on ``device``."""
        return replace(self, blocks=self.blocks.to(device), out=self.out.to(device))

    @property
    def nbytes(self) -> int:
        """Of all tables of the step."""
        return self.blocks.nbytes + self.out.nbytes


class TablesInWork:
    """The tables of all steps while they are made: block by block, as their weights come.

    Args:
        model: ``time_embedder`` and ``norm_out.linear`` bound; used here only.
        steps: the timesteps of each step.
        blocks: of the model.
        dtype: that the projections compute in.
        device: where they do.
    """

    def __init__(
        self,
        model: Any,
        steps: Sequence[StepTimes],
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._steps = tuple(steps)
        self._dtype = dtype
        self._activated = [_activated(model, step.values.to(device), dtype) for step in steps]
        self._out = [_out(model, rows) for rows in self._activated]
        self._tables: list[Tensor | None] = [None] * len(self._steps)
        self._blocks = blocks

    def add(self, index: int, block: Any) -> None:
        """Make those of the block ``index``, whose projection is bound."""
        for step, rows in enumerate(self._activated):
            made = modulation(_projection(block.adaln_proj), rows, self._dtype)
            held = self._tables[step]
            if held is None:
                held = torch.empty((self._blocks, *made.shape), dtype=made.dtype)
                self._tables[step] = held
            held[index] = made

    def done(self) -> list[StepTables]:
        """Return all tables, in host memory, a step an entry."""
        found = []
        for step, blocks, out in zip(self._steps, self._tables, self._out, strict=True):
            assert blocks is not None
            found.append(StepTables(step, blocks, out))
        return found


def _activated(model: Any, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the projections take: (timesteps, time_embed_dim).

    A pruned model's curve holds the activation already, and its projections stay in fp32.
    """
    embedded: Tensor = model.time_embedder(model.time_proj(timesteps))
    is_curve = isinstance(model.time_embedder, TimeCurve)
    return embedded if is_curve else F.silu(embedded).to(dtype)


def _projection(owner: Any) -> Any:
    """Return the projection of the time embedding, whole or pruned."""
    return owner.curve if hasattr(owner, "curve") else owner.linear


def _out(model: Any, activated: Tensor) -> Tensor:
    shift, scale = _projection(model.norm_out)(activated).chunk(2, dim=-1)
    return torch.stack([shift, 1.0 + scale]).cpu()


def modulation(linear: Any, activated: Tensor, dtype: torch.dtype) -> Tensor:
    """Map (timesteps, time_embed_dim) to (6, timesteps * modalities, d) in ``dtype``, scales plus
    one."""
    made: Tensor = linear(activated).to(dtype)
    six = made.view(len(activated) * MODALITIES, 6, -1).permute(1, 0, 2).contiguous()
    for scale in (six[1], six[4]):
        scale.add_(1.0)  # as `1.0 + scale` rounds, row by row or once
    return six
