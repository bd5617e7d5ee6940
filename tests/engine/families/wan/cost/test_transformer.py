from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_dit import I2V_14B, fake_inputs, fake_transformer
from penstock.engine.attention.kernels import Attention, attention, int8_attention
from penstock.engine.families.wan import forward
from penstock.engine.families.wan.cost import transformer as cost
from penstock.engine.families.wan.spec import TransformerSpec
from penstock.profiles.attention_bytes import int8_attention_bytes
from penstock.profiles.manifest import Weights
from tests import fake_kitchen
from tests.meter import StorageMeter
from tests.tiny_transformer import inputs, tiny_transformer

SHAPES = {
    "720x1280x81": ((21, 90, 160), 75_600),
    "480x832x81": ((21, 60, 104), 32_760),
    "528x960x77": ((20, 66, 120), 39_600),
}


_NOT_OF_THE_CONFIG = {
    "weights", "cross_block_bytes", "patch_size", "storage", "context_storage", "lora", "pos_embed",
}  # fmt: skip


def spec_of(config: Any, itemsize: int) -> TransformerSpec:
    names = TransformerSpec.__dataclass_fields__.keys() - _NOT_OF_THE_CONFIG
    return TransformerSpec(
        weights=Weights(rest_bytes=0, block_bytes=(0,) * config["num_layers"], itemsize=itemsize),
        cross_block_bytes=(0,) * config["num_layers"],
        **{name: config[name] for name in names},
        patch_size=tuple(config["patch_size"]),
    )


def measure(
    model: Any, given: Any, case: cost.DenoiseCase, attend: Attention = attention
) -> tuple[int, int]:
    """Peak bytes of the prepare and of the denoising phase, as an engine runs them."""
    latents, text, image = given
    dtype = latents.dtype
    with torch.no_grad(), StorageMeter([*model.parameters(), *model.buffers()]) as meter:
        passes = case.branches * (2 if case.contrasted else 1)
        texts = [text.clone() for _ in range(passes)]
        image = None if image is None else image.clone()
        timesteps = torch.arange(case.steps, dtype=torch.int64)
        wide = torch.float32 if case.residual == "fp32" else dtype
        steps = forward.step_modulation(model, timesteps, dtype, wide)
        contexts = [forward.prepare_context(model, states, image) for states in texts]
        branches: list[list[forward.CrossKV]] = [[] for _ in contexts]
        for block in model.blocks:
            first = None
            for context, branch in zip(contexts, branches, strict=True):
                branch.append(forward.cross_kv(block.attn2, context, first))
                first = branch[-1]
        if case.contrasted:
            pairs = zip(branches[::2], branches[1::2], strict=True)
            branches = [
                [a.contrasted(b, 11.0) for a, b in zip(*pair, strict=True)] for pair in pairs
            ]
        prepare, meter.peak = meter.peak, 0
        del contexts, context, texts, image, timesteps
        model_input = latents.clone()
        rope = forward.rope_tables(model, case.latent, latents.device)
        results = []
        for first_of_visit in range(0, case.branches, case.visit_branches):
            visit = branches[first_of_visit : first_of_visit + case.visit_branches]
            blocks = enumerate(model.blocks)
            results += forward.denoise_forward(
                model, blocks, model_input, visit, steps[0], rope, case.chunk_tokens, attend, wide
            )
    return prepare, meter.peak


