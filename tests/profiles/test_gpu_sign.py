"""torch is asked for a GPU where the machine shows a sign of one, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.profiles import hardware
from penstock.profiles.gpu_sign import shows_gpu

LOADER = "etc/ld.so.cache"


def put(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_bare_machine_shows_none(tmp_path: Path) -> None:
    put(tmp_path / LOADER, b"libcudart.so.13\0/usr/local/cuda/lib/libcudart.so.13\0")
    for platform in ("linux", "darwin"):
        assert not shows_gpu(tmp_path, {"LD_LIBRARY_PATH": str(tmp_path)}, platform)
    assert not shows_gpu(tmp_path, {"SYSTEMROOT": str(tmp_path)}, "win32")


@pytest.mark.parametrize(
    "place",
    [
        "proc/driver/nvidia/version",
        "dev/nvidiactl",
        "dev/dxg",
        "usr/lib/wsl/lib/libcuda.so.1",
        "dev/kfd",
    ],
)
def test_what_drivers_leave_on_linux(tmp_path: Path, place: str) -> None:
    put(tmp_path / place)
    assert shows_gpu(tmp_path, {}, "linux")
    assert not shows_gpu(tmp_path, {}, "darwin")


def test_the_driver_library_wherever_the_loader_finds_it(tmp_path: Path) -> None:
    put(tmp_path / "jetson/libcuda.so.1")
    paths = f"{tmp_path / 'none'}::{tmp_path / 'jetson'}"
    assert not shows_gpu(tmp_path, {}, "linux")
    assert shows_gpu(tmp_path, {"LD_LIBRARY_PATH": paths}, "linux")
    put(tmp_path / LOADER, b"libc.so.6\0libcuda.so.1\0/usr/lib/libcuda.so.1\0")
    assert shows_gpu(tmp_path, {}, "linux")


@pytest.mark.parametrize("name", ["nvcuda.dll", "atiadlxx.dll"])
def test_windows_drivers(tmp_path: Path, name: str) -> None:
    put(tmp_path / "System32" / name)
    assert shows_gpu(tmp_path, {"SYSTEMROOT": str(tmp_path)}, "win32")


def test_torch_decides_where_there_is_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(hardware, "shows_gpu", lambda: True)
        assert hardware.default_device() == device
        monkeypatch.setattr(hardware, "shows_gpu", lambda: False)
        assert hardware.default_device() == "cpu"
