"""A stopped job is not continued on changed files, whichever it is, and says which."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine.files.locate import locate
from penstock.engine.lora.file import Lora
from penstock.engine.run.jobs import describe
from penstock.errors import FingerprintMismatch
from tests.engine import lora_files as made
from tests.engine.run.test_resume import a_request, an_engine, at_step, run_until


@pytest.fixture(autouse=True)
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small files are known by samples, as large ones are: of the first byte and the last."""
    monkeypatch.setattr("penstock.engine.store.digest.SAMPLES", 2)
    monkeypatch.setattr("penstock.engine.store.digest.SAMPLE_BYTES", 1)
    yield


def flip(path: Path) -> None:
    """One bit in the middle; the time of the last write is set back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        (byte,) = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_each_file_of_a_job_is_known_to_the_byte(
    i2v_folder: Path, picture: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(i2v_folder, tmp_path / "model"))
    source = locate(folder).streamed
    pairs = made.pairs(source, made.linears(source, outside=False))
    lora = made.write_diffusers(tmp_path / "l.safetensors", pairs)
    with an_engine(folder, loras=[Lora(lora)]) as engine:
        job = engine.submit(a_request(picture), tmp_path / "out.mp4", job_dir=tmp_path / "job")
        run_until(job, at_step(2))
        files = engine.model.files
        record = describe(tmp_path / "job").record
        assert record is not None
        known = record.fingerprint["files"]
        assert known.keys() == files.keys()
        assert all("xxh3_128" in entry for entry in known.values())
        assert {name.partition("/")[0] for name in files} == {
            "transformer", "text_encoder", "vae", "image_encoder", "tokenizer", "lora"
        }  # fmt: skip
        for name, path in files.items():
            flip(path)
            with pytest.raises(FingerprintMismatch) as caught:
                engine.resume(tmp_path / "job")
            assert {field for field, _, _ in caught.value.differences} == {f"files.{name}.xxh3_128"}
            assert str(path) in str(caught.value)
            flip(path)
        result = engine.resume(tmp_path / "job").result()
        whole = engine.submit(a_request(picture)).result()
    assert torch.equal(result.latents, whole.latents)
    assert any("those of the job's beginning" in told for told in result.report.notices)
