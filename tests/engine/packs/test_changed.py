"""Packs of weights that change, of folders that are somebody's, and of two who pack at once."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.engine import variants
from penstock.engine.files.locate import locate
from penstock.engine.packs import pack as pack_module
from penstock.engine.packs.cache import being_changed, cached_packs, remove_pack
from penstock.engine.packs.firstuse import FirstUse
from penstock.engine.packs.origin import read_origin
from penstock.engine.packs.pack import pack
from penstock.engine.run.events import Notice
from penstock.engine.store.durable import FileOps
from penstock.errors import JobCancelled, JobLocked, StorageError, UsageError
from tests.engine import golden
from tests.engine.packs.test_first_use import REQUEST, opened, result_of

NAME = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return golden.write_model(tmp_path / "model", image_to_video=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small files are known by samples, as large ones are: of the first byte and the last."""
    monkeypatch.setattr("penstock.engine.store.digest.SAMPLES", 2)
    monkeypatch.setattr("penstock.engine.store.digest.SAMPLE_BYTES", 1)
    yield


def change(path: Path) -> None:
    """Other values between the samples, and the old time of the last write."""
    before, data = path.stat(), bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for index in range(start, len(data) - 2, 512):
        data[index] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_pack_of_changed_weights_is_made_again(model: Path, cache: Path, tmp_path: Path) -> None:
    before = result_of(model, cache, format="int8")
    change(model / NAME)
    after = result_of(model, cache, format="int8")
    fresh = result_of(model, tmp_path / "fresh", format="int8")
    assert torch.equal(after.latents, fresh.latents)
    assert not torch.equal(after.latents, before.latents)
    assert any("made from other bytes" in told for told in after.report.notices)
    assert len(cached_packs(cache)) == 1


def test_a_pack_is_used_where_only_times_differ_and_how_it_was_found_out_is_told(
    model: Path, cache: Path
) -> None:
    first = result_of(model, cache, format="int8")
    (model / NAME).touch()
    with opened(model, cache, format="int8") as engine:
        assert engine.plan(REQUEST).phases[0].name == "pack", "it may have to be made again"
        again = engine.submit(REQUEST).result()
    assert torch.equal(first.latents, again.latents)
    assert again.report.phases[0].name == "text"
    assert any("every byte is read" in told for told in again.report.notices)
    assert any("unchanged" in t and "by every byte" in t for t in again.report.notices)


