"""What only a card can show: the same bits, the ceiling, pinned staging buffers, and an end of
memory that is survived. `python -m pytest -m gpu`; `benchmarks.gpu_suite` shows the same at true
shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import penstock
from penstock.engine.attention.kernels import int8_attention, sol_attention
from penstock.engine.attention.probe import probe_int8, probe_sol
from penstock.engine.bench.measure import Asked, measure
from penstock.engine.bench.weights import write_synthetic
from penstock.engine.engine import Engine
from penstock.engine.families.wan import work
from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.locate import locate
from penstock.engine.request.demo import DEMO_PROMPT, MINI, demo_picture
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.settings import Settings, resolve
from penstock.engine.run.events import Progress, Replanned
from penstock.offload.allocator import allocator_capped
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import HostTier
from penstock.profiles.attention_bytes import int8_attention_bytes, sol_attention_bytes
from penstock.profiles.gpu_sign import shows_gpu
from penstock.profiles.hardware import default_device
from penstock.profiles.options import Options
from penstock.profiles.phases import CUDA_LIBRARY_BYTES
from penstock.profiles.plan import StreamPlan
from penstock.quant.probe import probe_micro
from tests.engine import lora_files
from tests.engine.attach.zoo import Walk

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
    rules = Options(chunk_tokens="16", branches="1", cross_kv="vram")
    with Engine.open(model, vram="512MiB", device=DEVICE, options=rules) as opened:
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
    for stream, prefetched in ((StreamPlan(BLOCKS, BLOCKS), True), (places, overlapped)):
        plan = engine.plan(_request())
        plan = plan.with_phases((replace(plan["denoise"], stream=stream),))
        asked = Asked(_request(), 0, "tiny", overlapped=prefetched)
        digests.append(measure(engine, asked, plan=plan).latents_sha256)
    assert digests[0] == digests[1]


def test_the_allocator_stays_under_the_budget(engine: Engine) -> None:
    torch.cuda.empty_cache()
    result = measure(engine, Asked(_request(), 0, "tiny"))
    assert 0 < max(phase.allocator_bytes for phase in result.phases) <= result.vram_limit_bytes


def test_the_ceiling_is_the_drivers_too() -> None:
    device = torch.device(DEVICE)
    with allocator_capped(device, 256 * MIB):
        assert torch.empty(100 * MIB, dtype=torch.uint8, device=device).numel() == 100 * MIB
        torch.cuda.empty_cache()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(400 * MIB, dtype=torch.uint8, device=device)
    assert torch.empty(400 * MIB, dtype=torch.uint8, device=device).numel() == 400 * MIB


def test_what_others_hold_comes_on_top_of_the_ceiling() -> None:
    device = torch.device(DEVICE)
    others = torch.empty(300 * MIB, dtype=torch.uint8, device=device)
    with allocator_capped(device, 256 * MIB):
        assert torch.empty(200 * MIB, dtype=torch.uint8, device=device).numel() == 200 * MIB
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(400 * MIB, dtype=torch.uint8, device=device)
    assert others.numel() == 300 * MIB


def test_slabs_are_pinned_exactly_and_given_back() -> None:
    ledger = ByteLedger("RAM", 64 * MIB)
    tier = HostTier(ledger, torch.device(DEVICE))
    with tier.buffers("staging buffers", [3 * MIB, 5 * MIB]) as buffers:
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
    rules = Options(chunk_tokens="16")
    with Engine.open(model, vram="512MiB", device=DEVICE, options=rules) as engine:
        whole = engine.submit(request).result().latents
        honest, failures = work.dit.denoise_forward, iter([False, True])

        def exhausted(*arguments: Any) -> Any:
            if next(failures, False):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory (made up by a test)")
            return honest(*arguments)

        monkeypatch.setattr(work.dit, "denoise_forward", exhausted)
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


TEXT = GenerationRequest(prompt="a cat", width=64, height=64, frames=5, steps=3, seed=1)
FIXED = Options(chunk_tokens="16", branches="1", cross_kv="vram")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks of about 10 MiB, whose matrices all formats can store; no picture."""
    shape = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 1024}
    return write_tiny_model(
        tmp_path_factory.mktemp("wide"),
        image_to_video=False,
        transformer={"num_layers": BLOCKS, **shape},
    )


