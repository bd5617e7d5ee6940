"""The streamer: the right bytes in any residency, within the budget, and gone when it is left."""

from __future__ import annotations

import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import CheckpointChanged, LedgerOverflow, UsageError
from penstock.offload import streamer, tiers
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Queue, Ref, Residency
from penstock.offload.streamer import BlockStream, load_block
from penstock.offload.tiers import CpuLink, DiskTier
from tests.meter import StorageMeter
from tests.offload.blocks import (
    Block,
    aligned_file,
    layouts_of,
    open_descriptors,
    random_blocks,
    same,
    write_blocks,
)
from tests.offload.test_schedule import residencies
from tests.offload.waiting import Waiting

CPU = torch.device("cpu")
BLOCKS = random_blocks(8, width=60)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[BlockLayout]:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "model.safetensors", BLOCKS)


class Budgets:
    """Two ledgers that hold exactly what a residency needs."""

    def __init__(self, layouts: list[BlockLayout], residency: Residency, spare: int = 0) -> None:
        sizes = [layout.nbytes for layout in layouts]

        def total(residents: tuple[int, ...], ring: int, passing: tuple[int, ...]) -> int:
            largest = max((sizes[block] for block in passing), default=0)
            return sum(sizes[block] for block in residents) + ring * largest

        slots, staging = residency.device_slots, residency.staging_buffers
        self.device_bytes = total(residency.device_resident, slots, residency.streamed)
        self.host_bytes = total(residency.host_resident, staging, residency.through_staging)
        if residency.device_resident and not staging:
            self.host_bytes += 4096  # the smallest staging buffer
        self.device = ByteLedger("VRAM", max(self.device_bytes + spare, 1))
        self.host = ByteLedger("RAM", max(self.host_bytes + spare, 1))

    def stream(
        self, layouts: list[BlockLayout], residency: Residency, passes: int, **more: Any
    ) -> BlockStream:
        return BlockStream(
            layouts,
            residency,
            passes=passes,
            device=CPU,
            device_ledger=self.device,
            host_ledger=self.host,
            **more,
        )


def ours() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("penstock")]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(residencies(), st.integers(1, 3), st.booleans())
def test_any_residency_gives_the_same_bits_within_its_bytes(
    layouts: list[BlockLayout], residency: Residency, passes: int, overlapped: bool
) -> None:
    here = layouts[: residency.n_blocks]
    budgets = Budgets(here, residency)
    with budgets.stream(here, residency, passes, overlapped=overlapped) as stream:
        for _ in range(passes):
            seen = []
            for index, tensors in stream.forward_pass():
                assert same(tensors, BLOCKS[index])
                seen.append(index)
            assert seen == list(range(residency.n_blocks))
    assert ours() == []
    assert budgets.device.used == 0 == budgets.host.used
    assert budgets.device.peak == budgets.device_bytes
    assert budgets.host.peak == budgets.host_bytes
    check_counts(stream, here, residency, passes)


def check_counts(
    stream: BlockStream, layouts: list[BlockLayout], residency: Residency, passes: int
) -> None:
    reads, sizes = [x.read_bytes for x in layouts], [x.nbytes for x in layouts]
    once = (*residency.device_resident, *residency.host_resident)
    assert stream.stats.read_bytes == sum(reads[b] for b in once) + passes * sum(
        reads[b] for b in residency.disk_blocks
    )
    assert stream.stats.copied_bytes == sum(
        sizes[b] for b in residency.device_resident
    ) + passes * sum(sizes[b] for b in residency.streamed)


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("residency", [Residency(3, (), (), 2, 3), Residency(3, (1,), (0,), 1, 2)])
def test_nothing_is_fetched_beyond_the_passes_that_are_sure(
    layouts: list[BlockLayout], residency: Residency, overlapped: bool
) -> None:
    here = layouts[:3]
    budgets = Budgets(here, residency)
    with budgets.stream(here, residency, 9, overlapped=overlapped, sure=1) as stream:
        for done in range(4):
            stream.expect(done + 1)
            for index, tensors in stream.forward_pass():
                assert same(tensors, BLOCKS[index])
            check_counts(stream, here, residency, done + 1)
    assert ours() == []


