"""Sparse attention by comfy-kitchen: its arithmetic by another road, its bytes as it lays them out,
its trial, and the jobs that ask for it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.sol_attn import sol_attn
from torch import Tensor

from penstock.engine.attention.choice import attention_numerics
from penstock.engine.attention.kernels import attention, sol_attention
from penstock.engine.attention.probe import probe, probe_sol
from penstock.engine.families.wan.family import builtins
from penstock.engine.prepared import Prepared, machine_of
from penstock.engine.request.generation import workload_of
from penstock.engine.request.settings import Settings, resolve
from penstock.errors import ProfileError, UsageError
from penstock.profiles.attending import Attending
from penstock.profiles.attention_bytes import (
    BLOCK,
    WIDTH,
    attending_items,
    sol_attention_bytes,
)
from penstock.profiles.options import Options
from penstock.profiles.policy import Policy
from tests.engine.running import REQUEST, an_engine, stop_after_a_step

CPU = torch.device("cpu")
LONG = replace(REQUEST, steps=6)


def random_qkv(tokens: int, heads: int, width: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, heads, width, generator=draw) for _ in range(3))
    return [q * 1.5, k * 1.5 + 0.3, v]


def by_hand(q: Tensor, k: Tensor, v: Tensor, tau: float) -> Tensor:
    """In fp64, a block of queries at a time. A block of keys counts one by one where its mean score
    is more than ``tau`` deviations above that of all, and beside the queries' own; else as its mean
    key and its sum of values, weighed by its length."""
    tokens, width = q.shape[1], q.shape[3]
    scale, out = width**-0.5, torch.zeros(q.shape, dtype=torch.float64)
    parts = [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
    for head in range(q.shape[2]):
        qh, kh, vh = (x[0, :, head].double() for x in (q, k, v))
        means = torch.stack([kh[part].mean(0) for part in parts])
        centre = means.mean(0)
        spread = (means - centre).square().mean(0)
        for at, part in enumerate(parts):
            query = qh[part].mean(0)
            above = (means - centre) @ query * scale
            bar = tau * ((query.square() * spread).sum() * scale**2).sqrt()
            scores, values, weights = [], [], []
            for other, keys in enumerate(parts):
                if above[other] > bar or abs(other - at) <= 1:
                    scores.append(qh[part] @ (kh[keys] - centre).T * scale)
                    values.append(vh[keys])
                    weights.append(torch.ones(len(vh[keys]), dtype=torch.float64))
                else:  # all queries of the block share the score of their mean
                    scores.append(above[other].expand(len(qh[part]), 1))
                    values.append(vh[keys].mean(0)[None])
                    weights.append(torch.tensor([float(len(vh[keys]))], dtype=torch.float64))
            shares = torch.cat(scores, 1).exp() * torch.cat(weights)
            out[0, part, head] = shares @ torch.cat(values) / shares.sum(1, keepdim=True)
    return out.flatten(2, 3)


@pytest.mark.parametrize(("tokens", "tau"), [(700, 0.5), (640, 1.5), (60, 1.0)])
def test_it_is_the_papers_rule_by_another_road(tokens: int, tau: float) -> None:
    q, k, v = random_qkv(tokens, 2, WIDTH)
    found = sol_attention(tau)(q, k, v)
    torch.testing.assert_close(found.double(), by_hand(q, k, v, tau), rtol=2e-5, atol=2e-5)
    assert found.is_contiguous()
    if tokens > 3 * BLOCK:
        assert not torch.allclose(found, attention(q, k, v), atol=1e-3)


def test_with_nothing_left_out_it_is_torchs_own() -> None:
    q, k, v = random_qkv(500, 3, WIDTH)
    torch.testing.assert_close(sol_attention(-1e6)(q, k, v), attention(q, k, v), rtol=0, atol=1e-5)


def test_its_bytes_are_those_that_its_kernels_ask_for() -> None:
    plan: Any = comfy_kitchen.backends.cuda._C.sol_attn_plan  # needs no card
    draw = random.Random(1)
    sizes = [(draw.randint(1, 90_000), draw.randint(1, 40)) for _ in range(60)]
    for tokens, heads in [(1, 1), (64, 1), (65, 3), (32_760, 40), (75_600, 40), *sizes]:
        assert sol_attention_bytes(heads, tokens) == plan(1, tokens, heads, token_aug=0)["total"]


def test_the_trial_fails_here_and_says_why() -> None:
    for word in ("sol", "int8"):
        found = probe(word, CPU, torch.bfloat16, 40, WIDTH)
        assert not found.works and found.reason == "it needs a CUDA device"


def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's slow twin counts as a kernel, for heads of any width."""
    monkeypatch.setattr(comfy_kitchen, "sol_attn_is_available", lambda device: True)
    monkeypatch.setattr(comfy_kitchen, "sol_attn", sol_attn)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_the_trial_knows_right_from_wrong(tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(monkeypatch)
    right = probe_sol(CPU, torch.float32, 2, 32, tau)
    assert right.works and right.cosine is not None and right.cosine > 0.995
    kernel = comfy_kitchen.sol_attn
    for wrong in (
        lambda q, k, v, tau: kernel(q, k, v, tau=tau, tail=False),  # what is far is forgotten
        lambda q, k, v, tau: kernel(q, -k, v, tau=tau),
        lambda q, k, v, tau: kernel(q, k, v.roll(1, dims=2), tau=tau),
    ):
        monkeypatch.setattr(comfy_kitchen, "sol_attn", wrong)
        assert not probe_sol(CPU, torch.float32, 2, 32, tau).works


@pytest.mark.parametrize("word", ["sol:0", "sol:-1", "sol:", "sol:x", "sol:inf", "int8:1", "dense"])
def test_what_is_no_attention_is_refused(word: str) -> None:
    with pytest.raises(ProfileError, match="illegal attention"):
        Policy(attention=word)


def test_all_tokens_come_at_once() -> None:
    with pytest.raises(ProfileError, match="all tokens at once"):
        Policy(attention="sol", chunk_tokens=64)


def test_a_job_attends_densely_at_first_and_goes_on_to_the_bit(
    t2v_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed(monkeypatch)

    def seen(engine: Any) -> list[Tensor]:
        found: list[Tensor] = []
        engine.submit(LONG, on_step=lambda step, latents: found.append(latents.clone())).result()
        return found

    with an_engine(t2v_folder) as engine:
        dense = seen(engine)
    with an_engine(t2v_folder, attention="sol:0.5") as engine:
        plan = engine.plan(LONG)
        sparse = seen(engine)
        same = [torch.equal(one, other) for one, other in zip(dense, sparse, strict=True)]
        assert same == [True] * 2 + [False] * 4  # a fifth of six steps, and what is left of it
        stop_after_a_step(engine, LONG, tmp_path / "job")
        report = engine.resume(tmp_path / "job").result()
    assert torch.equal(report.latents, sparse[-1])
    assert plan.attention == report.report.attention == "sol:0.5"
    assert any("sol:0.5 attention: it works here" in told for told in report.report.notices)
    denoise = plan["denoise"]
    assert denoise.chunk_tokens == 2 * 2 * 3
    assert Attending.of(plan.attention).backend.told == "sparse, by comfy-kitchen"
    assert "sol:0.5, comfy-kitchen" in attention_numerics("sol:0.5")


def test_where_it_does_not_work_torch_attends(t2v_folder: Path) -> None:
    with an_engine(t2v_folder, attention="sol") as engine:
        plan = engine.plan(LONG)
        report = engine.submit(replace(LONG, steps=1)).result().report
    assert plan.attention == "sdpa"
    (told,) = (notice for notice in report.notices if "attention" in notice)
    assert told == "sol attention: not here, torch's own attends (it needs a CUDA device)"


def planned(synthetic: str, word: str, request: Settings, rate: float | None = None) -> Any:
    options, machine = machine_of(Options(ram="64GiB", attention=word), "RTX 5090", None)
    machine = replace(machine, rates=replace(machine.rates, sol_attention_flops=rate))
    opened = Prepared.open(synthetic=synthetic, options=options, machine=machine)
    return opened.plan(workload_of(resolve(request, opened.about)))["denoise"], machine.rates


def test_a_plan_counts_its_bytes_and_its_dense_steps() -> None:
    request = Settings(prompt="a cat", size="1280x720", steps=10)
    of = "wan2.1-i2v-14b", "sol", request
    (slow, rates), (fast, _) = planned(*of), planned(*of, rate=1e16)
    tokens = 21 * 45 * 80
    assert fast.chunk_tokens == tokens
    spec = builtins()["wan2.1-i2v-14b"]("bf16").transformer
    held = sum(attending_items("sol", 40, 128, tokens, tokens, spec.weights.itemsize).values())
    assert held == sol_attention_bytes(40, tokens) + 2 * tokens * 5120 * 2  # queries and result
    assert fast.work_bytes > held
    attending = 10 * 2 * 40 * 4 * tokens**2 * 5120 / rates.flops  # steps, branches, blocks
    assert slow.seconds - fast.seconds == pytest.approx(0.8 * attending, rel=0.05)


def test_a_first_frame_apart_is_refused(picture: Path) -> None:
    request = Settings(prompt="a cat", steps=10)
    assert planned("wan2.2-ti2v-5b", "sol", request)[0].chunk_tokens > 0
    pictured = replace(request, image=picture)
    with pytest.raises(UsageError, match="all tokens of a video at once"):
        planned("wan2.2-ti2v-5b", "sol", replace(pictured, size="1280x704"))
