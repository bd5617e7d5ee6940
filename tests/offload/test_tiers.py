"""Tiers: exact buffers, pinned where the driver agrees, and CUDA's queues on a late device."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.errors import LedgerOverflow
from penstock.offload import streamer, tiers
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Queue, Ref, Residency
from penstock.offload.streamer import BlockStream
from penstock.offload.tiers import CpuLink, CudaLink, DeviceTier, HostTier, open_link
from tests.offload.blocks import random_blocks, same, write_blocks
from tests.offload.turns import Ranks
from tests.offload.virtual import Stage

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BLOCKS = random_blocks(5)


def test_host_buffers_are_exact_and_on_pages() -> None:
    ledger = ByteLedger("RAM", 1 << 20)
    with HostTier(ledger, CPU).buffers("staging buffers", [8192, 0, 4096]) as buffers:
        assert ledger.by_label() == {"staging buffers": 12288}
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
    with tier.buffers("staging buffers", [4096, 8192, 4096]) as buffers:
        assert [buffer.is_pinned for buffer in buffers] == [True, False, True]
        assert sorted(runtime.pinned.values()) == [4096, 4096]
        assert tier.pageable_bytes == 8192 and cleared == [CUDA]
    assert runtime.pinned == {}


def test_the_refusal_is_not_left_to_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, **named: Any) -> None:
        raise RuntimeError("out of memory, said the registration")

    monkeypatch.setattr(torch, "zeros", kernel)
    tiers._forget_cuda_error(CUDA)


def virtual_cuda(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """In place of torch.cuda: streams that work only when somebody waits for them."""
    cuda = Stage([], [], b"", Ranks(0, last="stream", change=0.0))
    monkeypatch.setattr(tiers, "_cuda", cuda)
    return cuda


def test_which_link(monkeypatch: pytest.MonkeyPatch) -> None:
    virtual_cuda(monkeypatch)
    assert isinstance(open_link(CPU, 1), CpuLink)
    assert isinstance(open_link(CUDA, 1), CudaLink)


@pytest.mark.parametrize("every", [1, 3])
def test_events_are_forgotten_when_nobody_can_wait_for_them(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Also where only some computations are recorded, because the others use residents."""
    virtual_cuda(monkeypatch)
    link = CudaLink(CUDA, longest_wait=4)
    for visit in range(100):
        link.record(Ref(Queue.READ, visit))
        link.record(Ref(Queue.COPY, visit))
        if visit % every == 0:
            link.record(Ref(Queue.COMPUTE, visit))
    assert set(link._events) == {
        *(Ref(Queue.COPY, visit) for visit in range(95, 100)),
        *(Ref(Queue.COMPUTE, visit) for visit in range(95, 100) if visit % every == 0),
    }


def test_time_on_the_device_is_settled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    virtual_cuda(monkeypatch)
    seconds = list[float]()
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
    assert seconds == [0.001] * 3
    link.drain()
    assert seconds == [0.001] * 5


def test_a_smaller_ring_where_the_driver_pins_only_some(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(10000)
    monkeypatch.setattr(tiers, "_cuda", type("Cuda", (), {"cudart": lambda: runtime}))
    monkeypatch.setattr(tiers, "_forget_cuda_error", lambda device: None)
    ledger = ByteLedger("RAM", 1 << 20)
    tier = HostTier(ledger, CUDA)
    made: list[weakref.ref[mmap.mmap]] = []
    anonymous = tiers._anonymous

    def watched(nbytes: int) -> mmap.mmap:
        memory = anonymous(nbytes)
        made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(tiers, "_anonymous", watched)
    with tier.ring("staging buffers", 4096, 4) as ring:
        assert [buffer.is_pinned for buffer in ring] == [True, True]
        assert [memory() is not None for memory in made] == [True, True, False]
        assert ledger.used == 8192 and tier.pageable_bytes == 0
        with tier.ring("more", 4096, 2) as pageable:
            assert [buffer.is_pinned for buffer in pageable] == [False, False]
            assert tier.pageable_bytes == 8192
    assert runtime.pinned == {} and ledger.used == 0 and ring == []
    with pytest.raises(LedgerOverflow), tier.ring("too many", 1 << 19, 3):
        pytest.fail("there was no room")
    assert runtime.pinned == {} and ledger.used == 0


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (1 << 20, []),
        (2 * 4096, ["pins only 2 of 3 buffers", "does not pin 4.0 KiB"]),
        (0, ["does not pin 16"]),
    ],
)
def test_each_step_down_the_ladder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, told: list[str]
) -> None:
    """Registered, a smaller ring, pageable: and the blocks are right on each."""
    runtime = Runtime(limit)
    layouts = write_blocks(tmp_path / "model.safetensors", BLOCKS)
    assert {layout.nbytes for layout in layouts} == {4096}
    monkeypatch.setattr(tiers, "_cuda", type("Cuda", (), {"cudart": lambda: runtime}))
    monkeypatch.setattr(tiers, "_forget_cuda_error", lambda device: None)
    monkeypatch.setattr(streamer, "HostTier", lambda ledger, device: HostTier(ledger, CUDA))
    stream = BlockStream(
        layouts,
        Residency(5, (0,), (2,), 2, 3),
        passes=2,
        device=CPU,
        device_ledger=ByteLedger("VRAM", 1 << 20),
        host_ledger=ByteLedger("RAM", 1 << 20),
    )
    with stream:
        for _ in range(2):
            for index, block in stream.forward_pass():
                assert same(block, BLOCKS[index])
    assert len(stream.notices) == len(told)
    for message, part in zip(stream.notices, told, strict=True):
        assert part in message
    assert runtime.pinned == {}