def test_what_is_sure_is_fetched_while_nothing_is_computed(layouts: list[BlockLayout]) -> None:
    here, residency = layouts[:2], Residency(2, (), (), 1, 2)
    with Budgets(here, residency).stream(here, residency, 9, sure=1) as stream:
        list(stream.forward_pass())
        stream.expect(2)
        while stream.stats.read_bytes < 2 * sum(layout.read_bytes for layout in here):
            threading.Event().wait(0.001)


def test_a_computation_is_bit_equal_streamed_and_resident(layouts: list[BlockLayout]) -> None:
    def run(residency: Residency, overlapped: bool) -> torch.Tensor:
        budgets = Budgets(layouts, residency)
        hidden = torch.ones(3, 60)
        with budgets.stream(layouts, residency, 2, overlapped=overlapped) as stream:
            for _ in range(2):
                for _, block in stream.forward_pass():
                    weight = block["weight"].float()
                    hidden = hidden + torch.tanh(hidden @ weight.T + block["bias"])[:, :60]
        return hidden

    resident = run(Residency(8, tuple(range(8))), False)
    for residency in (
        Residency(8, (), (), 1, 1),
        Residency(8, (3,), (1, 6), 2, 2),
        Residency(8, (), tuple(range(8)), 3, 0),
    ):
        assert torch.equal(run(residency, True), resident)
        assert torch.equal(run(residency, False), resident)


@pytest.mark.parametrize("overlapped", [True, False])
def test_live_storage_agrees_with_the_ledgers(layouts: list[BlockLayout], overlapped: bool) -> None:
    residency = Residency(8, (0, 4), (2,), 2, 3)
    budgets = Budgets(layouts, residency)
    with StorageMeter() as meter:
        with budgets.stream(layouts, residency, 2, overlapped=overlapped) as stream:
            held = meter.live
            for _ in range(2):
                for _, _tensors in stream.forward_pass():
                    assert meter.live == held
        del _tensors
        assert meter.live == 0
    assert meter.peak == held == budgets.device_bytes + budgets.host_bytes


def test_one_byte_less_does_not_open(layouts: list[BlockLayout]) -> None:
    residency = Residency(8, (0,), (2,), 2, 2)
    for name in ("device", "host"):
        budgets = Budgets(layouts, residency)
        tight = ByteLedger("tight", getattr(budgets, f"{name}_bytes") - 1)
        setattr(budgets, name, tight)
        with (
            pytest.raises(LedgerOverflow, match="does not fit into the tight budget"),
            budgets.stream(layouts, residency, 1),
        ):
            pytest.fail("it opened")
        assert budgets.device.used == 0 == budgets.host.used and ours() == []


def test_packs_are_read_directly(tmp_path: Path) -> None:
    tensors = {f"blocks.0.{n}": t for n, t in random_blocks(1, width=90)[0].items()}
    aligned_file(tmp_path / "pack", tensors)
    here = layouts_of(tmp_path / "pack", 1)
    residency = Residency(1, (), (), 1, 1)
    with Budgets(here, residency).stream(here, residency, 1) as stream:
        for _, block in stream.forward_pass():
            assert same(block, random_blocks(1, width=90)[0])
    probe = DiskTier()
    direct = probe._file(tmp_path / "pack", None).direct
    probe.close()
    whole_pages = here[0].read_bytes // 4096 * 4096
    assert stream.stats.direct_bytes == (whole_pages if direct else 0)


