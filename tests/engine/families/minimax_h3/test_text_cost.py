"""What the text encoder is planned to take against what it takes, at the true shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.families.minimax_h3.builtin import BUILTIN
from penstock.engine.families.minimax_h3.terms import H3Case
from penstock.engine.families.minimax_h3.text import config as configs
from penstock.engine.families.minimax_h3.text import cost, modules
from penstock.engine.families.minimax_h3.text.language import (
    embed,
    encode_layers,
    positions,
    present,
    rope,
)
from penstock.engine.families.minimax_h3.text.spec import (
    TextSpec,
    language_spec,
    true_text,
    vision_spec,
)
from penstock.engine.families.minimax_h3.text.tower import see
from penstock.engine.family.layers import NetworkConfig
from penstock.profiles.cards import described
from penstock.profiles.manifest import Storage, VideoShape, Weights
from penstock.profiles.phases import Case, Noise, Workload
from penstock.profiles.policy import Limits, Policy
from penstock.units import GIB
from tests.meter import StorageMeter

TYPES = {2: torch.bfloat16, 4: torch.float32}
NOTHING = Weights(0, (), 2), Storage()


def filled(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """Its weights, made now."""
    for owner in module.modules():
        for name, each in owner._parameters.items():
            if each is not None:
                made = torch.empty(each.shape, dtype=dtype)
                owner._parameters[name] = nn.Parameter(made, requires_grad=False)
    return list(module.parameters())


def measured_text(words: dict[str, Any], grids: Any, prompt: int, item: int, mergers: int) -> Any:
    dtype = TYPES[item]
    with FakeTensorMode(), torch.inference_mode():
        config = NetworkConfig({}, words | {"num_hidden_layers": 2})
        layers = modules.Qwen3VLTextModel(config).layers
        shown = present(range(prompt), [[1]] * len(grids), grids, (1, 2, 3))
        places, width = shown.seen(), words["hidden_size"]
        merged = torch.empty(len(places), width, dtype=dtype)
        with StorageMeter([*filled(layers, dtype), merged]) as meter:
            features = [torch.zeros_like(merged) for _ in range(mergers if grids else 0)]
            read = lambda rows: torch.zeros(len(rows), width, dtype=dtype)  # noqa: E731
            hidden = embed(shown, read, dtype=dtype)
            if places:
                hidden[0, torch.tensor(places)] = merged
            waves = rope(positions(shown), words, dtype)
            encode_layers(enumerate(layers), hidden, waves, places, features)
    return meter.peak, len(shown.ids), len(places)


def measured_vision(tower: dict[str, Any], grids: Any, item: int) -> int:
    dtype, deep = TYPES[item], list(range(len(tower["deepstack_visual_indexes"])))
    shallow = tower | {"depth": len(deep) + 1, "deepstack_visual_indexes": deep}
    with FakeTensorMode(), torch.inference_mode():
        module = modules.Qwen3VLVisionModel(NetworkConfig({}, shallow))
        values = tower["in_channels"] * tower["temporal_patch_size"] * tower["patch_size"] ** 2
        with StorageMeter(filled(module, dtype)) as meter:
            given_ = [(torch.empty(h * w, values, dtype=dtype), (h, w)) for h, w in grids]
            see(module, enumerate(module.blocks), given_)
    return meter.peak


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("grids", [(), ((48, 84),), ((48, 84), (48, 84))])
def test_text_at_the_true_shape(item: int, grids: Any) -> None:
    words, spec = dict(configs.LANGUAGE), true_text()
    found, count, seen = measured_text(words, grids, 512, item, 3)
    planned = cost.text_bytes(spec, count, seen, item)
    assert found <= planned <= 1.05 * found


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("grids", [((48, 84),), ((48, 84), (48, 84))])
def test_vision_at_the_true_shape(item: int, grids: Any) -> None:
    spec = true_text().vision
    assert spec is not None
    found = measured_vision(dict(configs.VISION), grids, item)
    planned = cost.vision_bytes(spec, tuple(h * w for h, w in grids), item)
    assert found <= planned <= 1.05 * found


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([8, 16]), st.integers(0, 2), st.integers(1, 30), st.sampled_from([2, 4]),
)  # fmt: skip
def test_text_is_never_under(
    width: int, inner: int, groups: int, keys: int, head: int, pictures: int, prompt: int, item: int
) -> None:
    words = dict(configs.LANGUAGE) | {
        "hidden_size": width, "intermediate_size": inner, "num_attention_heads": groups * keys,
        "num_key_value_heads": keys, "head_dim": head,
        "mrope_section": [head // 4, head // 8, head // 8],
    }  # fmt: skip
    tower = {"vision_config": {"deepstack_visual_indexes": [0, 1]}, "text_config": words}
    spec = language_spec(tower, *NOTHING, vision_spec(tower, *NOTHING))
    found, count, seen = measured_text(words, ((4, 2),) * pictures, prompt, item, 2)
    assert found <= cost.text_bytes(spec, count, seen, item)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 60), st.integers(1, 50),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=2),
    st.sampled_from([2, 4]),
)  # fmt: skip
def test_vision_is_never_under(
    heads: int, quarter: int, inner: int, out: int, grids: Any, item: int
) -> None:
    tower = dict(configs.VISION) | {
        "hidden_size": 4 * quarter * heads, "num_heads": heads, "intermediate_size": inner,
        "out_hidden_size": out, "patch_size": 2, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    spec = vision_spec({"vision_config": tower}, *NOTHING)
    sizes = [(2 * h, 2 * w) for h, w in grids]
    found = measured_vision(tower, sizes, item)
    assert found <= cost.vision_bytes(spec, tuple(h * w for h, w in sizes), item)


def test_the_encoder_without_files_is_as_large_as_the_published_one() -> None:
    spec: TextSpec = true_text()
    assert sum(spec.weights.block_bytes) == pytest.approx(48.76e9, rel=1e-3)
    assert spec.vision is not None
    assert spec.vision.weights.total_bytes == pytest.approx(1.19e9, rel=1e-2)
    eight = true_text("int8")
    assert sum(eight.weights.block_bytes) < 0.51 * sum(spec.weights.block_bytes)
    # Two slots of a ring and the activations of a prompt with two pictures
    taken = 2 * spec.weights.block_bytes[0] + cost.text_bytes(spec, 2600, 2016)
    assert taken < 3 * GIB


def case_of(weight_format: str, pictures: int) -> H3Case:
    """1344x768, 124 frames, on a card of 8 GB."""
    card = described("rtx 4060", "16 GB", None)
    shape = VideoShape(1344, 768, 124)
    work = Workload(shape, 50, guided=False, pictures=pictures, noise=Noise("euler"))
    manifest = BUILTIN["minimax-h3"](weight_format)
    return Case(manifest, work, card.rates, Policy(), "cuda", card.fused_norms)


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
@pytest.mark.parametrize("pictures", [0, 2])
def test_the_phases_fit_three_gib_of_vram_and_four_of_ram(
    weight_format: str, pictures: int
) -> None:
    limits = Limits(3 * GIB, 4 * GIB, None)
    case = case_of(weight_format, pictures)
    steps = list(cost.steps(case))
    assert [step.phases for step in steps] == [("vision",), ("text",)][not pictures :]
    for step in steps:
        found = step.best(limits)
        assert found is not None
        (phase,) = found
        assert phase.vram_bytes <= 3 * GIB and phase.ram_bytes <= 4 * GIB
    # 50 layers, each once, and neither embedding, head nor the other 14
    assert phase.read_bytes == sum(case.manifest.text.weights.block_bytes)
