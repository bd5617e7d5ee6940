"""Windows of a long video on fake tensors of the 14B model, one block standing for forty."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_dit import cross_kv_of_branches, fake_inputs, fake_transformer
from penstock.engine.families.wan import forward, work
from penstock.engine.families.wan.cost import transformer as cost
from penstock.engine.families.wan.windowed import Cut
from penstock.profiles.windows import Windows
from tests.engine.families.wan.cost.test_transformer import spec_of
from tests.meter import StorageMeter

WINDOWS = Windows(21, 4)


@pytest.mark.parametrize(
    ("whole", "chunk", "visit", "residual"),
    [
        ((61, 90, 160), 75_600, 8, "bf16"),
        ((61, 60, 104), 32_760, 8, "fp32"),
        ((41, 60, 104), 16_384, 1, "fp32"),
    ],
)
def test_of_a_step_in_windows(
    whole: tuple[int, int, int],
    chunk: int,
    visit: int,
    residual: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    window = (WINDOWS.length, *whole[1:])
    case = cost.DenoiseCase(
        window, chunk, 2, visit, steps=8, image_tokens=257, residual=residual,
        windows=len(WINDOWS.starts(whole[0])), frames=whole[0],
    )  # fmt: skip
    with FakeTensorMode(), torch.no_grad():
        model = fake_transformer(blocks=1)
        monkeypatch.setattr(work, "visits", lambda *_: enumerate(model.blocks))
        peak = peak_of(model, case)
    bound = cost.denoise_bytes(spec_of(model.config, 2), case).total_bytes
    assert peak <= bound <= 1.05 * peak


def peak_of(model: Any, case: cost.DenoiseCase) -> int:
    wide = torch.float32 if case.residual == "fp32" else torch.bfloat16
    _, text, image = fake_inputs(case.latent)
    with StorageMeter([*model.parameters(), *model.buffers(), text, image]) as meter:
        steps = forward.step_modulation(model, torch.arange(case.steps), torch.bfloat16, wide)
        kept = cross_kv_of_branches(model, text, image, case.branches)
        state = [torch.empty(1, 16, *case.whole) for _ in range(1 + cost.UNIPC_HISTORY)]
        condition = torch.empty(1, 20, *case.whole)
        rope = forward.rope_tables(model, case.latent, torch.device("cpu"))
        component: Any = SimpleNamespace(dtype=torch.bfloat16)
        cross: Any = SimpleNamespace(branch=lambda index: kept[index])
        nothing: Any = None
        made = work.Forward(
            model, component, nothing, cross, case.chunk_tokens, nothing, residual=wide
        )
        cut = Cut.of(WINDOWS, state[0], case.branches)
        total = case.windows * case.branches
        starts = range(0, total, case.visit_branches)
        passes = [range(at, min(at + case.visit_branches, total)) for at in starts]
        meter.peak = meter.live
        visit = partial(made.windows, modulation=steps[0], rope=rope)
        guided = partial(work._guided, scale=5.0)
        see = partial(work._window_input, state[0], condition, torch.bfloat16, False)
        cut.predict(state[0], see, passes, visit, guided)
    return meter.peak