def test_reads_in_pieces(layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.offload.tiers.PIECE_BYTES", 1000)
    residency = Residency(8, (1,), (2,), 2, 2)
    with Budgets(layouts, residency).stream(layouts, residency, 1) as stream:
        for index, block in stream.forward_pass():
            assert same(block, BLOCKS[index])
            assert any(name.startswith("penstock-disk") for name in ours())
    assert ours() == []


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("leave_at", [0, 3, 7])
def test_leaving_early(layouts: list[BlockLayout], overlapped: bool, leave_at: int) -> None:
    residency = Residency(8, (1,), (2,), 2, 2)
    budgets, before = Budgets(layouts, residency), open_descriptors()
    with (
        pytest.raises(KeyError, match="body"),
        budgets.stream(layouts, residency, 5, overlapped=overlapped) as stream,
    ):
        for index, _ in stream.forward_pass():
            if index == leave_at:
                raise KeyError("body")
    assert ours() == [] and open_descriptors() == before
    assert budgets.device.used == 0 == budgets.host.used
    with pytest.raises(UsageError, match="closed"):
        next(stream.forward_pass())


def test_never_asked_for_anything(layouts: list[BlockLayout]) -> None:
    residency = Residency(8, (), (), 2, 2)
    budgets = Budgets(layouts, residency)
    with budgets.stream(layouts, residency, 1000):
        pass
    assert ours() == [] and budgets.host.used == 0


def test_no_more_passes_than_agreed(layouts: list[BlockLayout]) -> None:
    residency = Residency(8, (), (), 1, 1)
    with Budgets(layouts, residency).stream(layouts, residency, 1) as stream:
        list(stream.forward_pass())
        with pytest.raises(UsageError, match="at most 1 passes.*found one more"):
            next(stream.forward_pass())


def test_a_pass_that_was_left_cannot_be_taken_up(layouts: list[BlockLayout]) -> None:
    residency = Residency(8, (), (), 1, 1)
    with Budgets(layouts, residency).stream(layouts, residency, 2) as stream:
        for index, _ in stream.forward_pass():
            if index == 2:
                break
        with pytest.raises(UsageError, match="left at block 3"):
            next(stream.forward_pass())


@pytest.mark.parametrize("overlapped", [True, False])
def test_visits_that_are_left_out_move_nothing(
    layouts: list[BlockLayout], overlapped: bool
) -> None:
    order = (0, 1, 7, 0, 3, 3, 2, 0, 0, 5)
    residency = Residency(8, (2,), (5,), 1, 1)
    budgets = Budgets(layouts, residency)
    with (
        budgets.stream(layouts, residency, 20, overlapped=overlapped) as made,
        ExitStack() as open_visit,
    ):
        for block in order:
            made.announce(block)
            open_visit.close()
            tensors = open_visit.enter_context(made.visit(block))
            assert same(tensors, BLOCKS[block])
    sizes = [layouts[block].nbytes for block in order if block not in (2, 5)]
    sizes += [layouts[5].nbytes] * order.count(5) + [layouts[2].nbytes]
    whole_slots = made.stats.copied_bytes - sum(sizes)
    # The last visit is left without a word of what is next: one more may have come for it.
    assert 0 <= whole_slots <= layouts[6].nbytes + layouts[5].nbytes
    reads = [layouts[block].read_bytes for block in order if block not in (2, 5)]
    reads += [layouts[block].read_bytes for block in (2, 5)]  # once, whenever their turn is
    largest = max(layout.read_bytes for layout in layouts)
    ahead = (len(order) + 2) * largest if overlapped else 0  # a buffer before each jump
    assert sum(reads) <= made.stats.read_bytes <= sum(reads) + ahead
    whole = sum(layout.read_bytes for layout in layouts)
    assert made.stats.read_bytes < 4 * whole  # of the eight passes that went by


def test_no_more_visits_than_agreed(layouts: list[BlockLayout]) -> None:
    residency = Residency(8, (), (), 1, 1)
    with Budgets(layouts, residency).stream(layouts, residency, 2) as stream:
        for block in (3, 3):
            with stream.visit(block):
                pass
        with pytest.raises(UsageError, match="one more of block 3"), stream.visit(3):
            pass


def test_as_many_layouts_as_blocks(layouts: list[BlockLayout]) -> None:
    with pytest.raises(UsageError, match="expected 3, found 8"):
        Budgets(layouts, Residency(8, (), (), 1, 1)).stream(layouts, Residency(3, (0, 1, 2)), 1)
    with pytest.raises(UsageError, match="passes"):
        Budgets(layouts, Residency(8, (), (), 1, 1)).stream(layouts, Residency(8, (), (), 1, 1), 0)


def test_nothing_is_read_beyond_the_last_cycle_or_the_rings(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: queue.SimpleQueue[Ref | str] = queue.SimpleQueue()
    read, wait = DiskTier.read, streamer._Board.wait

    def seen_read(*args: Any) -> Any:
        moved = read(*args)
        happened.put("read")
        return moved

    def seen_wait(board: Any, ref: Ref) -> float | None:
        happened.put(ref)
        return wait(board, ref)

    monkeypatch.setattr(DiskTier, "read", seen_read)
    monkeypatch.setattr(streamer._Board, "wait", seen_wait)
    residency = Residency(8, (), (), 2, 3)
    with Budgets(layouts, residency).stream(layouts, residency, 2) as stream:
        passes = stream.forward_pass()
        next(passes)
        reads = 0
        while (event := happened.get()) != Ref(Queue.COPY, 2):  # which waits for the first slot
            reads += event == "read"
            assert reads <= 5, "two slots and three staging buffers, and no more"
        assert reads == 5
        assert stream.stats.read_bytes == sum(layout.read_bytes for layout in layouts[:5])


class Flaky:
    """Fails at the n-th call, once."""

    def __init__(self, real: Callable[..., Any], calls: int, error: BaseException) -> None:
        self.real, self.left, self.error = real, calls, error

    def __get__(self, instance: Any, owner: Any = None) -> Callable[..., Any]:
        return lambda *args: self(instance, *args)

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args)


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("calls", [1, 3, 9])
@pytest.mark.parametrize(
    ("owner", "method"), [(DiskTier, "read"), (CpuLink, "copy")], ids=["read", "copy"]
)
def test_what_a_thread_runs_into_surfaces_as_itself(
    layouts: list[BlockLayout],
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    calls: int,
    overlapped: bool,
) -> None:
    error = OSError(5, "the disk is gone")
    monkeypatch.setattr(owner, method, Flaky(getattr(owner, method), calls, error))
    residency = Residency(8, (), (), 2, 2)
    budgets, before = Budgets(layouts, residency), open_descriptors()
    visits = 0
    with (
        pytest.raises(OSError) as caught,
        budgets.stream(layouts, residency, 50, overlapped=overlapped) as stream,
    ):
        for _ in range(50):
            for index, block in stream.forward_pass():
                assert same(block, BLOCKS[index])
                visits += 1
    assert caught.value is error
    assert visits < calls
    assert ours() == [] and open_descriptors() == before
    assert budgets.device.used == 0 == budgets.host.used


def test_of_two_failures_the_first_is_told() -> None:
    """The second may be no more than what it led to."""
    board, errors = streamer._Board(), (OSError(5, "the disk is gone"), RuntimeError("then this"))
    for error in errors:
        thread: Future[None] = Future()
        thread.set_exception(error)
        board.note_end(thread)
    assert board.is_stopped
    with pytest.raises(OSError) as caught:
        board.raise_failure()
    assert caught.value is errors[0]


def test_a_failure_is_told_even_while_residents_compute(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second read of the only block that is streamed fails in the middle of a pass."""
    error, computing, told = OSError(5, "the disk is gone"), threading.Event(), threading.Event()
    read, note_end = DiskTier.read, streamer._Board.note_end

    def fails(*args: Any) -> Any:
        if len(calls) == 8:
            computing.wait()
            raise error
        calls.append(args)
        return read(*args)

    def seen_end(board: Any, thread: Any) -> None:
        note_end(board, thread)
        if thread.exception() is error:
            told.set()

    calls: list[Any] = []
    monkeypatch.setattr(DiskTier, "read", fails)
    monkeypatch.setattr(streamer._Board, "note_end", seen_end)
    residency = Residency(8, tuple(range(7)), (), 1, 1)
    visits: list[tuple[int, int]] = []
    with (
        Budgets(layouts, residency).stream(layouts, residency, 3) as stream,
        pytest.raises(OSError) as caught,
    ):
        for forward_pass in range(3):
            for index, _ in stream.forward_pass():
                visits.append((forward_pass, index))
                if (forward_pass, index) == (1, 2):
                    computing.set()
                    told.wait()
    assert caught.value is error
    assert visits[-1] == (1, 2), "the next resident is not computed with any more"


@pytest.mark.parametrize("overlapped", [True, False])
def test_a_file_cut_while_it_streams(tmp_path: Path, overlapped: bool) -> None:
    path = tmp_path / "model.safetensors"
    here = write_blocks(path, BLOCKS)
    residency = Residency(8, (), (), 1, 1)
    budgets = Budgets(here, residency)
    with (
        pytest.raises(CheckpointChanged, match="changed while it was in use"),
        budgets.stream(here, residency, 3, overlapped=overlapped) as stream,
    ):
        for _ in range(3):
            for index, block in stream.forward_pass():
                assert same(block, BLOCKS[index])
                if index == 4:
                    os.truncate(path, path.stat().st_size // 2)
    assert ours() == [] and budgets.host.used == 0


def test_a_file_exchanged_before_it_streams(tmp_path: Path) -> None:
    here = write_blocks(tmp_path / "model.safetensors", BLOCKS)
    write_blocks(tmp_path / "other", random_blocks(8, seed=1, width=60))
    (tmp_path / "other").replace(tmp_path / "model.safetensors")
    residency = Residency(8, (0,), (), 1, 1)
    budgets = Budgets(here, residency)
    with pytest.raises(CheckpointChanged), budgets.stream(here, residency, 1) as stream:
        for _ in stream.forward_pass():
            pytest.fail("it gave a block")
    assert budgets.device.used == 0 == budgets.host.used


def test_inside_inference_mode(layouts: list[BlockLayout]) -> None:
    residency = Residency(8, (0,), (1,), 2, 2)
    with (
        torch.inference_mode(),
        Budgets(layouts, residency).stream(layouts, residency, 2) as stream,
    ):
        for _ in range(2):
            for index, block in stream.forward_pass():
                assert same(block, BLOCKS[index])


@pytest.mark.parametrize("memory", ["device", "host"])
def test_threads_end_before_their_buffers_are_given_back(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    residency = Residency(8, (0,), (1,), 2, 2)
    budgets = Budgets(layouts, residency)
    ledger, alive = getattr(budgets, memory), list[list[str]]()
    give_back = ledger._give_back

    def seen(label: str, nbytes: int) -> None:
        alive.append([name for name in ours() if name.startswith("penstock-stream")])
        give_back(label, nbytes)

    monkeypatch.setattr(ledger, "_give_back", seen)
    with budgets.stream(layouts, residency, 3) as stream:
        next(stream.forward_pass())
    assert alive and not any(alive)


def test_who_leaves_at_once_waits_for_one_read_alone(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped, reads = threading.Event(), threading.Event(), []
    read, stop = DiskTier.read, streamer._Board.stop

    def slow(*args: Any) -> Any:
        reads.append(args)
        begun.set()
        stopped.wait()
        return read(*args)

    def stops(board: Any) -> None:
        stop(board)
        stopped.set()

    monkeypatch.setattr(DiskTier, "read", slow)
    monkeypatch.setattr(streamer._Board, "stop", stops)
    residency = Residency(8, (), (), 2, 3)
    with Budgets(layouts, residency).stream(layouts, residency, 2):
        begun.wait()
    assert len(reads) == 1


def test_a_stream_that_was_left_is_closed_though_its_host_half_is_open(
    layouts: list[BlockLayout],
) -> None:
    residency = Residency(8, (), (), 2, 2)
    stream = Budgets(layouts, residency).stream(layouts, residency, 2)
    with stream.prefetched():
        with stream:
            list(stream.forward_pass())
        with pytest.raises(UsageError, match="the stream is closed"):
            next(stream.forward_pass())


def test_waits_are_counted_where_they_happen(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    residency, waiting = Residency(8, (), (), 2, 2), Waiting(monkeypatch)
    read, visits = DiskTier.read, iter(range(8))

    def slow(*args: Any) -> Any:
        visit = next(visits)
        waiting.spend(1.0, Ref(Queue.READ, visit), Ref(Queue.COPY, visit))
        return read(*args)

    with monkeypatch.context() as patched:
        patched.setattr(DiskTier, "read", slow)
        with Budgets(layouts, residency).stream(layouts, residency, 1) as stream:
            list(stream.forward_pass())
    stats = stream.stats
    assert (stats.read_s, stats.disk_wait_s, stats.compute_wait_s) == (8.0, 8.0, 8.0)
    assert (stats.copy_s, stats.slot_wait_s, stats.staging_wait_s) == (0.0, 0.0, 0.0)
    with Budgets(layouts, residency).stream(layouts, residency, 1) as stream:
        for visit, _ in stream.forward_pass():
            # The copy after the next wants this slot, and the read two further on that copy's
            # staging buffer.
            wanted = [Ref(Queue.COMPUTE, visit), Ref(Queue.COPY, visit + 2)]
            waiting.spend(1.0, *wanted[: (visit < 6) + (visit < 4)])
    stats = stream.stats
    assert (stats.slot_wait_s, stats.staging_wait_s) == (6.0, 4.0)
    assert (stats.disk_wait_s, stats.compute_wait_s) == (0.0, 0.0)


@pytest.mark.parametrize("staging", [1 << 20, 4096])
def test_weights_that_stay(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch, staging: int
) -> None:
    monkeypatch.setattr(streamer, "STAGING_BYTES", staging)
    layout = layouts[3]
    device, host = ByteLedger("VRAM", layout.nbytes), ByteLedger("RAM", 1 << 20)
    before = open_descriptors()
    with load_block(layout, device=CPU, device_ledger=device, host_ledger=host) as tensors:
        assert same(tensors, BLOCKS[3])
        assert (device.used, host.used) == (layout.nbytes, 0)
        assert host.peak == min(staging, layout.nbytes)
        assert open_descriptors() == before
        del tensors
    assert device.used == 0 and ours() == []


def test_weights_that_stay_make_do_with_what_is_left(layouts: list[BlockLayout]) -> None:
    layout = layouts[3]
    assert layout.nbytes >= 8192
    for left in (4096, 4097, layout.nbytes - 1):
        device, host = ByteLedger("VRAM", layout.nbytes), ByteLedger("RAM", left)
        with load_block(layout, device=CPU, device_ledger=device, host_ledger=host) as tensors:
            assert same(tensors, BLOCKS[3])
        assert host.peak == left // 4096 * 4096
    device, host = ByteLedger("VRAM", layout.nbytes), ByteLedger("RAM", 4095)
    with (
        pytest.raises(LedgerOverflow, match="staging"),
        load_block(layout, device=CPU, device_ledger=device, host_ledger=host),
    ):
        pytest.fail("it opened")
    assert device.used == 0


def test_no_weights_that_stay() -> None:
    ledgers = ByteLedger("VRAM", 4096), ByteLedger("RAM", 4096)
    empty: Block = {}
    layout = BlockLayout.from_entries({})
    with load_block(
        layout, device=CPU, device_ledger=ledgers[0], host_ledger=ledgers[1]
    ) as tensors:
        assert tensors == empty


def test_weights_that_stay_leave_no_staging_behind(
    layouts: list[BlockLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the ledger alone: the memory itself is gone."""
    made: list[weakref.ref[mmap.mmap]] = []
    anonymous = tiers._anonymous

    def watched(nbytes: int) -> mmap.mmap:
        memory = anonymous(nbytes)
        made.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(tiers, "_anonymous", watched)
    ledgers = ByteLedger("VRAM", 1 << 20), ByteLedger("RAM", 1 << 20)
    with load_block(layouts[3], device=CPU, device_ledger=ledgers[0], host_ledger=ledgers[1]):
        assert made and [memory() for memory in made] == [None] * len(made)
