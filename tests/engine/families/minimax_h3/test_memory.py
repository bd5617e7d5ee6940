"""What a forward takes at the true shapes: measured on fake tensors, and as plans say it."""

from __future__ import annotations

import pytest

from benchmarks.fake_h3 import diffusers_bytes, layout_of, lean_bytes
from penstock.engine.families.minimax_h3.config import TRANSFORMER
from penstock.engine.families.minimax_h3.cost import PackedCase, denoise_items
from penstock.engine.families.minimax_h3.spec import PackedSpec
from penstock.profiles.manifest import Weights

CHUNK = 2048


def _spec(layers: int) -> PackedSpec:
    known = {name: each for name, each in TRANSFORMER.items() if name in PackedSpec.__annotations__}
    return PackedSpec(Weights(0, (0,) * layers, 2), 0, (), **(known | {"num_layers": layers}))


@pytest.mark.parametrize(
    "name",
    [
        "1344x768x124",
        pytest.param("1344x768x124, two pictures", marks=pytest.mark.faults),
        pytest.param("864x480x124", marks=pytest.mark.faults),
    ],
)
def test_a_forward_is_lean_and_what_its_plan_says(name: str) -> None:
    layout = layout_of(name)
    ours = lean_bytes(layout, CHUNK, blocks=1)
    assert ours.nbytes <= 0.30 * diffusers_bytes(layout, blocks=1).nbytes
    case = PackedCase(layout.latents, len(layout.tags), len(layout.anchors), CHUNK)
    planned = sum(count for _, count in denoise_items(_spec(1), case))
    measured = ours.nbytes + ours.given
    assert measured <= planned <= 1.05 * measured


@pytest.mark.faults
def test_whole_chunks_are_what_their_plan_says() -> None:
    layout = layout_of("864x480x124")
    ours = lean_bytes(layout, layout.rows, blocks=1)
    case = PackedCase(layout.latents, len(layout.tags), 0, layout.rows)
    planned = sum(count for _, count in denoise_items(_spec(1), case))
    measured = ours.nbytes + ours.given
    assert measured <= planned <= 1.05 * measured
