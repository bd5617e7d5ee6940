"""Tiers: exact buffers, pinned where the driver agrees, and CUDA's queues on a late device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.errors import LedgerOverflow
from penstock.offload import streamer, tiers
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Queue, Ref, Residency
from penstock.offload.streamer import BlockStream
from penstock.offload.tiers import CpuLink, CudaLink, DeviceTier, HostTier, open_link
from tests.offload.blocks import random_blocks, same, write_blocks
from tests.offload.late_device import LateCuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BLOCKS = random_blocks(5)


def test_host_buffers_are_exact_and_on_pages() -> None:
    ledger = ByteLedger("RAM", 1 << 20)
    with HostTier(ledger, CPU).buffers("slabs", [8192, 0, 4096]) as buffers:
        assert ledger.by_label() == {"slabs": 12288}
        assert [buffer.tensor.numel() for buffer in buffers] == [8192, 0, 4096]
        assert [len(buffer.view) for buffer in buffers] == [8192, 0, 4096]
        for buffer in (buffers[0], buffers[2]):
            assert buffer.tensor.data_ptr() % 4096 == 0 and not buffer.is_pinned
            buffer.view[7] = 9
            assert buffer.tensor[7] == 9
    assert ledger.used == 0 and buffers == []


def test_device_buffers_are_cut_from_one_allocation() -> None:
    ledger = ByteLedger("VRAM", 12288)
    with DeviceTier(CPU, ledger).buffers("slots", [8192, 4096]) as buffers:
        assert [buffer.numel() for buffer in buffers] == [8192, 4096]
        assert buffers[0].untyped_storage().nbytes() == 12288
        assert buffers[1].data_ptr() == buffers[0].data_ptr() + 8192
        with pytest.raises(LedgerOverflow), DeviceTier(CPU, ledger).buffers("more", [1]):
            pytest.fail("there was no room")
    assert ledger.used == 0 and buffers == []


class Runtime:
    """CUDA's runtime, which lets only so many bytes be pinned."""

    def __init__(self, limit: int) -> None:
        self.left, self.pinned = limit, dict[int, int]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert address % 4096 == 0 and flags == 0
        if nbytes > self.left:
            return 2
        self.left -= nbytes
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


def test_what_the_driver_refuses_to_pin_stays_pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, cleared = Runtime(8192), []
    fake = type("Cuda", (), {"cudart": staticmethod(lambda: runtime)})
    monkeypatch.setattr(tiers, "_cuda", fake)
    monkeypatch.setattr(tiers, "_forget_cuda_error", cleared.append)
    tier = HostTier(ByteLedger("RAM", 1 << 20), CUDA)
    with tier.buffers("slabs", [4096, 8192, 4096]) as buffers:
        assert [buffer.is_pinned for buffer in buffers] == [True, False, True]
        assert sorted(runtime.pinned.values()) == [4096, 4096]
        assert tier.pageable_bytes == 8192 and cleared == [CUDA]
    assert runtime.pinned == {}


def test_the_refusal_is_not_left_to_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, **named: Any) -> None:
        raise RuntimeError("out of memory, said the registration")

    monkeypatch.setattr(torch, "zeros", kernel)
    tiers._forget_cuda_error(CUDA)


def test_which_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_cuda", LateCuda(0))
    assert isinstance(open_link(CPU, 1), CpuLink)
    assert isinstance(open_link(CUDA, 1), CudaLink)


class LateLink(CudaLink):
    """The CUDA link, whose copies are done by the late device; it forgets the waits in ``lost``."""

    lost: frozenset[tuple[Queue, Queue]] = frozenset()

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._copy.push(lambda: target.copy_(source))

    def wait(self, queue: Queue, ref: Ref) -> None:
        if (queue, ref.queue) not in self.lost:
            super().wait(queue, ref)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[BlockLayout]:
    return write_blocks(tmp_path_factory.mktemp("late") / "model.safetensors", BLOCKS)


RESIDENCIES = (
    Residency(5, (), (), 1, 1),
    Residency(5, (), (), 2, 2),
    Residency(5, (1,), (3,), 2, 1),
    Residency(5, (), (0, 2), 1, 2),
    Residency(5, (), (0, 1, 2, 3, 4), 2, 0),
)


def wrong_blocks(
    layouts: list[BlockLayout],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    lost: frozenset[tuple[Queue, Queue]] = frozenset(),
    overlapped: bool = True,
) -> int:
    """Stream on a late device; how many blocks were wrong when they were computed with."""
    cuda, cycles, wrong = LateCuda(seed), 3, []
    monkeypatch.setattr(tiers, "_cuda", cuda)
    monkeypatch.setattr(LateLink, "lost", lost)
    monkeypatch.setattr(streamer, "open_link", lambda device, longest: LateLink(CUDA, longest))
    ledgers = ByteLedger("VRAM", 1 << 30), ByteLedger("RAM", 1 << 30)
    stream = BlockStream(
        layouts,
        RESIDENCIES[seed % len(RESIDENCIES)],
        cycles=cycles,
        device=CPU,
        device_ledger=ledgers[0],
        host_ledger=ledgers[1],
        overlapped=overlapped,
    )

    def check(index: int, block: dict[str, Tensor]) -> None:
        if not same(block, BLOCKS[index]):
            wrong.append(index)

    with stream:
        for _ in range(cycles):
            for index, block in stream.cycle():
                cuda.issue(lambda index=index, block=block: check(index, block))  # type: ignore[misc]
    assert ledgers[0].used == 0 == ledgers[1].used
    return len(wrong)


@pytest.mark.parametrize("overlapped", [True, False])
def test_events_suffice_on_a_late_device(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch, overlapped: bool
) -> None:
    for seed in range(60):
        assert wrong_blocks(layouts, monkeypatch, seed, overlapped=overlapped) == 0


@pytest.mark.parametrize(
    "wait",
    [(Queue.READ, Queue.COPY), (Queue.COPY, Queue.COMPUTE), (Queue.COMPUTE, Queue.COPY)],
    ids=["slab reused", "slot reused", "computed too early"],
)
def test_each_wait_is_needed(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch, wait: tuple[Queue, Queue]
) -> None:
    wrong = sum(
        wrong_blocks(layouts, monkeypatch, seed, frozenset([wait])) > 0 for seed in range(15)
    )
    assert wrong > 3


def test_events_are_forgotten_when_nobody_can_wait_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "_cuda", LateCuda(0))
    link = CudaLink(CUDA, longest_wait=4)
    for visit in range(100):
        link.record(Ref(Queue.READ, visit))
        link.record(Ref(Queue.COPY, visit))
        link.record(Ref(Queue.COMPUTE, visit))
    assert set(link._events) == {
        Ref(queue, visit) for queue in (Queue.COPY, Queue.COMPUTE) for visit in range(95, 100)
    }


def test_time_on_the_device_is_settled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seconds = LateCuda(1), list[float]()
    monkeypatch.setattr(tiers, "_cuda", cuda)
    monkeypatch.setattr(cuda, "get_on", lambda: None)
    link = CudaLink(CUDA, 1)
    for _ in range(3):
        with link.timed(Queue.COPY, seconds.append):
            pass
    assert seconds == []
    with link.timed(Queue.COMPUTE, seconds.append):
        pass
    link._copy.synchronize()
    with link.timed(Queue.COPY, seconds.append):
        pass
    assert seconds == [1.0] * 3
    link.drain()
    assert seconds == [1.0] * 5
