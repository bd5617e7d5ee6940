"""What only a card can show: the same bits, the ceiling, pinned slabs, and an end of memory that is
survived. `python -m pytest -m gpu`; `benchmarks.gpu_suite` shows the same at true shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine import pipeline
from penstock.engine.bench.measure import Asked, measure
from penstock.engine.bench.weights import write_synthetic
from penstock.engine.demo import DEMO_PROMPT, MINI, demo_picture
from penstock.engine.engine import Engine
from penstock.engine.events import Replanned
from penstock.engine.request import GenerationRequest
from penstock.engine.settings import Settings, resolve
from penstock.engine.wan.attention import int8_attention
from penstock.engine.wan.attention_probe import probe_int8
from penstock.offload.allocator import allocator_capped
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import HostTier
from penstock.profiles.cost.transformer import int8_attention_bytes
from penstock.profiles.gpu_sign import shows_gpu
from penstock.profiles.hardware import default_device
from penstock.profiles.plan import StreamPlan
from penstock.profiles.profile import Overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
MIB = 1 << 20
BLOCKS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("tiny"), "tiny", blocks=BLOCKS)


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    overrides = Overrides(chunk_tokens="16", branches="1", cross_kv="vram")
    with Engine.open(model, vram="512MiB", device=DEVICE, overrides=overrides) as opened:
        yield opened


def _request(steps: int = 3) -> GenerationRequest:
    return GenerationRequest(
        prompt="a cat", image=Path("not opened"), width=64, height=64, frames=5, steps=steps, seed=1
    )


@pytest.mark.parametrize(
    "places",
    [
        StreamPlan(BLOCKS, 0, 0, 1, 1),
        StreamPlan(BLOCKS, 0, 0, 2, 2),
        StreamPlan(BLOCKS, 0, BLOCKS, 2, 0),
        StreamPlan(BLOCKS, 2, 2, 2, 1),
    ],
    ids=["rings of one", "disk", "RAM", "mixed"],
)
@pytest.mark.parametrize("overlapped", [True, False])
def test_where_the_blocks_live_changes_no_bit(
    engine: Engine, places: StreamPlan, overlapped: bool
) -> None:
    digests = []
    for stream, ahead in ((StreamPlan(BLOCKS, BLOCKS), True), (places, overlapped)):
        plan = engine.plan(_request())
        plan = plan.with_phases((replace(plan["denoise"], stream=stream),))
        asked = Asked(_request(), 0, "tiny", overlapped=ahead)
        digests.append(measure(engine, asked, plan=plan).latents_sha256)
    assert digests[0] == digests[1]


def test_the_allocator_stays_under_the_budget(engine: Engine) -> None:
    torch.cuda.empty_cache()
    result = measure(engine, Asked(_request(), 0, "tiny"))
    assert 0 < max(phase.allocator_bytes for phase in result.phases) <= result.vram_limit_bytes


def test_the_ceiling_is_the_drivers_too() -> None:
    device = torch.device(DEVICE)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(device)
    with allocator_capped(device, held + 256 * MIB):
        assert torch.empty(100 * MIB, dtype=torch.uint8, device=device).numel() == 100 * MIB
        torch.cuda.empty_cache()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(400 * MIB, dtype=torch.uint8, device=device)
    assert torch.empty(400 * MIB, dtype=torch.uint8, device=device).numel() == 400 * MIB


def test_slabs_are_pinned_exactly_and_given_back() -> None:
    ledger = ByteLedger("RAM", 64 * MIB)
    tier = HostTier(ledger, torch.device(DEVICE))
    with tier.buffers("slabs", [3 * MIB, 5 * MIB]) as buffers:
        assert all(buffer.is_pinned and buffer.tensor.is_pinned() for buffer in buffers)
        assert ledger.used == 8 * MIB
        buffers[0].tensor.fill_(7)
        copied = buffers[0].tensor.to(DEVICE, non_blocking=True)
        torch.cuda.synchronize()
        assert bool((copied == 7).all())
    assert tier.pageable_bytes == 0
    assert ledger.used == 0


def test_an_end_of_memory_is_survived_with_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(picture)
    request = replace(_request(), image=picture)
    overrides = Overrides(chunk_tokens="16")
    with Engine.open(model, vram="512MiB", device=DEVICE, overrides=overrides) as engine:
        whole = engine.submit(request).result().latents
        honest, failures = pipeline.dit.denoise_forward, iter([False, True])

        def exhausted(*arguments: Any) -> Any:
            if next(failures, False):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory (made up by a test)")
            return honest(*arguments)

        monkeypatch.setattr(pipeline.dit, "denoise_forward", exhausted)
        job = engine.submit(request)
        events = list(job.events())
        again = job.result().latents
    assert sum(isinstance(event, Replanned) for event in events) == 1
    assert torch.equal(whole, again)


def _trained(engine: Engine) -> GenerationRequest:
    return resolve(Settings(prompt=DEMO_PROMPT, image=demo_picture(), seed=3), engine.model)


def test_the_trained_model_makes_the_video_that_it_makes_on_a_cpu() -> None:
    videos = []
    for device in ("cpu", DEVICE):
        with Engine.open(MINI, device=device) as engine:
            video = engine.submit(_trained(engine)).result().video
        videos.append(video.double() / 255)
    error = (videos[0] - videos[1]).square().mean()
    assert -10 * torch.log10(error.clamp(min=1e-12)) >= 35, "dB"


def test_a_job_that_was_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    with Engine.open(MINI, device=DEVICE) as engine:
        request = _trained(engine)
        whole = engine.submit(request).result()

        def stop(step: int, latents: torch.Tensor) -> None:
            if step == 5:
                raise InterruptedError("made up by a test")

        stopped = engine.submit(request, job_dir=tmp_path / "job", on_step=stop)
        with pytest.raises(InterruptedError):
            stopped.result()
    with Engine.open(MINI, device=DEVICE) as engine:
        again = engine.resume(tmp_path / "job").result()
    assert torch.equal(whole.latents, again.latents)
    assert torch.equal(whole.video, again.video)


def test_int8_attention_works_and_takes_what_plans_say() -> None:
    pytest.importorskip("comfy_kitchen")
    report = probe_int8(DEVICE, torch.bfloat16, 40, 128)
    assert report.works, report.reason
    heads, width, queries, keys = 8, 128, 500, 3000
    q, k, v = (
        torch.randn(1, tokens, heads, width, device=DEVICE, dtype=torch.bfloat16)
        for tokens in (queries, keys, keys)
    )
    attend = int8_attention()
    attend(q, k, v)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_stats()["requested_bytes.all.current"]
    attend(q, k, v)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - held
    planned = int8_attention_bytes(heads, width, queries, keys, 2) + q.nbytes
    assert 0.99 * planned <= taken <= planned


def test_the_machine_shows_a_sign_of_its_gpu() -> None:
    assert shows_gpu() and default_device() == "cuda"
