"""The video being decoded: tile after tile, those that are kept taken as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from penstock.engine.families.wan.landing import landing
from penstock.engine.families.wan.vae_decode import decode_tiled, tile_windows
from penstock.engine.run.keeper import Keeper
from penstock.profiles.tiling import TileGrid, Window


class Film:
    """The frames of a video and which of its tiles are done.

    Args:
        vae: as for `decode_tiled`.
        latents: likewise.
        grid: rows and columns of tiles.
        shape: frames, height, width, 3.
        keeper: gives tiles that were decoded before, and keeps new ones.

    Attributes:
        video: uint8, of that shape, in RAM; whole after :meth:`decode`.
    """

    def __init__(
        self, vae: Any, latents: Tensor, grid: TileGrid, shape: tuple[int, ...], keeper: Keeper
    ) -> None:
        self._vae, self._latents, self._grid, self._keeper = vae, latents, grid, keeper
        self._windows = tile_windows(vae, grid, *latents.shape[-2:])
        self.video = torch.empty(shape, dtype=torch.uint8)

    def decode(self, *, should_stop: Callable[[], None]) -> None:
        """Fill ``video``.

        Args:
            should_stop: called between units of work; ends the decoding by raising.
        """
        kept = set(self._take_kept())
        if len(kept) == len(self._windows):
            return
        last = self.video.shape[0] - 1
        pieces = decode_tiled(
            self._vae, self._latents, self._grid, skip=kept, should_stop=should_stop
        )
        with landing(self._latents.device, self._piece_bytes) as landed:
            for piece in landed.pieces(pieces):
                tile = self._part(piece.window)
                tile[piece.frame] = piece.pixels
                if piece.frame == last:
                    self._keeper.save_tile(self._size, piece.tile, tile)

    @property
    def _piece_bytes(self) -> int:
        """Of the largest frame of a tile."""
        return 3 * max(rows * cols for rows, cols in (window.shape for window in self._windows))

    def _take_kept(self) -> list[int]:
        taken = []
        for index, frames in self._keeper.tiles(self._size):
            if index < len(self._windows):
                part = self._part(self._windows[index])
                if part.shape == frames.shape and frames.dtype == torch.uint8:
                    part.copy_(frames)
                    taken.append(index)
        return taken

    def _part(self, window: Window) -> Tensor:
        rows, cols = window.inside(Window.whole(*self.video.shape[1:3]))
        return self.video[:, rows, cols]

    @property
    def _size(self) -> tuple[int, int]:
        return self._grid.rows, self._grid.cols
