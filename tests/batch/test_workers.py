"""Which workers there are: devices, what their processes are told, memory shared out."""

from __future__ import annotations

import pytest

from penstock.errors import UsageError
from penstock.profiles.hardware import probe
from penstock.profiles.options import Options
from penstock.serve.cluster import connected
from penstock.serve.workers import Crowd, Device, devices_of, shared_out, threads_each


def test_devices_are_cards_or_the_cpu() -> None:
    assert devices_of("0, cuda:2") == [Device("cuda:0", 0), Device("cuda:2", 2)]
    assert devices_of("cpu,CPU") == [Device("cpu", None)] * 2


@pytest.mark.parametrize("text", ["", "0,0", "0,cuda:0", "cpu,0", "gpu", "-1", "0,,1"])
def test_no_list_of_devices(text: str) -> None:
    with pytest.raises(UsageError):
        devices_of(text)


def test_a_process_sees_its_card_alone() -> None:
    assert Device("cuda:1", 1).environment({}) == {"CUDA_VISIBLE_DEVICES": "1"}
    told = {"CUDA_VISIBLE_DEVICES": "5, GPU-7"}
    assert Device("cuda:1", 1).environment(told) == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    with pytest.raises(UsageError, match="no device 2"):
        Device("cuda:2", 2).environment(told)
    assert Device("cpu", None).environment(told) == {}


def test_memory_that_is_not_named_is_shared_out() -> None:
    alone = probe("cpu")
    given = shared_out(Options(ram="1GiB"), 4, "cpu")
    assert given.ram == "1GiB" and 0 < given.vram <= alone.vram_bytes // 3  # type: ignore[operator]
    assert shared_out(Options(), 1, "cpu") == Options()
    every = shared_out(Options(vram="1GiB"), 4, "cpu")
    assert every.vram == "1GiB" and 0 < every.ram <= alone.ram_bytes // 3  # type: ignore[operator]


def test_workers_have_names_threads_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    crowd = Crowd.of("cpu,cpu", None)
    with crowd.workers({"m": "m"}, Options()) as workers:
        assert [worker.name for worker in workers] == ["cpu 1", "cpu 2"]
        for worker in workers:
            assert worker._env == {"OMP_NUM_THREADS": str(threads_each(2))}  # type: ignore[attr-defined]
    with Crowd.of("0,1", None).workers({"m": "m"}, Options()) as workers:
        seen = [worker._env["CUDA_VISIBLE_DEVICES"] for worker in workers]  # type: ignore[attr-defined]
        assert seen == ["0", "1"]
    with Crowd.of(None, None).workers({"m": "m"}, Options()) as workers:
        assert len(workers) == 1
    assert crowd.shared_out(Options(vram=1, ram=1)).device == "cpu"
    assert Crowd.of("1", None).shared_out(Options(device="cpu")).device == "cpu", "it was said"
    assert Crowd().shared_out(Options()) == Options()
    with pytest.raises(UsageError, match="Ray finds"):
        Crowd.of("0", "local")


@pytest.mark.parametrize("address", ["somewhere", "ray://host:10001", "127.0.0.1:1", "host:99999"])
def test_an_address_without_a_cluster_is_refused_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="Ray cluster"):
        connected(address)
