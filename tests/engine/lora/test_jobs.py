"""Jobs with LoRAs: remembered, checked by content, and continued to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.engine.engine import Engine
from penstock.engine.files.locate import locate
from penstock.engine.lora.file import Lora
from penstock.engine.packs.pack import pack
from penstock.engine.request.generation import DISTILLED, GenerationRequest
from penstock.engine.run.jobs import opening_of
from penstock.engine.store.journal import read_record
from penstock.errors import FingerprintMismatch, JobCancelled, JournalError
from tests.engine import lora_files as made
from tests.engine.run.test_resume import run_until, steps_done


@pytest.fixture(scope="module")
def lora(t2v_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = locate(t2v_folder).streamed
    modules = made.linears(source, outside=False)
    path = tmp_path_factory.mktemp("loras") / "distilled.safetensors"
    return made.write_kohya(path, made.pairs(source, modules))


def _open(folder: Path, loras: list[Any]) -> Engine:
    return Engine.open(folder, loras=loras, device="cpu", vram="200MiB", ram="200MiB")


def _request() -> GenerationRequest:
    return GenerationRequest(
        prompt="a cat", negative_prompt="", width=48, height=32, frames=5, seed=3, **DISTILLED
    )


def _stopped(folder: Path, lora: Path, job: Path) -> None:
    with _open(folder, [f"{lora}:0.5"]) as engine:
        running = engine.submit(_request(), job_dir=job)
        run_until(running, lambda event: steps_done([event]) == [2])
        with pytest.raises(JobCancelled):
            running.result()


def test_a_distilled_job_with_a_lora_is_continued_bit_for_bit(
    t2v_folder: Path, lora: Path, tmp_path: Path
) -> None:
    with _open(t2v_folder, [Lora(lora, 0.5)]) as engine:
        whole = engine.submit(_request()).result().latents
    _stopped(t2v_folder, lora, tmp_path / "job")
    opening = opening_of(tmp_path / "job")
    assert opening.loras == (Lora(lora, 0.5),)
    with Engine.reopen(opening) as engine:
        found = engine.resume(tmp_path / "job").result().latents
    assert whole is not None and found is not None
    assert torch.equal(found, whole)


def test_other_loras_are_refused_on_resume(t2v_folder: Path, lora: Path, tmp_path: Path) -> None:
    _stopped(t2v_folder, lora, tmp_path / "job")
    assert read_record(tmp_path / "job").request["loras"] == [[str(lora), 0.5]]
    changed = tmp_path / "changed.safetensors"
    tensors = load_file(lora)
    name = next(key for key in tensors if "lora_up" in key)
    save_file(tensors | {name: tensors[name] + 1}, changed)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    for given, field in (
        ([], "lora/0"),
        ([Lora(lora, 0.6)], "strength"),
        ([Lora(changed, 0.5)], "lora/0/0.sha256"),
        ([Lora(lora, 0.5), Lora(lora, 0.5)], "lora/1/0"),
    ):
        with _open(t2v_folder, given) as engine, pytest.raises(FingerprintMismatch, match=field):
            engine.resume(tmp_path / "job")
    with _open(t2v_folder, [Lora(moved, 0.5)]) as engine:
        assert engine.resume(tmp_path / "job").result().latents is not None


def test_a_damaged_record_of_loras_is_said_to_be(
    t2v_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.engine.run import jobs

    _stopped(t2v_folder, lora, tmp_path / "job")
    record = read_record(tmp_path / "job")
    record.request["loras"] = [["a", "strong"]]
    monkeypatch.setattr(jobs, "read_record", lambda folder: record)
    with pytest.raises(JournalError, match="names no LoRAs"):
        opening_of(tmp_path / "job")


def test_a_lora_lies_beside_a_pack_that_is_made_on_first_use(
    t2v_folder: Path, lora: Path, tmp_path: Path
) -> None:
    """The pack is the model's own: the same as one that was made without the LoRA."""
    pack(locate(t2v_folder), "int8", tmp_path / "packed")
    with _open(tmp_path / "packed", [Lora(lora, 0.5)]) as engine:
        expected = engine.submit(_request()).result().latents
    options: dict[str, Any] = {"device": "cpu", "vram": "200MiB", "ram": "200MiB"}
    with Engine.open(
        t2v_folder, loras=[Lora(lora, 0.5)], format="int8", cache=tmp_path / "cache", **options
    ) as engine:
        plan = engine.plan(_request())
        assert plan.weight_format == "int8"
        assert dict(plan["denoise"].work)["lora"] > 0
        found = engine.submit(_request()).result().latents
    assert found is not None and expected is not None
    assert torch.equal(found, expected)
