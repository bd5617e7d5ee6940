"""MiniMax-H3 under comfy-kitchen's attention: in 8 bits, and sparse after the first steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.sol_attn import sol_attn
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.fake_h3 import layout_of, lean_bytes
from penstock.engine.attention.kernels import int8_attention
from penstock.engine.engine import Engine
from penstock.engine.families.minimax_h3.builtin import minimax_h3
from penstock.engine.families.minimax_h3.config import TRANSFORMER
from penstock.engine.families.minimax_h3.cost import PackedCase, denoise_items
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.engine.request.generation import GenerationRequest
from penstock.profiles.attention_bytes import sol_attention_bytes
from penstock.profiles.cards import described
from penstock.profiles.manifest import VideoShape, Weights
from penstock.profiles.phases import Noise, Workload
from penstock.profiles.planner import plan
from penstock.profiles.policy import Policy
from tests import fake_kitchen
from tests.engine.families.minimax_h3 import tiny

HEADS, WIDTH = TRANSFORMER["num_attention_heads"], TRANSFORMER["attention_head_dim"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("h3")).folder


def _opened(folder: Path, word: str) -> Engine:
    return Engine.open(folder, device="cpu", vram="1GiB", ram="1GiB", attention=word)


def _request(engine: Engine) -> GenerationRequest:
    values = {"height": 32, "width": 64, "frames": 124, "steps": 7}
    defaults = engine.model.official.request_defaults
    return GenerationRequest("a red fox", grid=engine.model.grid, seed=5, **{**defaults, **values})


def _steps(folder: Path, word: str, job: Path | None = None) -> tuple[list[Tensor], Any]:
    """Latents after each step, and the report; with ``job`` stopped after three and resumed."""
    with _opened(folder, word) as engine:
        seen: list[Tensor] = []

        def keep(step: int, latents: Tensor) -> None:
            seen.append(latents.clone())
            if job is not None and len(seen) == 3:
                raise KeyboardInterrupt

        run = engine.submit(_request(engine), on_step=keep, job_dir=job)
        if job is None:
            return seen, run.result().report
        with pytest.raises(KeyboardInterrupt):
            run.result()
        rest = engine.resume(job, on_step=lambda step, latents: seen.append(latents.clone()))
        return seen, rest.result().report


@pytest.fixture(scope="module")
def dense(model: Path) -> list[Tensor]:
    return _steps(model, "sdpa")[0]


def test_a_job_attends_in_8_bits_and_says_so(
    model: Path, dense: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_kitchen.install(monkeypatch)
    seen, report = _steps(model, "int8")
    assert report.attention == "int8"
    assert any(told.startswith("int8 attention: it works here") for told in report.notices)
    assert not torch.equal(seen[0], dense[0])
    assert cosine_similarity(seen[-1].flatten(), dense[-1].flatten(), dim=0) > 0.999


def test_sparse_attention_begins_after_a_fifth_and_goes_on_to_the_bit(
    model: Path, dense: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven steps are six forward passes, of which two are dense."""
    monkeypatch.setattr(comfy_kitchen, "sol_attn_is_available", lambda device: True)
    monkeypatch.setattr(comfy_kitchen, "sol_attn", sol_attn)
    seen, report = _steps(model, "sol:0.5")
    same = [torch.equal(one, other) for one, other in zip(seen, dense, strict=True)]
    assert same == [True] * 2 + [False] * 4
    assert report.attention == "sol:0.5"
    resumed, _ = _steps(model, "sol:0.5", tmp_path / "job")
    assert len(resumed) == 3 + 4  # the step at which it was stopped is computed again
    pairs = zip(resumed[3:], seen[2:], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def _spec() -> PackedSpec:
    known = {name: each for name, each in TRANSFORMER.items() if name in PackedSpec.__annotations__}
    return PackedSpec(Weights(0, (0,), 2), 0, (), **(known | {"num_layers": 1}))


def _sol_allocating(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    held = torch.empty(sol_attention_bytes(HEADS, k.shape[1]), dtype=torch.uint8)
    assert held.nbytes
    return torch.empty_like(q).flatten(2, 3)


@pytest.mark.parametrize("word", ["int8", "sol"])
def test_a_forward_takes_what_its_plan_says(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors at the true widths, the kernels allocating and computing nothing."""
    fake_kitchen.install(monkeypatch, fake_kitchen.allocating)
    layout = layout_of("864x480x124")
    chunk = layout.rows if word == "sol" else 512
    attend = _sol_allocating if word == "sol" else int8_attention()
    ours = lean_bytes(layout, chunk, 1, attend)
    case = PackedCase(layout.latents, len(layout.tags), 0, chunk, attention=word)
    planned = sum(count for _, count in denoise_items(_spec(), case))
    measured = ours.nbytes + ours.given
    assert measured <= planned <= 1.05 * measured
    if word == "int8":  # in one chunk other moments of a block take more
        torchs = PackedCase(layout.latents, len(layout.tags), 0, chunk)
        assert measured > sum(count for _, count in denoise_items(_spec(), torchs))


def _planned(policy: Policy, rate: float | None = None) -> tuple[float, Any]:
    """Seconds of the denoising, and the machine's rates."""
    machine = described("4090", None, None)
    machine = replace(machine, rates=replace(machine.rates, sol_attention_flops=rate))
    work = Workload(VideoShape(1344, 768, 124), 51, guided=False, noise=Noise("euler"))
    return plan(minimax_h3("int8"), work, machine, policy)["denoise"].seconds, machine.rates


def test_a_plan_counts_its_seconds() -> None:
    """Attention is 4 n n inner a block and pass; ten of fifty passes are dense under "sol"."""
    (sdpa, rates), (int8, _) = (
        _planned(Policy(chunk_tokens=8192, attention=word)) for word in ("sdpa", "int8")
    )
    rows = layout_of("1344x768x124").rows
    attending = 50 * 50 * 4 * rows**2 * HEADS * WIDTH / rates.flops
    gained = attending * (1 - rates.flops / rates.int8_attention_flops)
    assert sdpa - int8 == pytest.approx(gained, rel=0.05)
    slow, fast = (_planned(Policy(attention="sol"), rate)[0] for rate in (None, 1e18))
    assert slow - fast == pytest.approx(0.8 * attending, rel=0.05)
