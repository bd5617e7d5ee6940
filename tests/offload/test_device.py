"""Which GPU is meant, with an imitation of torch's current device."""

from __future__ import annotations

import pytest
import torch

from penstock.offload.device import indexed, made_current


def test_a_gpu_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert indexed(torch.device("cuda")) == torch.device("cuda", 1)
    assert indexed(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert indexed(torch.device("cpu")) == torch.device("cpu")


def test_a_cpu_is_always_current() -> None:
    with made_current(torch.device("cpu")):
        assert torch.empty(1).device == torch.device("cpu")
