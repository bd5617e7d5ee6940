"""The ceiling on torch's CUDA allocator, with an imitation of the device."""

from __future__ import annotations

import types
from contextlib import ExitStack

import pytest
import torch

from penstock.offload.allocator import allocator_capped

GIB = 1 << 30
DEVICE = torch.device("cuda")


class Allocator:
    """torch's, of a card of 24 GiB.

    Attributes:
        share: that it may take.
        reserved: bytes that it holds for others.
        peaks: how often they began anew.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.share, self.reserved, self.peaks = 1.0, 0, 0
        card = types.SimpleNamespace(total_memory=24 * GIB)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        patch.setattr(torch.cuda, "memory_reserved", lambda index: self.reserved)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", self._set)
        patch.setattr(
            torch.cuda.memory, "get_per_process_memory_fraction", lambda index: self.share,
            raising=False,
        )  # fmt: skip

    def _set(self, share: float, index: int) -> None:
        assert type(index) is int, "torch takes no device without an index here"
        self.share = share

    def _reset(self, index: int) -> None:
        self.peaks += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def test_the_share_is_that_of_the_budget_and_is_given_back(allocator: Allocator) -> None:
    with allocator_capped(DEVICE, 12 * GIB):
        assert allocator.share == 0.5
    assert allocator.share == 1.0
    with pytest.raises(KeyError), allocator_capped(DEVICE, 99 * GIB):
        assert allocator.share == 1.0
        raise KeyError
    assert allocator.share == 1.0 and allocator.peaks == 2


def test_what_others_hold_comes_on_top(allocator: Allocator) -> None:
    allocator.reserved = 6 * GIB
    with allocator_capped(DEVICE, 6 * GIB):
        assert allocator.share == 0.5


def test_a_ceiling_that_others_set_stays(allocator: Allocator) -> None:
    allocator.share = 0.25
    with allocator_capped(DEVICE, 12 * GIB):
        assert allocator.share == 0.25
    assert allocator.share == 0.25


def test_two_at_once_have_what_both_may_take(allocator: Allocator) -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(allocator_capped(DEVICE, 6 * GIB))
        allocator.reserved = 5 * GIB  # the first one's
        second.enter_context(allocator_capped(torch.device("cuda", 0), 12 * GIB))
        assert allocator.share == 0.75 and allocator.peaks == 1
        first.close()
        assert allocator.share == 0.5
        second.close()
        assert allocator.share == 1.0


def test_on_a_cpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "set_per_process_memory_fraction")
    with allocator_capped(torch.device("cpu"), 1):
        pass
