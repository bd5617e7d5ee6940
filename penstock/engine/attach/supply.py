"""The blocks of a network, brought as its forward comes to use them, in an order that is learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.closing import Closing
from penstock.engine.attach.endless import EndlessStream
from penstock.engine.run.room import residency
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.streamer import BlockStream
from penstock.profiles.plan import StreamPlan

MOST_LESSONS = 4
"""Orders that are learnt of one network: two that it takes by turns must not chase each other."""

MOST_FORKS = 4
"""Blocks after which nothing is read ahead; of more, those that were found last."""

_LONGEST_LAP = 4
"""Times the number of blocks: a lap whose first block does not come again is given up."""


@dataclass(frozen=True)
class Tiers:
    """Where blocks are brought from and to.

    Attributes:
        device: the memory they are wanted in.
        vram, ram: every buffer is reserved there first.
    """

    device: torch.device
    vram: ByteLedger
    ram: ByteLedger


class VisitOrder:
    """In which order a network uses its blocks, learnt from how it did.

    Args:
        count: blocks.
        known: the order of their numbers is that of their use; else the first lap tells.

    Attributes:
        blocks: their numbers, in the order of use.
        known: as above, by now.
    """

    def __init__(self, count: int, *, known: bool) -> None:
        self.blocks = list(range(count))
        self.known = known
        self._lap: list[int] = []
        self._lessons = 0

    def note(self, block: int) -> bool:
        """Note that ``block`` is used next; return whether another order has been learnt from it.

        A lap ends when its first block comes again.
        """
        lap = self._lap
        if not lap or block != lap[0] or len(lap) == 1:
            lap.append(block)
            if len(lap) > _LONGEST_LAP * len(self.blocks):
                lap.clear()
            return False
        seen = list(dict.fromkeys(lap))
        self._lap = [block]
        places = [self.blocks.index(each) for each in seen]
        as_expected = self.known and places == sorted(places)
        if as_expected or self._lessons == MOST_LESSONS:
            return False
        self.blocks = seen + [each for each in self.blocks if each not in set(seen)]
        self.known = True
        self._lessons += 1
        return True


class Supply(Closing):
    """Brings one block after the other, whichever is asked for; the first opens it.

    Args:
        layouts: one a block.
        tiers: where they are brought.
        place: where blocks of these sizes, in the order of their use, shall live.
        known: their order is that of their use. Else they come one at a time, without reading
            ahead, until the network has shown the order.

    Attributes:
        plan: where blocks live; None before it is opened.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        tiers: Tiers,
        place: Callable[[Sequence[int]], StreamPlan],
        *,
        known: bool,
    ) -> None:
        self._layouts, self._tiers, self._place = layouts, tiers, place
        self._order = VisitOrder(len(layouts), known=known)
        self._stream: EndlessStream | None = None
        self._places: dict[int, int] = {}
        self._visit = ExitStack()
        self._moved = [0, 0, 0, 0]
        self._explores = False
        self._last: int | None = None
        self._forks: list[int] = []
        self.plan: StreamPlan | None = None

    def bring(self, block: int) -> Mapping[str, Tensor]:
        """Return the tensors of ``block``, until `leave`.

        Raises:
            LedgerOverflow: (the first time) the buffers do not fit the budgets.
            CheckpointChanged, ...: the weights cannot be read.
        """
        if self._order.note(block):
            self.close()
        elif self._stream is not None:
            self._mind(block)
            self._stream.announce(self._places[block])
        self.leave()
        self.open()
        assert self._stream is not None
        self._last = block
        return self._visit.enter_context(self._stream.visit(self._places[block]))

    def _mind(self, block: int) -> None:
        """Learn after which blocks some are left out, as a step cache does: it decides there
        whether the rest of a pass is computed, and what was read ahead is read in vain if not."""
        assert self._stream is not None
        last = self._last
        if last is None or last in self._forks or self._explores:
            return
        if (self._places[block] - self._places[last]) % len(self._layouts) != 1 % len(
            self._layouts
        ):
            self._forks = [*self._forks, last][-MOST_FORKS:]
            self._pause()

    def _pause(self) -> None:
        assert self._stream is not None
        self._stream.pause_after([self._places[fork] for fork in self._forks])

    def leave(self) -> None:
        """Give back the block that was brought last."""
        self._visit.close()

    def is_last(self, block: int) -> bool:
        """Return whether a pass ends with ``block``."""
        return self._order.blocks[-1] == block

    def open(self) -> None:
        """Take the buffers and begin to read, if that has not been done.

        Raises:
            LedgerOverflow: the buffers do not fit the budgets.
        """
        if self._stream is not None:
            return
        layouts = [self._layouts[block] for block in self._order.blocks]
        self._places = {block: at for at, block in enumerate(self._order.blocks)}
        self.plan = self._place([layout.nbytes for layout in layouts])
        # Where nothing is read again, another order than the right one costs nothing.
        explores = not self._order.known and self.plan.staging_buffers > 0
        places = residency(StreamPlan(len(layouts), 0, 0, 1, 1) if explores else self.plan)
        self._explores = explores

        def make(passes: int) -> BlockStream:
            return BlockStream(
                layouts,
                places,
                passes=passes,
                device=self._tiers.device,
                device_ledger=self._tiers.vram,
                host_ledger=self._tiers.ram,
                overlapped=not explores,
            )

        self._stream = EndlessStream(make).__enter__()
        self._pause()

    def close(self) -> None:
        """End the stream; the next block opens another. What was learnt stays known."""
        self.leave()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            now = self._counts(stream)
            self._moved = [was + more for was, more in zip(self._moved, now, strict=True)]

    def _counts(self, stream: EndlessStream) -> list[int]:
        """Return passes, visits left out, bytes read and copied. While the order is being learnt
        nothing is moved that is not asked for: it is one pass."""
        walked = [1, 0] if self._explores else [stream.passes, stream.skipped]
        return [*walked, stream.read_bytes, stream.copied_bytes]

    def _sum(self, which: int) -> int:
        return self._moved[which] + (self._counts(self._stream)[which] if self._stream else 0)

    @property
    def passes(self) -> int:
        """Over all blocks so far, begun ones included."""
        return self._sum(0)

    @property
    def skipped(self) -> int:
        """Visits of blocks that went by because another one was wanted."""
        return self._sum(1)

    @property
    def read_bytes(self) -> int:
        """From disk to host memory, so far."""
        return self._sum(2)

    @property
    def copied_bytes(self) -> int:
        """From host memory to the device, so far."""
        return self._sum(3)
