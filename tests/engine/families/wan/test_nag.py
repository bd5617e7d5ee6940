"""Normalized attention guidance: the paper's formula inside diffusers' own transformer; in jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.families.wan import forward
from penstock.engine.request.generation import GenerationRequest
from penstock.errors import RequestError
from penstock.profiles.plan import Plan
from tests.engine.run.test_budget import _host_buffers_apart, _in_ram, _meter, _run
from tests.engine.running import a_request, an_engine, stop_after_a_step
from tests.tiny_transformer import inputs, tiny_transformer

STEP = torch.tensor([713])
LATENT = (3, 8, 10)


class Reference:
    """A processor for diffusers' cross-attention, after the paper (arXiv:2505.21179), section 3:

    Z~ = Z+ + (s - 1)(Z+ - Z-);  R = |Z~|_1 / |Z+|_1;  Z^ = min(R, tau) / R * Z~;
    Z = alpha Z^ + (1 - alpha) Z+, in fp64.
    """

    def __init__(self, negative: Tensor, scale: float) -> None:
        self.negative, self.scale = negative, scale

    def __call__(self, attn: Any, hidden: Tensor, context: Tensor, *ignored: Any) -> Tensor:
        def attend(k: Tensor, v: Tensor) -> Tensor:
            q = attn.norm_q(attn.to_q(hidden))
            heads = [x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v)]
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).double()

        def of(text: Tensor) -> Tensor:
            return attend(attn.norm_k(attn.to_k(text)), attn.to_v(text))

        image, text = context[:, :-512], context[:, -512:]
        towards, away = of(text), of(self.negative)
        led = towards + (self.scale - 1) * (towards - away)
        ratio = led.abs().sum(-1, keepdim=True) / towards.abs().sum(-1, keepdim=True)
        led = led * ratio.clamp(max=2.5) / ratio
        out = 0.25 * led + 0.75 * towards
        if image.shape[1]:
            keys = attn.norm_added_k(attn.add_k_proj(image))
            out = out + attend(keys, attn.add_v_proj(image))
        projected: Tensor = attn.to_out[0](out.to(hidden.dtype))
        return projected


def ours(
    model: Any, latents: Tensor, texts: list[Tensor], image: Tensor | None, scale: float, chunk: int
) -> Tensor:
    """The lean forward of one branch that goes away from the second text."""
    branch = []
    contexts = [forward.prepare_context(model, text, image) for text in texts]
    for block in model.blocks:
        prompt, negative = (forward.cross_kv(block.attn2, context) for context in contexts)
        branch.append(prompt.contrasted(negative, scale))
    modulation = forward.step_modulation(model, STEP, latents.dtype)[0]
    rope = forward.rope_tables(model, latents.shape[2:], latents.device)
    (found,) = forward.denoise_forward(
        model, enumerate(model.blocks), latents, [branch], modulation, rope, chunk
    )
    return found


@pytest.mark.parametrize("image_dim", [None, 14])
@pytest.mark.parametrize("scale", [1.5, 11.0])  # below and above what may grow without a limit
def test_it_is_the_papers_formula_in_diffusers_transformer(
    image_dim: int | None, scale: float
) -> None:
    model = tiny_transformer(image_dim=image_dim)
    latents, text, image = inputs(model, LATENT, torch.float32)
    negative = inputs(model, (1, 2, 2), torch.float32, seed=9)[1]
    plain = model(latents, STEP, text, image).sample
    with torch.no_grad():
        context = model.condition_embedder.text_embedder(negative)
    found = [ours(model, latents, [text, negative], image, scale, chunk) for chunk in (60, 7)]
    for block in model.blocks:
        block.attn2.set_processor(Reference(context, scale))
    expected = model(latents, STEP, text, image).sample
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)  # fp32 against fp64 inside
    assert (plain - expected).abs().max() > 1e-3


def test_a_token_without_magnitude_stays_finite() -> None:
    towards, away = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    assert forward.away_from(towards, away, 11.0).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nag_scale": 1.0, "guidance_scale": 1.0}, "above 1"),
        ({"nag_scale": float("nan"), "guidance_scale": 1.0}, "above 1"),
        ({"nag_scale": 1e6, "guidance_scale": 1.0}, "at most 100"),
        ({"nag_scale": 11.0, "guidance_scale": 5.0}, "--cfg 1"),
    ],
)
def test_what_it_cannot_go_with_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        a_request(**changes)


def plan_of(folder: Path, request: GenerationRequest, **options: Any) -> Plan:
    with an_engine(folder, **options) as engine:
        return engine.plan(request)


def test_a_job_takes_one_pass_and_is_led_by_its_negative_prompt(t2v_folder: Path) -> None:
    request = a_request(guidance_scale=1.0, nag_scale=11.0, negative_prompt="blurry")
    bare = a_request(guidance_scale=1.0, negative_prompt="blurry")
    with an_engine(t2v_folder) as engine:
        plan = engine.plan(request)
        with _meter(engine) as meter, _host_buffers_apart(meter):
            found = _run(engine, request, plan, overlapped=True)
        assert meter.peak <= plan.peak_vram_bytes + _in_ram(plan)
        assert plan["denoise"].branches == 1
        other = engine.submit(a_request(**(vars(request) | {"negative_prompt": "dark"}))).result()
        without = engine.submit(bare).result()
    assert not torch.equal(found.latents, without.latents)
    assert not torch.equal(found.latents, other.latents)
    in_ram = plan_of(t2v_folder, request, cross_kv="ram")
    with an_engine(t2v_folder, cross_kv="ram") as engine:
        assert not engine.plan(request)["denoise"].cross_kv_on_device
        assert torch.equal(engine.submit(request).result().latents, found.latents)
    held = dict(in_ram["denoise"].ram_work)["cross-attention K/V"]
    single = dict(plan_of(t2v_folder, bare, cross_kv="ram")["denoise"].ram_work)
    assert held == 2 * single["cross-attention K/V"]


def test_a_stopped_job_goes_on_to_the_bit(t2v_folder: Path, tmp_path: Path) -> None:
    request = a_request(guidance_scale=1.0, nag_scale=11.0, negative_prompt="blurry")
    with an_engine(t2v_folder) as engine:
        whole = engine.submit(request).result()
        stop_after_a_step(engine, request, tmp_path / "job")
        assert torch.equal(engine.resume(tmp_path / "job").result().latents, whole.latents)
