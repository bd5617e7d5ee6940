"""Independent measures of memory: the live storages that torch operations have made, and all that
torch's CPU allocator gives."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageMeter(TorchDispatchMode):
    """Sums the storages of all tensors that operations inside it return, while they live.

    Works on real and on fake tensors and counts each storage once, whatever views exist.
    Storages of ``exclude`` (weights, given inputs) and of the meta device (no bytes) are left
    out. ``live`` and ``peak`` are bytes.
    """

    def __init__(self, exclude: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._excluded: list[torch.UntypedStorage] = []
        for tensor in exclude:
            self.exclude(tensor)

    def exclude(self, tensor: torch.Tensor) -> None:
        """Never count the storage of ``tensor``."""
        storage = tensor.untyped_storage()
        self._excluded.append(storage)
        self._known.add(storage._cdata)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator has given at a time during ``work``.

    Unlike `StorageMeter` it sees what operations take for themselves: workspaces, and copies in
    another layout.
    """
    work()  # what is made once, such as compiled kernels, is not of interest
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((nbytes for _, nbytes in changes), initial=0))
