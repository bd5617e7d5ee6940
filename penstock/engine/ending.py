"""How a job ends: what is kept of it, and what its user is told."""

from __future__ import annotations

from types import TracebackType

from penstock.engine.keeper import Keeper
from penstock.engine.recovery import device_lost
from penstock.errors import PenstockError


class Ending:
    """Around a job's work: notes in the keeper with which error it ended, if any.

    An error of the device becomes `DeviceLost`, and errors of penstock say how to continue.

    Args:
        keeper: what is kept of the job.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

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
        lost = device_lost(error)
        told = lost or error
        how_to_continue = self._keeper.ended(told)
        if how_to_continue is not None and isinstance(told, PenstockError):
            told.add_remedy(how_to_continue)
        if lost is not None:
            raise lost from error
