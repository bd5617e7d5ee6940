from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from penstock.engine.families.wan.cost.encoders import (
    image_bytes,
    image_flops,
    text_bytes,
    text_flops,
)
from penstock.engine.families.wan.spec import ImageSpec, TextSpec
from penstock.engine.families.wan.structure import layers_needed
from penstock.profiles.manifest import Weights
from penstock.units import GIB
from tests.engine.families.wan.cost.fake_encoders import (
    default_type,
    image_modules,
    measured_image_bytes,
    measured_text_bytes,
    run_image,
    run_text,
    text_modules,
    weights,
)

BF16 = Weights(0, (), 2)
UMT5_XXL = TextSpec(BF16, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
VIT_H = ImageSpec(
    BF16, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
    image_size=224, patch_size=14,
)  # fmt: skip


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("length", [9, 512])
def test_text_prediction_at_the_true_shape(itemsize, prompts, length):
    measured = measured_text_bytes(UMT5_XXL, itemsize, 512, prompts, length)
    predicted = text_bytes(UMT5_XXL, 512, prompts, itemsize)
    assert measured <= predicted <= 1.05 * measured


@pytest.mark.parametrize("itemsize", [2, 4])
def test_image_prediction_at_the_true_shape(itemsize):
    measured = measured_image_bytes(VIT_H, itemsize)
    predicted = image_bytes(VIT_H, itemsize)
    assert measured <= predicted <= 1.05 * measured


text_specs = st.builds(
    TextSpec,
    st.just(BF16),
    d_model=st.integers(1, 80),
    d_kv=st.integers(1, 40),
    d_ff=st.integers(1, 160),
    num_layers=st.just(2),
    num_heads=st.integers(1, 9),
)


@settings(max_examples=60, deadline=None)
@given(
    text_specs,
    st.sampled_from([2, 4]),
    st.integers(2, 64),
    st.integers(1, 3),
    st.floats(0.01, 1),
)
def test_text_prediction_is_never_under(spec, itemsize, tokens, prompts, share):
    length = max(1, round(tokens * share))
    measured = measured_text_bytes(spec, itemsize, tokens, prompts, length, nullcontext)
    assert measured <= text_bytes(spec, tokens, prompts, itemsize)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(2, 12),
    st.sampled_from([2, 4]),
)
def test_image_prediction_is_never_under(head, heads, inner, grid, patch, itemsize):
    spec = ImageSpec(BF16, head * heads, inner, 3, heads, grid * patch, patch)
    assert measured_image_bytes(spec, itemsize, nullcontext) <= image_bytes(spec, itemsize)


def test_the_itemsize_is_the_weights_unless_given():
    assert (
        text_bytes(UMT5_XXL) == text_bytes(UMT5_XXL, itemsize=2) < text_bytes(UMT5_XXL, itemsize=4)
    )
    assert image_bytes(VIT_H) == image_bytes(VIT_H, 2) < image_bytes(VIT_H, 4)


def test_each_encoder_fits_in_one_and_a_half_gib_with_a_bf16_block():
    text_block = 2 * (
        UMT5_XXL.d_model * (4 * UMT5_XXL.num_heads * UMT5_XXL.d_kv + 3 * UMT5_XXL.d_ff)
        + 2 * UMT5_XXL.d_model
        + 32 * UMT5_XXL.num_heads
    )
    with FakeTensorMode(), default_type(2):
        blocks, _ = text_modules(UMT5_XXL, 1)
        embeddings, norm, layers = image_modules(VIT_H, 1)
        assert text_block == sum(weight.nbytes for weight in weights(*blocks))
        image_block = sum(weight.nbytes for weight in weights(*layers))
        image_rest = sum(weight.nbytes for weight in weights(embeddings, norm))
    assert measured_text_bytes(UMT5_XXL, 2, 512, 2, 100) + text_block < 1.5 * GIB
    assert text_bytes(UMT5_XXL) + text_block < 1.5 * GIB
    # and so do the three slots of a ring
    assert text_bytes(UMT5_XXL) + 3 * text_block < 1.5 * GIB
    assert image_bytes(VIT_H) + image_rest + 3 * image_block < 1.5 * GIB


def counted_flops(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_text_flops_are_those_counted():
    spec = TextSpec(BF16, d_model=48, d_kv=12, d_ff=96, num_layers=3, num_heads=4)
    with FakeTensorMode(), torch.inference_mode():
        blocks, norm = text_modules(spec, 3)
        rows = torch.empty(64, 48)
        counted = counted_flops(lambda: run_text(spec, blocks, norm, rows, 32, 2, 7))
    assert counted == text_flops(spec, 32, 2)


def test_image_flops_are_those_counted():
    spec = ImageSpec(BF16, 40, 80, 4, 4, 32, 8)
    with FakeTensorMode(), torch.inference_mode():
        modules = image_modules(spec, layers_needed(4))
        counted = counted_flops(lambda: run_image(spec, *modules))
    assert counted == image_flops(spec)
