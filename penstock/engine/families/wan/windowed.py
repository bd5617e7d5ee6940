"""A step of a long video: windows of it go through the blocks, several in one visit.

What each of them predicts is weighed and added up where they overlap; how many share a visit
changes no bit of it.

Of an image-to-video model every window sees the picture as its first frame, as it was trained: one
without a picture is nothing that it knows (of the small model's videos nothing was left after two
windows, where a window saw what the whole video's condition has in its place). The price is that a
window may begin in the picture's pose again (so it is told of ComfyUI's windows that keep the
picture, github.com/Comfy-Org/ComfyUI/pull/14136), where it counts least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from penstock.profiles.windows import Windows

Visit = Callable[[Iterator[tuple[Tensor, Sequence[int]]]], Iterator[Tensor]]
"""One pass over all blocks: of model inputs, each with the branches that are wanted of it, to a
prediction for each of these."""


@dataclass(frozen=True)
class Cut:
    """A long video cut into windows.

    Attributes:
        grid: latent frames, height and width of a window.
        parts: latent frames of each window.
        weights: what its prediction counts, (t, 1, 1).
        branches: CFG branches of a window.
    """

    grid: tuple[int, int, int]
    parts: tuple[slice, ...]
    weights: tuple[Tensor, ...]
    branches: int

    @classmethod
    def of(cls, windows: Windows, latents: Tensor, branches: int) -> Cut:
        """Return the windows (in latent frames) of ``latents`` (1, z, t, h, w)."""
        frames = latents.shape[2]
        weights = tuple(
            torch.tensor(row, dtype=latents.dtype, device=latents.device)[:, None, None]
            for row in windows.weights(frames)
        )
        grid = (windows.length, latents.shape[3], latents.shape[4])
        return cls(grid, windows.parts(frames), weights, branches)

    def predict(
        self,
        latents: Tensor,
        see: Callable[[slice], Tensor],
        passes: Sequence[range],
        visit: Visit,
        guide: Callable[[list[Tensor]], Tensor],
    ) -> Tensor:
        """Return what the windows predict together, (1, z, t, h, w), fp32.

        Args:
            latents: (1, z, t, h, w), fp32.
            see: the model input of the window that covers these latent frames.
            passes: the branches of all windows, window by window, divided into visits.
            visit: of the transformer.
            guide: the predictions of a window's branches to one; it may use them up.
        """
        fused, waiting = torch.zeros_like(latents), list[Tensor]()
        left = iter(zip(self.parts, self.weights, strict=True))
        for states in passes:
            for prediction in visit(self._inputs(see, states)):
                waiting.append(prediction)
                # Branches of a window come one after another, and a visit may end between them:
                # what waits is guided as soon as its window is complete, so that one window's
                # predictions live at a time.
                if len(waiting) == self.branches:
                    part, weight = next(left)
                    fused[:, :, part].addcmul_(guide(waiting).to(fused.dtype), weight)
                    waiting.clear()
                del prediction
        return fused

    def _inputs(
        self, see: Callable[[slice], Tensor], states: range
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the model inputs of a visit, one at a time, and the branches of each."""
        for window, group in groupby(states, key=lambda state: state // self.branches):
            yield see(self.parts[window]), [state % self.branches for state in group]


def seen(condition: Tensor, part: slice) -> Tensor:
    """Return what a window sees of mask and pictures (1, 20, t, h, w): the first latent frame, and
    what follows its own."""
    if part.start == 0:
        return condition[:, :, part]
    return torch.cat([condition[:, :, :1], condition[:, :, part.start + 1 : part.stop]], dim=2)
