"""Who tells the encoder which frames of its clip are equal: a job of its picture, and the VAE of an
attached pipeline of any clip that it is given."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.engine.engine import Engine
from penstock.engine.families.wan import work
from penstock.engine.families.wan.attach.vae_part import _changes
from penstock.engine.families.wan.cost.vae import encode_work
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.pipeline import run
from penstock.engine.run.stage import Run
from penstock.profiles.tiling import TileGrid


class Convolutions(TorchDispatchMode):
    """Counts them."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket == torch.ops.aten.convolution
        return func(*args, **(kwargs or {}))


def test_a_job_encodes_what_its_plan_counts(
    i2v_folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(
        prompt="a cat", negative_prompt="", image=picture, width=32, height=32, frames=33, steps=1,
        seed=3,
    )  # fmt: skip
    counter, encode = Convolutions(), work.encode_tiled

    def counted(*args, **kwargs):
        with counter:
            return encode(*args, **kwargs)

    monkeypatch.setattr(work, "encode_tiled", counted)
    with Engine.open(i2v_folder, device="cpu", vram="1GiB", ram="1GiB") as engine:
        plan = engine.plan(request)
        job = Run(
            model=engine.model, request=request, plan=plan, device=torch.device("cpu"),
            overlapped=False, output=None, overwrite=False, metadata=False,
        )  # fmt: skip
        run(job, lambda event: None, threading.Event())
        args = engine.model.manifest.vae, (9, 4, 4), TileGrid(*plan["encode"].tiles)
    assert counter.calls == encode_work(*args, changes=(0, 1)).calls
    assert counter.calls < 0.7 * encode_work(*args).calls


def test_frames_that_change_are_found_bit_by_bit() -> None:
    clip = torch.zeros(3, 7, 4, 2)
    clip[:, 0] = 0.5
    clip[1, 3, 3, 1] = -0.0
    clip[:, 5:] = torch.nan
    assert _changes(clip) == [0, 1, 3, 4, 5]
    assert _changes(clip.bfloat16()) == [0, 1, 3, 4, 5]
    assert _changes(clip[:, :1].contiguous()) == [0]