def test_a_packing_that_was_stopped_does_not_go_on_with_other_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, writes = tmp_path / "packed", pack_module._write_run

    def stop(*arguments: object) -> bytes:
        if (folder / f"{NAME}.progress").exists():
            raise KeyboardInterrupt
        return writes(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(pack_module, "_write_run", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(locate(model), "int8", folder)
    change(model / NAME)
    assert pack(locate(model), "int8", folder).reused_runs == 0
    whole = pack(locate(model), "int8", tmp_path / "whole")
    assert (folder / NAME).read_bytes() == (whole.folder / NAME).read_bytes()


def test_a_finished_pack_of_other_weights_is_replaced(model: Path, tmp_path: Path) -> None:
    folder = pack(locate(model), "int8", tmp_path / "packed").folder
    old = (folder / NAME).read_bytes()
    change(model / NAME)
    pack(locate(model), "int8", folder)
    assert (folder / NAME).read_bytes() != old
    assert pack(locate(model), "int8", folder).reused_runs > 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"pack": "0", "source": {}}', b"\xff"])
def test_an_origin_that_names_another_pack_or_is_damaged_is_none(
    model: Path, tmp_path: Path, content: bytes
) -> None:
    path = pack(locate(model), "int8", tmp_path / "packed").folder / NAME
    assert read_origin(FileOps(), path)
    path.with_name(path.name + ".source").write_bytes(content)
    assert read_origin(FileOps(), path) is None


@pytest.mark.parametrize("where", ["the model", "its parent", "other files", "foreign weights"])
def test_a_model_is_not_packed_over_somebodys_files(
    model: Path, tmp_path: Path, where: str
) -> None:
    folder = {"the model": model, "its parent": model.parent}.get(where, tmp_path / "mine")
    folder.mkdir(exist_ok=True)
    if where == "other files":
        (folder / "notes.txt").write_text("mine")
    elif where == "foreign weights":
        packed = pack(locate(model), "int8", folder).folder
        shutil.copy(model / NAME, packed / NAME)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="did not make"):
        pack(locate(model), "int8", folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_the_second_first_use_waits_for_the_first_and_says_for_what(
    model: Path, cache: Path
) -> None:
    with opened(model, cache, format="int8") as engine, opened(model, cache) as other:
        use = FirstUse.of(engine.model.streamed.source, "int8", cache)
        use.folder.mkdir(parents=True)
        told = threading.Event()
        with being_changed(use.folder):
            job = engine.submit(REQUEST)
            cancelled = other.submit(REQUEST)  # one that needs no pack is not held up
            cancelled.result()
            for event in job.events():
                if isinstance(event, Notice) and "waiting for process" in event.message:
                    assert str(os.getpid()) in event.message and str(use.folder) in event.message
                    told.set()
                    break
        assert told.is_set()
        assert job.result().report.weight_format == "int8"


def test_waiting_for_a_pack_can_be_cancelled(model: Path, cache: Path) -> None:
    with opened(model, cache, format="int8") as engine:
        use = FirstUse.of(engine.model.streamed.source, "int8", cache)
        use.folder.mkdir(parents=True)
        with being_changed(use.folder):
            job = engine.submit(REQUEST)
            for event in job.events():
                if isinstance(event, Notice) and "waiting for process" in event.message:
                    job.cancel()
            with pytest.raises(JobCancelled):
                job.result()
            with pytest.raises(JobLocked):
                use.make(1 << 30, lambda done: None)


def test_what_packing_took_is_measured(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([100, 130, 170, *[120] * 10_000])
    monkeypatch.setattr(variants, "resident_bytes", lambda: next(sizes))
    report = result_of(model, cache, format="int8").report
    assert report.phases[0].name == "pack"
    assert report.phases[0].measured_ram_bytes == 70
    assert report.phases[0].predicted_ram_bytes >= 64 << 20


def test_the_cache_may_change_while_it_is_listed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (cache / f"wan-{name}-{'1' * 16}" / "transformer").mkdir(parents=True)
        (cache / f"wan-{name}-{'1' * 16}" / "transformer" / "x").write_bytes(b"xy")
    lstat = Path.lstat

    def gone(self: Path) -> os.stat_result:
        if self.name == "x":
            shutil.rmtree(self.parents[1], ignore_errors=True)
        return lstat(self)

    monkeypatch.setattr(Path, "lstat", gone)
    assert sum(pack.nbytes for pack in cached_packs(cache)) == 0


def test_removing_a_pack_leaves_what_is_not_its_own(cache: Path) -> None:
    folder = cache / f"wan-{'1' * 16}"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "x.safetensors").write_bytes(b"pack")
    (folder / "transformer" / "mine.txt").write_text("mine")
    (folder / "pack.json").write_text("{}")
    with pytest.raises(StorageError, match=r"mine\.txt"):
        remove_pack(cache, folder.name)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["mine.txt"]
    (cache / f"link-{'2' * 16}").symlink_to(folder)
    assert [pack.name for pack in cached_packs(cache)] == [folder.name]


def test_a_pack_begun_again_while_it_is_removed_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / f"wan-{'1' * 16}"
    folder.mkdir(parents=True)
    rmdir = FileOps.rmdir

    def begun(self: FileOps, place: Path) -> None:
        (place / "lock").write_text("1\n")
        rmdir(self, place)

    monkeypatch.setattr(FileOps, "rmdir", begun)
    assert remove_pack(cache, folder.name) == 0
    assert [path.name for path in folder.iterdir()] == ["lock"]
