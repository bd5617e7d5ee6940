from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from penstock.engine.families.wan import forward
from penstock.engine.families.wan.structure import is_cross_kv
from penstock.engine.model.binding import bind, bound, skeleton
from penstock.errors import UsageError
from tests.tiny_transformer import TINY, inputs, lean, tiny_transformer
from tests.versions import DIFFUSERS_0_36

STEP = torch.tensor([713])
CONFIGS: list[dict[str, Any]] = [
    {},
    {"image_dim": 14},
    {"image_dim": 6, "cross_attn_norm": False, "num_layers": 1},
    {"num_attention_heads": 3, "attention_head_dim": 24, "ffn_dim": 100, "num_layers": 3},
    {"image_dim": 10, "num_attention_heads": 5, "attention_head_dim": 16, "eps": 1e-5},
]
LATENTS = [(3, 8, 10), (1, 4, 4), (5, 6, 14)]
CASES = list(itertools.product(range(len(CONFIGS)), LATENTS))


def relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """``model`` in ``dtype`` but for the modules that diffusers keeps in fp32 when it loads one."""
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize(("config", "latent"), CASES)
def test_one_chunk_is_bit_equal_to_diffusers(config: int, latent: tuple[int, int, int]) -> None:
    model = tiny_transformer(config, **CONFIGS[config])
    latents, text, image = inputs(model, latent, torch.float32)
    expected = model(latents, STEP, text, image).sample
    tokens = latent[0] * latent[1] * latent[2] // 4
    for chunk in (tokens, tokens + 5):
        assert torch.equal(lean(model, latents, [text], image, STEP, chunk)[0], expected)


@pytest.mark.parametrize(("config", "latent"), CASES)
def test_any_chunking_is_within_1e_6(config: int, latent: tuple[int, int, int]) -> None:
    model = tiny_transformer(config, **CONFIGS[config])
    latents, text, image = inputs(model, latent, torch.float32)
    expected = model(latents, STEP, text, image).sample
    for chunk in (1, 7, 16):
        assert relative(lean(model, latents, [text], image, STEP, chunk)[0], expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [0, 1, 2])
@pytest.mark.parametrize("uniform", [False, True])
def test_half_precision_is_bit_equal_too(dtype: torch.dtype, config: int, uniform: bool) -> None:
    model = tiny_transformer(config, dtype=dtype if uniform else torch.float32, **CONFIGS[config])
    model = as_loaded(model, dtype)
    latents, text, image = inputs(model, (3, 8, 10), dtype)
    expected = model(latents, STEP, text, image).sample
    result = lean(model, latents, [text], image, STEP, 60)[0]
    assert result.dtype == dtype
    if DIFFUSERS_0_36:  # one unit in the last place of a bf16 is up to 2**-7 of the value
        assert relative(result, expected) <= 2**-7
    else:
        assert torch.equal(result, expected)


def test_half_precision_in_chunks_is_within_its_rounding() -> None:
    model = as_loaded(tiny_transformer(image_dim=14), torch.bfloat16)
    latents, text, image = inputs(model, (3, 8, 10), torch.bfloat16)
    expected = model(latents, STEP, text, image).sample
    # A bf16 has 8 significant bits: one unit in the last place is up to 2**-7 of the value.
    assert relative(lean(model, latents, [text], image, STEP, 7)[0], expected) <= 2**-7


def test_two_branches_are_two_passes() -> None:
    model = tiny_transformer(image_dim=14)
    latents, text, image = inputs(model, (3, 8, 10), torch.float32)
    other = inputs(model, (1, 2, 2), torch.float32, seed=9)[1]
    given = latents.clone()
    both = lean(model, latents, [text, other], image, STEP, 7)
    assert torch.equal(both[0], lean(model, latents, [text], image, STEP, 7)[0])
    assert torch.equal(both[1], lean(model, latents, [other], image, STEP, 7)[0])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(latents, given)


def test_branches_share_the_image_keys_and_values() -> None:
    model = tiny_transformer(image_dim=14)
    _, text, image = inputs(model, (1, 2, 2), torch.float32)
    context = forward.prepare_context(model, text, image)
    attn2 = model.blocks[0].attn2
    first = forward.cross_kv(attn2, context)
    second = forward.cross_kv(attn2, forward.prepare_context(model, text + 1, image), first)
    assert second.k_img is first.k_img
    assert second.v_img is first.v_img
    assert not torch.equal(second.k, first.k)


