"""Memory that runs out under a job: a smaller plan goes on from the last step, or a named error."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.engine import Engine
from penstock.engine.run.events import Event, Progress, Replanned
from penstock.engine.run.recovery import device_lost, out_of_memory, shortage
from penstock.engine.run.stage import Stage
from penstock.engine.store.journal import read_record
from penstock.errors import DeviceLost, LedgerOverflow, OutOfMemory
from penstock.offload.ledger import ByteLedger
from penstock.profiles.manifest import Prefetch, VideoShape
from penstock.profiles.plan import Plan, changes
from penstock.profiles.planner import Workload, plan, smaller
from penstock.profiles.prefetch import without_prefetch
from tests.engine.run.test_resume import a_request, an_engine
from tests.faults.memory import DeviceAllocations, Reservations

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

WHAT = Prefetch("denoise", "transformer", "decode", "vae decoder")


@pytest.fixture
def engine(t2v_folder: Path) -> Any:
    with an_engine(t2v_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def latents(t2v_folder: Path) -> torch.Tensor:
    with an_engine(t2v_folder) as engine:
        return engine.submit(a_request(None)).result().latents


@pytest.mark.parametrize(
    ("error", "device", "resource"),
    [
        (LedgerOverflow("x"), CPU, "VRAM"),
        (LedgerOverflow("x", memory="RAM"), CUDA, "RAM"),
        (torch.OutOfMemoryError("CUDA out of memory"), CUDA, "VRAM"),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for ..."), CUDA, "VRAM"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), CUDA, "VRAM"),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), CUDA, None),
        (MemoryError(), CUDA, "RAM"),
        (MemoryError(), CPU, "memory"),
        (OSError(12, "Cannot allocate memory"), CUDA, "RAM"),
        (OSError(28, "No space left on device"), CUDA, None),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), CPU, "memory"),
        (RuntimeError("shapes differ"), CPU, None),
    ],
    ids=str,
)
def test_shortages_are_told_from_other_errors(
    error: Exception, device: torch.device, resource: str | None
) -> None:
    found = shortage(error, device)
    assert (found.resource if found else None) == resource


def test_a_real_refusal_of_the_cpu_allocator_is_a_shortage() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    found = shortage(caught.value, CPU)
    assert found is not None and found.resource == "memory"


def test_a_shortage_outside_the_phases_has_a_name_too() -> None:
    named = out_of_memory(MemoryError(), CPU)
    assert isinstance(named, OutOfMemory)
    assert out_of_memory(named, CPU) is None and out_of_memory(RuntimeError("x"), CPU) is None


def test_a_lost_device_is_told_from_out_of_memory() -> None:
    assert device_lost(torch.OutOfMemoryError("x")) is None
    assert device_lost(torch.AcceleratorError("CUDA error: out of memory")) is None
    assert device_lost(RuntimeError("x")) is None
    for kind in (torch.AcceleratorError, RuntimeError):  # torch 2.7 has the words alone
        lost = device_lost(kind("CUDA error: an illegal memory access"))
        assert lost is not None and "illegal memory access" in str(lost)
    assert device_lost(torch.AcceleratorError("of another maker's")) is not None


def plans_of(engine: Engine, phase: str, resource: str) -> list[Plan]:
    """The plan of a request and every smaller one after it, for a model with a wide FFN."""
    manifest = engine.model.manifest
    manifest = replace(manifest, transformer=replace(manifest.transformer, ffn_dim=4096))
    workload = Workload(VideoShape(128, 96, 5), 4, guided=True)
    current: Plan | None = plan(manifest, workload, engine.hardware)
    found = []
    while current is not None:
        found.append(current)
        assert len(found) < 200
        current = smaller(manifest, workload, engine.hardware, current, phase, resource)
    return found


@pytest.mark.parametrize(
    ("phase", "resource"),
    [
        (phase, resource)
        for phase in ("text", "context", "denoise")
        for resource in ("VRAM", "RAM", "memory")
    ]
    + [("decode", "VRAM")],
)
def test_smaller_plans_shrink_strictly_and_end(engine: Engine, phase: str, resource: str) -> None:
    plans = plans_of(engine, phase, resource)
    names = ("context", "denoise") if phase in ("context", "denoise") else (phase,)

    def taken(one: Plan) -> int:
        group = [one[name] for name in names]
        if resource == "memory":
            return max(p.vram_bytes + p.ram_bytes for p in group)
        return max(p.vram_bytes if resource == "VRAM" else p.ram_bytes for p in group)

    sizes = [taken(one) for one in plans]
    assert all(after < before for before, after in zip(sizes, sizes[1:], strict=False))
    for one in plans:
        assert one.peak_vram_bytes <= engine.hardware.vram_bytes
        untouched = {p.name for p in one.phases} - set(names)
        first = plans[0] if one is plans[0] else without_prefetch(plans[0], WHAT)
        assert all(one[name] == first[name] for name in untouched)


def test_plans_with_the_same_result_come_first(engine: Engine) -> None:
    chunks = [one["denoise"].chunk_tokens for one in plans_of(engine, "denoise", "VRAM")]
    assert chunks[0] == chunks[1] == chunks[2] == 96
    assert chunks == sorted(chunks, reverse=True) and chunks[-1] < chunks[0]


def test_changes_are_told_in_words_with_their_effect(engine: Engine) -> None:
    made = engine.plan(a_request(None))
    denoise, decode = made["denoise"], made["decode"]
    assert denoise.stream is not None
    resident = denoise.stream.device_resident
    fewer = replace(denoise, stream=replace(denoise.stream, device_resident=resident - 1))
    assert changes(made, made.with_phases((fewer,))) == (
        (f"{resident - 1} blocks resident in VRAM instead of {resident} blocks resident in VRAM",),
        True,
    )
    chunked = replace(denoise, chunk_tokens=denoise.chunk_tokens // 2)
    told, identical = changes(made, made.with_phases((chunked,)))
    assert not identical and f"{denoise.chunk_tokens // 2} tokens a chunk" in told[0]
    tiled = replace(decode, tiles=(2, 2))
    told, identical = changes(made, made.with_phases((tiled,)))
    assert not identical and "2x2 tiles instead of 1x1 tiles" in told


def test_a_plan_comes_back_from_json(engine: Engine) -> None:
    import json

    made = engine.plan(a_request(None))
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.fixture
def ledgers(monkeypatch: pytest.MonkeyPatch) -> list[ByteLedger]:
    """Every ledger that a job makes."""
    made: list[ByteLedger] = []
    original = Stage.__init__

    def init(self: Stage, *arguments: Any) -> None:
        original(self, *arguments)
        made.extend([self.device_ledger, self.host_ledger])

    monkeypatch.setattr(Stage, "__init__", init)
    return made


def run_short_of_memory(engine: Engine, folder: Path, *, at: int, stays: bool) -> tuple[int, Any]:
    """A job whose reservation number ``at`` is refused: replans, and the result or None."""
    with Reservations(fail_at=at, stays=stays) as faulty:
        job = engine.submit(a_request(None), job_dir=folder)
        replanned = [event for event in job.events() if isinstance(event, Replanned)]
        try:
            result = job.result()
        except OutOfMemory as error:
            assert "nothing smaller can be planned" in str(error) and "resume" in str(error)
            assert read_record(folder).state == "failed"
            return len(replanned), None
        finally:
            assert faulty.failed >= 1
    for event in replanned:
        assert event.message in result.report.notices
        assert event.identical or event.phase in ("encode", "decode")
    return len(replanned), result


def reservations_of_a_job(engine: Engine) -> int:
    with Reservations() as counted:
        engine.submit(a_request(None)).result()
    return counted.calls


def test_a_refused_reservation_ends_in_the_same_result_or_a_resumable_job(
    engine: Engine, latents: torch.Tensor, ledgers: list[ByteLedger], tmp_path: Path
) -> None:
    went_on = 0
    for at in range(1, reservations_of_a_job(engine) + 1, 3):
        _, result = run_short_of_memory(engine, tmp_path / f"{at}", at=at, stays=False)
        went_on += result is not None
        assert all(ledger.used == 0 for ledger in ledgers)
        if result is None:
            result = engine.resume(tmp_path / f"{at}").result()
        assert torch.equal(result.latents, latents)
    assert went_on >= 2


def test_reservations_that_are_always_refused_end_in_a_resumable_job(
    engine: Engine, latents: torch.Tensor, ledgers: list[ByteLedger], tmp_path: Path
) -> None:
    shrunk = 0
    for at in range(1, reservations_of_a_job(engine) + 1, 8):
        replans, result = run_short_of_memory(engine, tmp_path / f"{at}", at=at, stays=True)
        assert result is None
        assert all(ledger.used == 0 for ledger in ledgers)
        result = engine.resume(tmp_path / f"{at}", allow_nonidentical=True).result()
        assert torch.allclose(result.latents, latents, atol=1e-4)
        shrunk += replans > 1
    assert shrunk >= 1


def test_the_smaller_plan_is_what_the_job_keeps(engine: Engine, tmp_path: Path) -> None:
    with Reservations(fail_at=12):
        job = engine.submit(a_request(None), job_dir=tmp_path / "job")
        job.result()
    (replanned,) = (event for event in job.events() if isinstance(event, Replanned))
    kept = Plan.from_json(read_record(tmp_path / "job").plan)
    assert changes(job.plan, kept) == (replanned.changes, replanned.identical)


def test_a_shortage_in_a_step_costs_that_step_only(engine: Engine, latents: torch.Tensor) -> None:
    with DeviceAllocations(inside="denoise_forward") as counted:
        engine.submit(a_request(None)).result()
    per_step = counted.calls // 4
    at = per_step * 2 + per_step // 2  # in the third step
    with DeviceAllocations(inside="denoise_forward", fail_at=at) as faulty:
        job = engine.submit(a_request(None))
        events = list(job.events())
        result = job.result()
    assert faulty.failed == 1
    done = [e.step for e in events if isinstance(e, Progress) and e.phase == "denoise"]
    assert done == [1, 2, 3, 4]
    assert torch.equal(result.latents, latents)


def test_a_failed_job_lets_go_of_its_tensors(engine: Engine, ledgers: list[ByteLedger]) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    before = set(threading.enumerate())
    with DeviceAllocations(inside="denoise_forward", fail_at=30, stays=True, watch=alive):
        job = engine.submit(a_request(None))
        job.wait()
    with pytest.raises(OutOfMemory):
        job.result()
    gc.collect()
    assert alive and all(reference() is None for reference in alive)
    assert all(ledger.used == 0 for ledger in ledgers)
    assert not set(threading.enumerate()) - before


def test_a_lost_device_ends_the_engine_but_not_the_job(
    engine: Engine, latents: torch.Tensor, tmp_path: Path, t2v_folder: Path
) -> None:
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with DeviceAllocations(inside="denoise_forward", fail_at=40, error=error):
        job = engine.submit(a_request(None), job_dir=tmp_path / "job")
        with pytest.raises(DeviceLost, match="launch failure.*penstock resume"):
            job.result()
    with pytest.raises(DeviceLost):
        engine.submit(a_request(None))
    assert read_record(tmp_path / "job").facts["error"].startswith("device_lost")
    with an_engine(t2v_folder) as another:
        assert torch.equal(another.resume(tmp_path / "job").result().latents, latents)


def test_a_job_under_a_budget_that_became_too_small_is_planned_anew(
    engine: Engine, t2v_folder: Path, latents: torch.Tensor, tmp_path: Path
) -> None:
    def stop(event: Event) -> bool:
        return isinstance(event, Progress) and event.phase == "denoise"

    job = engine.submit(a_request(None), job_dir=tmp_path / "job")
    for event in job.events():
        if stop(event):
            job.cancel()
    tight = engine.plan(a_request(None)).peak_vram_bytes - 1
    with an_engine(t2v_folder, vram=tight) as smaller_engine:
        result = smaller_engine.resume(tmp_path / "job").result()
    assert result.report.peak_vram_bytes <= tight
    assert torch.equal(result.latents, latents)