def _digest(engine: Engine, places: StreamPlan) -> str:
    plan = engine.plan(TEXT)
    plan = plan.with_phases((replace(plan["denoise"], stream=places),))
    return measure(engine, Asked(TEXT, 0, "wide"), plan=plan).latents_sha256


RESIDENT, STREAMED = StreamPlan(BLOCKS, BLOCKS), StreamPlan(BLOCKS, 1, 1, 2, 2)


@pytest.mark.parametrize("format", ["int8", "fp8", "nf4", "gguf-q8_0", "quanto-int4"])
def test_a_format_packed_by_its_first_job_streams_to_the_bits_of_residents(
    format: str, wide: Path, tmp_path: Path
) -> None:
    with Engine.open(
        wide, format=format, vram="512MiB", device=DEVICE, cache=tmp_path, options=FIXED
    ) as engine:
        assert _digest(engine, RESIDENT) == _digest(engine, STREAMED)


def test_a_lora_streams_to_the_bits_of_residents(wide: Path, tmp_path: Path) -> None:
    source = locate(wide).streamed
    layers = lora_files.pairs(source, lora_files.linears(source, outside=False))
    lora = lora_files.write_kohya(tmp_path / "lora.safetensors", layers)
    digests = []
    for loras in ([], [f"{lora}:0.5"]):
        with Engine.open(wide, loras=loras, vram="512MiB", device=DEVICE, options=FIXED) as engine:
            digests += [_digest(engine, RESIDENT), _digest(engine, STREAMED)]
    plain, same, changed, streamed = digests
    assert plain == same != changed == streamed


def test_previews_and_steering_of_a_job_on_the_card() -> None:
    seen: list[torch.device] = []

    def keep(step: int, latents: Tensor) -> Tensor:
        seen.append(latents.device)
        return latents

    with Engine.open(MINI, device=DEVICE) as engine:
        whole = engine.submit(_trained(engine)).result().latents
        job = engine.submit(_trained(engine), on_step=keep, preview_every=1)
        previews = [
            event.preview
            for event in job.events()
            if isinstance(event, Progress) and event.unit == "step"
        ]
        steered = job.result()
    assert steered.report.steered and torch.equal(steered.latents, whole)
    assert previews and all(each is not None and len(set(each.rgb)) > 1 for each in previews)
    assert set(seen) == {torch.device("cpu")}


def test_unload_gives_the_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    held = []
    with Engine.open(MINI, device=DEVICE) as engine:
        for _ in range(2):
            engine.submit(_trained(engine)).result()
            engine.unload()
            held.append(torch.cuda.memory_reserved() - before)
    assert held[1] <= held[0] <= CUDA_LIBRARY_BYTES