def predicted(spec: TransformerSpec, case: cost.DenoiseCase) -> tuple[int, int]:
    """The same two figures, less what `measure` has not: the sampler's state."""
    denoise = cost.denoise_bytes(spec, case)
    if case.contrasted:  # both texts' are made as those of two branches are
        case = dataclasses.replace(case, branches=2 * case.branches, contrasted=False)
    return cost.context_bytes(spec, case).total_bytes, denoise.total_bytes - denoise["latents"]


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, 6, 20, 90]),
    st.sampled_from([1, 2, 3]),
)
def test_never_under_what_is_measured(
    data: st.DataObject, dtype: torch.dtype, image_dim: int | None, branches: int
) -> None:
    model = tiny_transformer(
        image_dim=image_dim,
        num_attention_heads=data.draw(st.integers(1, 5)),
        attention_head_dim=data.draw(st.sampled_from([6, 12, 16, 34])),
        ffn_dim=data.draw(st.sampled_from([8, 40, 300])),
        num_layers=data.draw(st.integers(1, 2)),
        text_dim=data.draw(st.sampled_from([4, 64])),
        out_channels=data.draw(st.sampled_from([1, 4, 30])),
        in_channels=40,
        cross_attn_norm=data.draw(st.booleans()),
        dtype=dtype,
    )
    frames, high, wide = (data.draw(st.integers(1, 5)) for _ in range(3))
    tokens = frames * high * wide
    case = cost.DenoiseCase(
        latent=(frames, 2 * high, 2 * wide),
        chunk_tokens=data.draw(st.integers(-(-tokens // 5), tokens + 3)),
        branches=branches,
        visit_branches=data.draw(st.integers(1, branches)),
        steps=data.draw(st.integers(1, 4)),
        image_tokens=0 if image_dim is None else data.draw(st.integers(1, 300)),
        residual=data.draw(st.sampled_from(["bf16", "fp32"])),
        contrasted=data.draw(st.booleans()),
    )
    spec = spec_of(model.config, dtype.itemsize)
    given_inputs = inputs(model, case.latent, dtype, max(1, case.image_tokens))
    measured = measure(model, given_inputs, case)
    for bound, peak in zip(predicted(spec, case), measured, strict=True):
        assert bound >= peak


@pytest.mark.parametrize(
    ("name", "chunk", "branches", "residual"),
    [
        ("720x1280x81", 2048, 1, "bf16 contrasted"),
        ("480x832x81", 4096, 1, "fp32 contrasted"),
        ("720x1280x81", 2048, 1, "bf16"),
        ("720x1280x81", 4096, 2, "bf16"),
        ("720x1280x81", 2048, 2, "fp32"),
        ("720x1280x81", 75_600, 1, "fp32"),
        ("528x960x77", 8192, 2, "bf16"),
        ("528x960x77", 2048, 1, "bf16"),
        ("480x832x81", 2048, 2, "bf16"),
        ("480x832x81", 4096, 1, "fp32"),
    ],
)
def test_at_most_five_percent_over_at_the_real_shapes(
    name: str, chunk: int, branches: int, residual: str
) -> None:
    latent, _ = SHAPES[name]
    residual, _, contrasted = residual.partition(" ")
    case = cost.DenoiseCase(
        latent, chunk, branches, branches, steps=8, image_tokens=257, residual=residual,
        contrasted=bool(contrasted),
    )  # fmt: skip
    with FakeTensorMode():
        model = fake_transformer(blocks=1)
        measured = measure(model, fake_inputs(latent), case)
        spec = spec_of(model.config, 2)
    for bound, peak in zip(predicted(spec, case), measured, strict=True):
        assert peak <= bound <= 1.05 * peak


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_fits_its_share(scheduler: Any, dtype: torch.dtype) -> None:
    scheduler.set_timesteps(5)
    shape = (1, 16, 2, 32, 32)
    latent_bytes = 16 * 2 * 32 * 32 * 4
    with StorageMeter() as meter:
        sample = torch.randn(shape)
        for step in scheduler.timesteps:
            outputs = [torch.randn(shape, dtype=dtype) for _ in range(2)]
            state = meter.live - 2 * outputs[0].nbytes
            assert state <= (1 + cost.UNIPC_HISTORY) * latent_bytes + 4096
            meter.peak = meter.live
            velocity = outputs[1].float() + 5.0 * (outputs[0].float() - outputs[1].float())
            sample = scheduler.step(velocity, step, sample, return_dict=False)[0]
            work = meter.peak - state - 2 * outputs[0].nbytes
            assert work <= cost.SAMPLER_TEMPORARIES * latent_bytes
            del outputs, velocity


def spec_14b() -> TransformerSpec:
    config = I2V_14B | {"image_dim": 1280}
    return spec_of(config, 2)


@pytest.mark.parametrize(
    ("name", "total", "linear", "attention", "cross"),
    [
        ("720x1280x81", 6540, 1811, 4682, 48),
        ("480x832x81", 1686, 786, 879, 21),
        ("528x960x77", 2260, 950, 1285, 25),
    ],
)
def test_arithmetic_of_the_14b_model(
    name: str, total: int, linear: int, attention: int, cross: int
) -> None:
    latent, tokens = SHAPES[name]
    assert cost.grid_tokens(spec_14b(), latent) == tokens
    flops = cost.denoise_flops(spec_14b(), tokens, image_tokens=257)
    found = (flops.total, flops.linear, flops.self_attention)
    for value, expected in zip(found, (total, linear, attention), strict=True):
        assert value / 1e12 == pytest.approx(expected, rel=0.01)
    assert flops.cross_attention / 1e12 == pytest.approx(cross, rel=0.02)  # given to two digits


def test_the_parts_of_a_720p_forward() -> None:
    case = cost.DenoiseCase((21, 90, 160), 2048, 2, 2, steps=40, image_tokens=257)
    peak = cost.denoise_bytes(spec_14b(), case)
    hidden = 75_600 * 5120 * 2
    assert peak.stage == "blocks"
    assert peak["hidden"] == peak["self_kv"] == 2 * hidden
    assert peak["cross_kv"] == 40 * 2 * (2 * 512 + 257) * 5120 * 2
    assert peak["latents"] == (4 * 16 + 20) * 21 * 90 * 160 * 4
    assert peak["rope"] == 75_600 * 128 * 4
    assert peak.total_bytes == sum(count for _, count in peak.items)


def test_the_sampler_is_the_peak_where_tokens_are_narrow() -> None:
    config = I2V_14B | {
        "num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "image_dim": 1280,
        "num_layers": 1,
    }  # fmt: skip
    case = cost.DenoiseCase((4, 16, 16), 16, 1, 1, steps=1, image_tokens=257)
    assert cost.denoise_bytes(spec_of(config, 2), case).stage == "sampler"


def test_one_branch_a_visit_takes_one_hidden_state_less() -> None:
    both = cost.DenoiseCase((21, 90, 160), 2048, 2, 2, steps=40, image_tokens=257)
    single = dataclasses.replace(both, visit_branches=1)
    saved = cost.denoise_bytes(spec_14b(), both).total_bytes
    saved -= cost.denoise_bytes(spec_14b(), single).total_bytes
    assert saved == 75_600 * 5120 * 2 - 16 * 21 * 90 * 160 * 2  # the first prediction waits


def test_bytes_of_int8_attention_by_hand() -> None:
    tokens = 75_600  # 590 tiles of 128 and 80 tokens more
    keys, values, scales = tokens * 5120, 591 * 128 * 5120, 40 * 4 * (591 * 4 + 128 + 1)
    for chunk, blocks in ((2048, 16), (75_600, 591)):
        queries = chunk * 5120 + 40 * 4 * blocks * 32
        found = int8_attention_bytes(40, 128, chunk, tokens, 2)
        assert found == keys + values + scales + queries
    few = 200  # up to 1024 keys tiles are of 64 tokens
    assert int8_attention_bytes(1, 128, 1, few, 2) == (
        128 * (1 + few + 256) + 4 * (32 + 4 * 4 + 128 + 1)
    )
    narrow = 64 * (10 + few + 256) + 4 * (32 + 4 * 4 + 64 + 1) + 64 * (10 + 2 * few) * 4
    assert int8_attention_bytes(3, 24, 10, few, 4) == 3 * narrow
    widest = 256 * (10 + few + 256) + 4 * (64 + 4 * 4 + 256 + 1)
    assert int8_attention_bytes(1, 256, 10, few, 2) == widest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [12, 64])
@pytest.mark.parametrize("chunk", [9, 60, 1200])
def test_int8_attention_takes_what_is_predicted(
    chunk: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kernel that allocates as the library's source does, and computes nothing."""
    fake_kitchen.install(monkeypatch, fake_kitchen.allocating)
    model = tiny_transformer(attention_head_dim=width, ffn_dim=8, dtype=dtype)
    latent = (3, 40, 40)
    case = cost.DenoiseCase(latent, chunk, 1, 1, 2, image_tokens=0, attention="int8")
    spec = spec_of(model.config, dtype.itemsize)
    given = inputs(model, latent, dtype)
    _, bound = predicted(spec, case)
    _, peak = measure(model, given, case, int8_attention())
    assert peak <= bound
    torchs = dataclasses.replace(case, attention="sdpa")
    if width == 64:  # narrower heads are copied, and what fp32's result takes there is rounded up
        assert bound - peak <= predicted(spec, torchs)[1] - measure(model, given, torchs)[1]
    if chunk < 1200:  # else the norm's copies in fp32 are more
        assert peak > predicted(spec, torchs)[1]


def test_earlier_predictions_are_held_while_the_last_visit_runs() -> None:
    case = cost.DenoiseCase((21, 90, 160), 2048, 3, 2, steps=40, image_tokens=257)
    assert cost.denoise_bytes(spec_14b(), case)["outputs"] == 2 * 16 * 21 * 90 * 160 * 2


def test_cross_kv_elsewhere_leaves_one_block_and_branch_here() -> None:
    here = cost.DenoiseCase((21, 90, 160), 2048, 2, 2, steps=40, image_tokens=257)
    away = dataclasses.replace(here, cross_kv_on_device=False)
    assert cost.denoise_bytes(spec_14b(), away)["cross_kv"] == 2 * (512 + 257) * 5120 * 2
    one_block = cost.cross_kv_bytes(spec_14b(), here) // 40
    assert cost.context_bytes(spec_14b(), away)["cross_kv"] == one_block


def test_arithmetic_of_the_context_is_small_beside_a_forward() -> None:
    case = cost.DenoiseCase((21, 90, 160), 2048, 2, 2, steps=40, image_tokens=257)
    blocks = 40 * (2 * 512 + 257) * 2 * 2 * 5120 * 5120
    assert blocks < cost.context_flops(spec_14b(), case) < 1.05 * blocks
