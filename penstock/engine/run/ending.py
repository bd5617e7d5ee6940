"""How a job ends: what is kept of it, and what its user is told."""

from __future__ import annotations

from types import TracebackType

import torch

from penstock.engine.run.keeper import Keeper
from penstock.engine.run.recovery import device_lost, out_of_memory
from penstock.errors import PenstockError


class Ending:
    """Around a job's work: notes in the keeper with which error it ended, if any.

    An error of the device becomes `DeviceLost`, memory that ran out where no plan could help
    becomes `OutOfMemory`, and errors of penstock say how to continue.

    Args:
        keeper: what is kept of the job.
        device: where it computes.
    """

    def __init__(self, keeper: Keeper, device: torch.device) -> None:
        self._keeper, self._device = keeper, device

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        named = device_lost(error) or out_of_memory(error, self._device)
        told = named or error
        how_to_continue = self._keeper.ended(told)
        if how_to_continue is not None and isinstance(told, PenstockError):
            told.add_remedy(how_to_continue)
        if named is not None:
            raise named from error
