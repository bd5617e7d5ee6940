"""The activations of LoRAs, predicted and measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_dit import fake_inputs, fake_transformer
from penstock.engine.families.wan.cost import transformer as cost
from penstock.profiles.manifest import LoraSpec
from penstock.quant.delta import Delta
from penstock.quant.lora import LoraLinear, add_deltas
from penstock.quant.paths import Computing, Scratch
from tests.engine.families.wan.cost.test_transformer import SHAPES, measure, predicted, spec_of
from tests.tiny_transformer import inputs, tiny_transformer


def _with_loras(model: Any, ranks: tuple[int, ...], dtype: torch.dtype) -> Any:
    """``model`` with a pair of each rank beside every linear layer, on real memory."""
    bases = {
        name: dict(layer.named_parameters())
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    deltas = tuple(Delta(index, rank, 0.5) for index, rank in enumerate(ranks))
    computing = Computing(Scratch(0, "cpu"))
    add_deltas(model, dict.fromkeys(bases, deltas), computing, dtype)
    for name, base in bases.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLinear)
        for leaf, parameter in base.items():
            layer._buffers[leaf] = parameter.data
        for delta in deltas:
            for full, shape in delta.tensors((layer.out_features, layer.in_features)).items():
                owner, _, leaf = full.rpartition(".")
                layer.get_submodule(owner)._buffers[leaf] = torch.randn(shape).to(dtype)
    return model


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, 20]),
    st.sampled_from([(1,), (16, 4), (300,)]),
)
def test_never_under_what_is_measured(
    data: st.DataObject, dtype: torch.dtype, image_dim: int | None, ranks: tuple[int, ...]
) -> None:
    model = tiny_transformer(
        image_dim=image_dim,
        num_attention_heads=data.draw(st.integers(1, 4)),
        attention_head_dim=data.draw(st.sampled_from([12, 34])),
        ffn_dim=data.draw(st.sampled_from([8, 200])),
        dtype=dtype,
    )
    frames, high, wide = (data.draw(st.integers(1, 4)) for _ in range(3))
    branches = data.draw(st.integers(1, 2))
    case = cost.DenoiseCase(
        latent=(frames, 2 * high, 2 * wide),
        chunk_tokens=data.draw(st.integers(1, frames * high * wide)),
        branches=branches,
        visit_branches=data.draw(st.integers(1, branches)),
        steps=2,
        image_tokens=0 if image_dim is None else data.draw(st.integers(1, 100)),
    )
    spec = dataclasses.replace(spec_of(model.config, dtype.itemsize), lora=LoraSpec(max(ranks)))
    given_inputs = inputs(model, case.latent, dtype, max(1, case.image_tokens))
    measured = measure(_with_loras(model, ranks, dtype), given_inputs, case)
    assert all(m <= p for m, p in zip(measured, predicted(spec, case), strict=True))


def test_without_their_share_the_prediction_would_be_too_low() -> None:
    model, rank = tiny_transformer(ffn_dim=8), 600
    case = cost.DenoiseCase((4, 8, 8), 64, 1, 1, 1, image_tokens=0)
    spec = dataclasses.replace(spec_of(model.config, 4), lora=LoraSpec(rank))
    given_inputs = inputs(model, case.latent, torch.float32)
    measured = measure(_with_loras(model, (rank,), torch.float32), given_inputs, case)
    without = predicted(dataclasses.replace(spec, lora=LoraSpec()), case)
    for bound, peak, lower in zip(predicted(spec, case), measured, without, strict=True):
        assert lower < peak <= bound


@pytest.mark.parametrize("rank", [32, 128])
def test_at_most_five_percent_over_at_the_real_shapes(rank: int) -> None:
    latent, _ = SHAPES["720x1280x81"]
    case = cost.DenoiseCase(latent, 2048, 1, 1, steps=4, image_tokens=257)
    with FakeTensorMode():
        model = fake_transformer(blocks=1)
        spec = dataclasses.replace(spec_of(model.config, 2), lora=LoraSpec(rank))
        model = _with_loras(model, (rank,), torch.bfloat16)
        measured = measure(model, fake_inputs(latent), case)
    for bound, peak in zip(predicted(spec, case), measured, strict=True):
        assert peak <= bound <= 1.05 * peak


def test_the_arithmetic_of_pairs_is_counted() -> None:
    spec = spec_of(tiny_transformer().config, 4)
    with_pairs = dataclasses.replace(spec, lora=LoraSpec(8, elements=1000))
    more = cost.denoise_flops(with_pairs, 10, 0).linear - cost.denoise_flops(spec, 10, 0).linear
    assert more == 2 * 10 * 1000