@pytest.mark.parametrize("image_dim", [None, 14])
def test_a_block_runs_without_the_weights_of_its_cross_kv(image_dim: int | None) -> None:
    model = tiny_transformer(image_dim=image_dim)
    latents, text, image = inputs(model, (3, 4, 6), torch.float32)
    expected = model(latents, STEP, text, image).sample
    context = forward.prepare_context(model, text, image)
    shell = skeleton(type(model), model.config).blocks[0]
    branch = []
    for block in model.blocks:
        weights = {n: t for n, t in block.state_dict().items() if is_cross_kv(n)}
        with bound(shell, weights):
            branch.append(forward.cross_kv(shell.attn2, context))
    result = forward.denoise_forward(
        model,
        _visits(shell, model),
        latents,
        [branch],
        forward.step_modulation(model, STEP, torch.float32)[0],
        forward.rope_tables(model, (3, 4, 6), latents.device),
        18,
    )
    assert torch.equal(result[0], expected)


def _visits(shell: Any, model: Any) -> Any:
    for index, block in enumerate(model.blocks):
        weights = {n: t for n, t in block.state_dict().items() if not is_cross_kv(n)}
        with bound(shell, weights):
            yield index, shell


def test_cross_kv_names_are_whole_modules() -> None:
    block = tiny_transformer(image_dim=14).blocks[0]
    chosen = [name for name in block.state_dict() if is_cross_kv(name)]
    assert len(chosen) == 4 * 2 + 2
    assert is_cross_kv("attn2.to_k.weight_scale")
    assert not is_cross_kv("attn1.to_k.weight")
    assert not is_cross_kv("attn2.to_out.0.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_modulation_is_that_of_diffusers(dtype: torch.dtype) -> None:
    model = as_loaded(tiny_transformer(freq_dim=32), dtype)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler.set_timesteps(8)
    text = torch.zeros(1, 512, TINY["text_dim"], dtype=dtype)
    for timesteps in (scheduler.timesteps, torch.linspace(1000, 3.7, 8)):
        steps = forward.step_modulation(model, timesteps, dtype)
        assert len(steps) == 8
        for timestep, step in zip(timesteps, steps, strict=True):
            temb, projection, _, _ = model.condition_embedder(timestep.expand(1), text)
            assert torch.equal(step.temb, temb)
            assert torch.equal(step.projection, projection.unflatten(1, (6, -1)))
            assert step.temb.dtype == dtype


def test_rope_tables_hold_each_angle_once() -> None:
    model = tiny_transformer(attention_head_dim=20, patch_size=(1, 2, 2))
    cos, sin = model.rope(torch.zeros(1, 1, 3, 4, 6))
    rope = forward.rope_tables(model, (3, 4, 6), torch.device("cpu"))
    assert torch.equal(rope.cos.repeat_interleave(2, dim=-1), cos)
    assert torch.equal(rope.sin.repeat_interleave(2, dim=-1), sin)


def test_rope_tables_of_a_skeleton_are_real() -> None:
    model = skeleton(type(tiny_transformer()), TINY)
    rope = forward.rope_tables(model, (2, 4, 4), torch.device("cpu"))
    assert torch.isfinite(rope.cos).all()


def test_embed_and_head_take_only_their_own_weights() -> None:
    model = tiny_transformer()
    shell = skeleton(type(model), model.config)
    names = ("patch_embedding.", "proj_out.", "scale_shift_table")
    bind(shell, {n: t for n, t in model.state_dict().items() if n.startswith(names)})
    latents, _, _ = inputs(model, (2, 4, 6), torch.float32)
    temb = torch.randn(1, 24)
    hidden = forward.embed(shell, latents)
    assert hidden.shape == (1, 12, 24)
    assert hidden.is_contiguous()
    result = forward.head(shell, hidden, temb, (2, 4, 6), 5)
    assert torch.allclose(result, forward.head(model, hidden, temb, (2, 4, 6), 12), atol=1e-6)
    assert result.shape == (1, 4, 2, 4, 6)


def test_two_pictures_meet_their_places() -> None:
    """The two rows that diffusers takes are one after the other here."""
    model = tiny_transformer(image_dim=14, pos_embed_seq_len=10)
    torch.nn.init.normal_(model.condition_embedder.image_embedder.pos_embed)
    _, text, _ = inputs(model, (1, 2, 2), torch.float32)
    seen = torch.randn(2, 5, 14)
    found = forward.prepare_context(model, text, torch.cat([seen[:1], seen[1:]], dim=1)).image
    assert found is not None and found.shape == (1, 10, 24)
    assert torch.equal(found, model.condition_embedder.image_embedder(seen))


@pytest.mark.parametrize("tokens", [511, 513])
def test_text_of_another_length_is_refused(tokens: int) -> None:
    model = tiny_transformer()
    with pytest.raises(UsageError, match=f"expected 512 tokens, found {tokens}"):
        forward.prepare_context(model, torch.zeros(1, tokens, 10), None)


def test_image_and_model_must_agree() -> None:
    text = torch.zeros(1, 512, 10)
    with pytest.raises(UsageError, match="expected image states, found none"):
        forward.prepare_context(tiny_transformer(image_dim=14), text, None)
    with pytest.raises(UsageError, match="expected no image states"):
        forward.prepare_context(tiny_transformer(), text, torch.zeros(1, 5, 14))
