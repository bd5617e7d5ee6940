"""Decoded pieces on their way from the device to RAM.

A copy to memory that is not pinned waits for all that the device has been given, and the device
then waits in turn for the next piece's kernels to be issued. So on CUDA a piece goes through one of
two pinned buffers, and is taken from there when the next one's kernels are on their way. The bits
are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.wan.terms import LANDING_BUFFERS, landing_bytes
from penstock.engine.families.wan.vae_decode import Piece, to_uint8
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import HostTier
from penstock.profiles.tiling import Window


@dataclass(frozen=True)
class Landed:
    """A piece in RAM.

    Attributes:
        tile, frame, window: as `Piece` has them.
        pixels: uint8 (h, w, 3), until the next piece is asked for.
    """

    tile: int
    frame: int
    window: Window
    pixels: Tensor


class Landing:
    """Where pieces come down in order: at once, or through pinned buffers one piece later.

    Args:
        buffers: pinned, uint8, as large as the largest piece; none: pieces are in RAM already.
        event: makes what is recorded on the device's queue, and waited for.
    """

    def __init__(
        self, buffers: tuple[Tensor, ...] = (), event: Callable[[], Any] = torch.cuda.Event
    ) -> None:
        self._buffers, self._event = buffers, event
        self._count = 0
        self._last: Any = None

    def pieces(self, pieces: Iterator[Piece]) -> Iterator[Landed]:
        """Yield all of ``pieces``, in their order."""
        behind = max(0, len(self._buffers) - 1)
        flying: deque[Callable[[], Landed]] = deque()
        for piece in pieces:
            flying.append(self._begin(piece))
            if len(flying) > behind:
                yield flying.popleft()()
        while flying:
            yield flying.popleft()()

    def _begin(self, piece: Piece) -> Callable[[], Landed]:
        """Let a piece come; what waits for it. Its memory on the device may be given back at once:
        whatever is issued next comes after the copy."""
        pixels = to_uint8(piece.pixels)
        at = piece.tile, piece.frame, piece.window
        if not self._buffers:
            return lambda: Landed(*at, pixels)
        buffer = self._buffers[self._count % len(self._buffers)]
        self._count += 1
        view = buffer[: pixels.numel()].view(pixels.shape)
        view.copy_(pixels, non_blocking=True)
        self._last = copied = self._event()
        copied.record()

        def waited() -> Landed:
            copied.synchronize()
            return Landed(*at, view)

        return waited

    def settle(self) -> None:
        """Wait until nothing comes down any more."""
        if self._last is not None:
            self._last.synchronize()


@contextmanager
def landing(device: torch.device, piece_bytes: int) -> Iterator[Landing]:
    """Provide a landing for pieces of at most ``piece_bytes``; its phase has reserved
    `landing_bytes`."""
    if device.type == "cpu":
        yield Landing()
        return
    total = landing_bytes(piece_bytes)
    host = HostTier(ByteLedger("frames being copied", total), device)
    with host.buffers("frames being copied", LANDING_BUFFERS * [total // LANDING_BUFFERS]) as made:
        found = Landing(tuple(buffer.tensor for buffer in made))
        try:
            yield found
        finally:  # the buffers are unpinned next
            found.settle()
