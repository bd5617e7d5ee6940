"""What determines a result is compared field by field."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from penstock.engine.machine import programs
from penstock.engine.run.fingerprint import (
    check_fingerprint,
    compare_fingerprint,
    fingerprint,
)
from penstock.engine.store.digest import SAMPLE_BYTES, SAMPLES, stamp
from penstock.engine.store.sealed import open_json, seal_json
from penstock.errors import FingerprintMismatch, StorageError


def taken(tmp_path: Path, **numerics: object) -> dict[str, object]:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    return fingerprint(
        torch.device("cpu"), {"chunk": 64} | numerics, [("a", tmp_path / "a.safetensors")]
    )


def test_the_same_conditions_give_the_same_fingerprint_also_through_json(tmp_path: Path) -> None:
    first = taken(tmp_path, tiles=(1, 2))
    assert compare_fingerprint(open_json(seal_json(first)), taken(tmp_path, tiles=(1, 2))) == []


def test_each_difference_is_named_and_refused(tmp_path: Path) -> None:
    then = taken(tmp_path)
    now = taken(tmp_path, chunk=32, backend="x")
    now["versions"] = {**then["versions"], "torch": "0.1"}  # type: ignore[dict-item]
    with pytest.raises(FingerprintMismatch) as caught:
        check_fingerprint(then, now, allow_nonidentical=False)
    fields = [field for field, _, _ in caught.value.differences]
    assert fields == ["numerics.backend", "numerics.chunk", "versions.torch"]
    text = str(caught.value)
    assert "numerics.chunk 64" in text and "numerics.chunk 32" in text
    assert "--allow-nonidentical" in text
    assert len(check_fingerprint(then, now, allow_nonidentical=True)) == 3


def test_a_changed_thread_count_is_a_difference(tmp_path: Path) -> None:
    then, threads = taken(tmp_path), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert [d[0] for d in compare_fingerprint(then, taken(tmp_path))] == ["numerics.threads"]
    finally:
        torch.set_num_threads(threads)


def test_a_switched_off_attention_kernel_is_a_difference(tmp_path: Path) -> None:
    then = taken(tmp_path)
    with sdpa_kernel(SDPBackend.MATH):
        found = compare_fingerprint(then, taken(tmp_path))
    assert [d[0] for d in found] == ["numerics.attention_kernels"]
    assert found[0][2] == ["math"]


def test_a_switch_that_does_not_tell_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    numerics = taken(tmp_path)["numerics"]
    assert numerics["matmul_precision"] == "older and newer settings mixed"  # type: ignore[index]


def test_a_gpus_driver_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def smi(*command: str) -> str:
        calls.append(command)
        return "580.159.04\n"

    properties = SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(programs, "output", smi)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    found = fingerprint(torch.device("cuda:1"), {}, [])
    assert found["device"]["driver"] == "580.159.04"
    assert "--id=GPU-1234-abcd" in calls[0] and "--query-gpu=driver_version" in calls[0]
    del properties.uuid  # an older torch
    fingerprint(torch.device("cuda:1"), {}, [])
    assert "--id=1" in calls[1]
    monkeypatch.setattr(programs, "output", lambda *command: "")
    assert fingerprint(torch.device("cuda:1"), {}, [])["device"]["driver"] is None


def test_a_field_of_none_is_not_a_missing_field() -> None:
    assert compare_fingerprint({"a": None}, {}) == [("a", None, None)]


def test_files_are_known_by_content_not_by_date(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"one")
    first = stamp(path)
    path.write_bytes(b"one")
    assert stamp(path) == first
    path.write_bytes(b"two")
    assert stamp(path) != first
    with pytest.raises(StorageError, match="nowhere"):
        stamp(tmp_path / "nowhere")


def test_large_files_are_sampled_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "large"
    blob = bytearray(SAMPLES * SAMPLE_BYTES + 1_000_000)
    path.write_bytes(blob)
    first = stamp(path)
    assert "samples_sha256" in first and first["bytes"] == len(blob)
    for at in (0, SAMPLE_BYTES - 1, len(blob) // 2 // SAMPLE_BYTES * SAMPLE_BYTES, len(blob) - 1):
        changed = bytearray(blob)
        changed[at] = 1
        path.write_bytes(changed)
        assert stamp(path) != first, at
    path.write_bytes(blob + b"\0")
    assert stamp(path) != first
