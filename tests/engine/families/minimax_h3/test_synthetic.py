"""A random MiniMax-H3 made on the spot and measured: its legal frames, its passes, no guidance."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.engine.bench.order import BenchOrder, run
from penstock.engine.families.minimax_h3 import synthetic
from penstock.engine.families.minimax_h3.config import TRANSFORMER
from penstock.profiles.options import Options
from tests.engine.families.minimax_h3 import makers
from tests.engine.families.minimax_h3.test_pruned import WIDER


@pytest.mark.parametrize("changed", [{}, {"time_table_size": 9, "adaln_rank": 4}])
def test_steps_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, int]
) -> None:
    config = {**TRANSFORMER, **makers.TRANSFORMER, **WIDER, **changed}
    small = {"small": synthetic._H3(synthetic.TRANSFORMER, config)}
    monkeypatch.setattr(synthetic, "SYNTHETIC", small)
    order = BenchOrder(
        synthetic="small", blocks=2, width=64, height=32, steps=2, warmup=1, folder=tmp_path,
        options=Options(device="cpu", vram="1GiB", ram="1GiB"),
    )  # fmt: skip
    result = run(order, lambda event: None, lambda line: None)
    assert (result.recipe.frames, result.recipe.steps, result.recipe.branches) == (124, 2, 1)
    assert (len(result.warmup), len(result.steps)) == (1, 2)
    assert [phase.name for phase in result.phases] == ["context", "denoise"]
    assert list(tmp_path.iterdir()) == []