class _Squeezed:
    """`work.denoise`, with ``missing`` bytes less than it took before.

    Attributes:
        peak: what torch's allocator held when nothing was missing.
    """

    def __init__(self) -> None:
        self._honest = work.denoise
        self.peak = self.missing = 0

    def __call__(self, *arguments: Any) -> Any:
        torch.cuda.empty_cache()
        if not self.missing:
            torch.cuda.reset_peak_memory_stats()
            found = self._honest(*arguments)
            self.peak = torch.cuda.max_memory_reserved()
            return found
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((self.peak - self.missing) / total, 0)
        try:
            return self._honest(*arguments)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_a_real_end_of_memory_is_survived_with_the_same_bits(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeezed = _Squeezed()
    monkeypatch.setattr(work, "denoise", squeezed)
    with Engine.open(wide, vram="512MiB", device=DEVICE, options=FIXED) as engine:
        stream = engine.plan(TEXT)["denoise"].stream
        assert stream is not None and stream.device_resident == BLOCKS
        whole = engine.submit(TEXT).result().latents
        squeezed.missing = 24 * MIB
        job = engine.submit(TEXT)
        replanned = [event for event in job.events() if isinstance(event, Replanned)]
        again = job.result().latents
    assert replanned and all("out of memory" in event.reason for event in replanned)
    assert torch.equal(whole, again)


def test_two_engines_at_once_have_both_their_budgets(wide: Path) -> None:
    def run(results: list[Tensor]) -> None:
        with Engine.open(wide, vram="256MiB", device=DEVICE, options=FIXED) as engine:
            results.extend(engine.submit(TEXT).result().latents for _ in range(2))

    found: list[list[Tensor]] = [[], [], []]
    run(found[0])
    threads = [threading.Thread(target=run, args=(each,)) for each in found[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(each) == 2 for each in found)
    assert all(torch.equal(latents, found[0][0]) for each in found for latents in each)


@pytest.mark.parametrize("home", ["cpu", DEVICE])
def test_a_streamed_module_gives_the_bits_of_the_resident_one(home: str, tmp_path: Path) -> None:
    """In whatever stream it is called."""
    module, x = Walk().to(DEVICE), torch.linspace(-1, 1, 32, device=DEVICE).reshape(2, 16)
    with torch.no_grad():
        wanted = module(x)
    module.to(home)
    there = next(module.parameters()).device
    largest = "1MiB" if home == "cpu" else None
    with (
        torch.no_grad(),
        penstock.stream(module, "blocks", vram=largest, ram="1MiB", device=DEVICE, folder=tmp_path),
    ):
        for enter in _streams():
            assert torch.equal(enter(lambda: module(x)), wanted)
    assert all(weight.device == there for weight in module.parameters())
    with torch.no_grad():
        assert torch.equal(module.to(DEVICE)(x), wanted)


def _streams() -> list[Callable[[Callable[[], Tensor]], Tensor]]:
    """Ways to call something: in torch's own stream, in another one, and in torch's own again."""

    def aside(call: Callable[[], Tensor]) -> Tensor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = call()
        side.synchronize()
        return found

    return [lambda call: call(), aside, lambda call: call(), aside]


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_streamed_module_with_quantised_layers(format: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x = torch.randn(4, 128)
        module = torch.nn.Module()
        blocks = [torch.nn.Sequential(torch.nn.Linear(128, 128)) for _ in range(4)]
    module.blocks = torch.nn.ModuleList(blocks)
    found = []
    for device in ("cpu", DEVICE):
        with (
            torch.no_grad(),
            penstock.stream(
                module, "blocks", vram="64MiB", ram="1MiB", format=format, device=device,
                folder=tmp_path,
            ),
        ):  # fmt: skip
            y = x.to(device)
            for block in module.blocks:
                y = block(y)
            found.append(y.cpu())
    # The same decoded weights; products are summed in another order.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("home", ["cpu", DEVICE])
@pytest.mark.parametrize("vram", ["512MiB", None])
def test_an_attached_pipeline_makes_what_it_makes_by_itself(
    home: str, vram: str | None, wide: Path, tmp_path: Path
) -> None:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wide).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "height": 64, "width": 64, "num_frames": 5,
            "num_inference_steps": 2, "output_type": "pt"}  # fmt: skip

    def frames() -> Tensor:
        draw = torch.Generator().manual_seed(0)
        found: Tensor = pipe(**call, generator=draw).frames
        return found.cpu()

    wanted = frames()
    before = [weight.detach().cpu().clone() for weight in pipe.transformer.parameters()]
    pipe.to(home)
    with penstock.attach(pipe, vram=vram, ram="256MiB", device=DEVICE, folder=tmp_path) as attached:
        pipe.to(home)  # where it is already
        found, again = frames(), frames()
        assert attached.report.vram_bytes == 0
    # The same operations in fp32; where kernels differ, by rounding.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert torch.equal(found, again)
    after = list(pipe.transformer.parameters())
    assert {weight.device.type for weight in after} == {home}
    assert all(torch.equal(w.cpu(), b) for w, b in zip(after, before, strict=True))


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


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_products_by_blocks_work_where_the_card_has_them(name: Any) -> None:
    pytest.importorskip("comfy_kitchen")
    report = probe_micro(DEVICE)[name]
    if torch.cuda.get_device_capability(DEVICE) >= (10, 0):
        assert report.works, report.reason
    else:
        assert "no such tensor cores" in report.reason


def test_sparse_attention_works_and_takes_what_plans_say() -> None:
    pytest.importorskip("comfy_kitchen")
    report = probe_sol(DEVICE, torch.bfloat16, 40, 128)
    assert report.works, report.reason
    heads, tokens = 8, 3000
    q, k, v = (
        torch.randn(1, tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
    )
    attend = sol_attention(1.0)
    attend(q, k, v)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_stats()["requested_bytes.all.current"]
    attend(q, k, v)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - held
    planned = sol_attention_bytes(heads, tokens) + q.nbytes
    assert 0.99 * planned <= taken <= 1.01 * planned


def test_the_machine_shows_a_sign_of_its_gpu() -> None:
    assert shows_gpu() and default_device() == "cuda"
