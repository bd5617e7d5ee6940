"""The ceiling on torch's CUDA allocator, with an imitation of the device."""

from __future__ import annotations

import types

import pytest
import torch

from penstock.offload.allocator import allocator_capped


@pytest.mark.parametrize(("device", "index"), [("cuda", 1), ("cuda:0", 0)])
def test_the_share_is_that_of_the_budget_and_is_given_back(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def set_share(share: float, where: int) -> None:
        assert where == index  # torch refuses a device that names none
        shares.append(share)

    properties = types.SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_share)
    with allocator_capped(torch.device(device), 12 << 30):
        assert shares == [0.5]
    with pytest.raises(KeyError), allocator_capped(torch.device(device), 99 << 30):
        raise KeyError
    assert shares == [0.5, 1.0, 1.0, 1.0]


def test_on_a_cpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "set_per_process_memory_fraction")
    with allocator_capped(torch.device("cpu"), 1):
        pass
