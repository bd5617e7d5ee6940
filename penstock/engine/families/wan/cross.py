"""Where the cross-attention keys and values live between steps: in VRAM, or in RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.engine.families.wan.forward import CrossKV


class CrossStore:
    """The `CrossKV` of all blocks and branches, computed once a prompt.

    Args:
        device: where they are needed.
        on_device: they stay there; else they wait in RAM and one at a time is copied over.
    """

    def __init__(self, device: torch.device, *, on_device: bool) -> None:
        self._device = device
        self._home = device if on_device else torch.device("cpu")
        self._away = not on_device
        self._blocks: list[tuple[CrossKV, ...]] = []

    def add(self, branches: Sequence[CrossKV]) -> None:
        """Keep the next block's, one entry a branch. Tensors that branches share stay shared."""
        moved: dict[int, Tensor] = {}

        def keep(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return moved.setdefault(id(tensor), tensor.to(self._home, copy=self._away))

        self._blocks.append(tuple(_mapped(branch, keep) for branch in branches))

    def branch(self, branch: int) -> CrossBranch:
        """Return the `CrossKV` of one branch, by block index, on the device."""
        return CrossBranch(self, branch)

    def get(self, block: int, branch: int) -> CrossKV:
        """Return one block's for one branch, on the device."""
        kept = self._blocks[block][branch]
        if not self._away:
            return kept
        return _mapped(kept, lambda t: None if t is None else t.to(self._device, copy=True))


@dataclass(frozen=True)
class CrossBranch:
    """One branch of a `CrossStore`, indexed by block; each look-up may copy to the device."""

    store: CrossStore
    branch: int

    def __getitem__(self, block: int) -> CrossKV:
        return self.store.get(block, self.branch)


def _mapped(cross: CrossKV, change: Callable[[Tensor | None], Tensor | None]) -> CrossKV:
    k, v = change(cross.k), change(cross.v)
    assert k is not None and v is not None
    return replace(
        cross,
        k=k,
        v=v,
        k_img=change(cross.k_img),
        v_img=change(cross.v_img),
        k_away=change(cross.k_away),
        v_away=change(cross.v_away),
    )
