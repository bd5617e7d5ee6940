"""Long videos in windows: their geometry and noise, and jobs whose windows share visits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.families.wan import denoise_plan
from penstock.engine.families.wan.windowed import seen
from penstock.engine.family.protocol import builtin
from penstock.engine.run.sampler import initial_noise, long_noise
from penstock.engine.run.stored import restored_request
from penstock.engine.store.journal import Journal
from penstock.errors import RequestError
from penstock.profiles.cards import described
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.phases import Workload
from penstock.profiles.planner import plan
from penstock.profiles.profile import choose, load
from penstock.profiles.windows import Windows
from tests.engine.running import a_request, an_engine, stop_after_a_step

LONG = {"frames": 21, "window": 9, "overlap": 4}  # 6 latent frames in windows of 3 that share 1


@settings(max_examples=200)
@given(st.integers(1, 80), st.integers(2, 30), st.integers(0, 14))
def test_windows_cover_everything_evenly(total: int, length: int, overlap: int) -> None:
    windows = Windows(length, min(overlap, length - 1))
    parts, weights = windows.parts(total), windows.weights(total)
    assert parts[0].start == 0 and parts[-1].stop == total
    assert all(part.stop - part.start == min(length, total) for part in parts)
    for before, after in zip(parts, parts[1:], strict=False):
        assert before.start < after.start <= before.stop - windows.overlap
    if len(parts) > 1:  # one fewer would not do
        assert length + (len(parts) - 2) * (length - windows.overlap) < total
    counts = [0.0] * total
    for part, row in zip(parts, weights, strict=True):
        for at, weight in zip(range(part.start, part.stop), row, strict=True):
            counts[at] += weight
        assert list(row[: len(row) // 2]) == sorted(row[: len(row) // 2]) or len(parts) > 1
    assert counts == pytest.approx([1.0] * total, abs=1e-12)
    if len(parts) == 1:
        assert set(weights[0]) == {1.0}


def test_of_video_frames_in_latent_frames() -> None:
    assert Windows(81, 16).latent(4) == Windows(21, 4)
    assert Windows(81, 30).latent(4) == Windows(21, 7)
    assert Windows(21, 4).starts(61) == (0, 13, 26, 40)


def test_noise_is_the_windows_repeated_and_shuffled() -> None:
    first = initial_noise((1, 2, 5, 2, 2), 3)
    noise = long_noise(first, 17, Windows(5, 2), 3)
    assert torch.equal(noise[:, :, :5], first)
    known = {tuple(first[0, :, at].flatten().tolist()) for at in range(5)}
    told = [tuple(noise[0, :, at].flatten().tolist()) for at in range(17)]
    for start in range(13):  # as many as a window: each of the first noises, and no other
        assert set(told[start : start + 5]) <= known
    for start in range(5, 17, 3):  # three by three, what was there a window before
        assert set(told[start : start + 3]) <= set(told[start - 5 : start - 2])
    assert told[5:10] != told[:5]
    assert torch.equal(noise, long_noise(first, 17, Windows(5, 2), 3))
    assert not torch.equal(noise, long_noise(first, 17, Windows(5, 2), 4))


def test_every_window_sees_the_picture_as_its_first_frame() -> None:
    condition = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 20, 6, 2, 2)
    told = [seen(condition, part)[0, 0, :, 0, 0].tolist() for part in Windows(3, 1).parts(6)]
    assert told == [[0, 1, 2], [0, 2, 3], [0, 4, 5]]


def made(folder: Path, request: Any, **options: Any) -> Any:
    with an_engine(folder, **options) as engine:
        return engine.submit(request).result()


TIGHT = {"vram": "7MiB", "ram": "72MiB"}
"""Not all blocks stay in VRAM, so that visits move bytes."""


def step(found: Any) -> Any:
    return next(phase for phase in found.report.phases if phase.name == "denoise")


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_how_many_share_a_visit_changes_no_bit(
    task: str, t2v_folder: Path, i2v_folder: Path, picture: Path
) -> None:
    folder = t2v_folder if task == "t2v" else i2v_folder
    request = a_request(image=picture if task == "i2v" else None, **LONG)
    with an_engine(folder) as engine:
        resident = engine.plan(request)
    with an_engine(folder, vram=resident["denoise"].vram_bytes - 1) as engine:
        plan = engine.plan(request)["denoise"]
        assert (plan.windows, plan.branches) == (3, 6)
        together = engine.submit(request).result()
    alone = made(folder, request, branches="1", cross_kv="ram")
    assert torch.equal(alone.latents, together.latents)
    assert torch.equal(alone.video, together.video)
    assert together.video.shape[0] == 21
    for found in (alone, together):
        for phase in found.report.phases:
            assert phase.measured_vram_bytes <= phase.predicted_vram_bytes


def test_a_visit_serves_all_windows(t2v_folder: Path) -> None:
    """What a step moves does not grow with the video; window by window it is three times that."""
    short = step(made(t2v_folder, a_request(frames=9), **TIGHT))
    long = step(made(t2v_folder, a_request(**LONG), **TIGHT))
    assert 0 < long.copied_bytes == short.copied_bytes
    apart = step(made(t2v_folder, a_request(**LONG), branches="1", **TIGHT))
    passing = short.copied_bytes - short.read_bytes  # all that is read is copied once
    assert apart.copied_bytes >= short.copied_bytes + passing


def test_one_window_is_the_plain_job(t2v_folder: Path) -> None:
    plain = made(t2v_folder, a_request(frames=9, window=0))
    assert torch.equal(made(t2v_folder, a_request(frames=9, window=9)).latents, plain.latents)
    whole = made(t2v_folder, a_request(frames=21, window=0))
    assert not torch.equal(whole.latents, made(t2v_folder, a_request(**LONG)).latents)


def test_a_long_job_is_resumed_to_the_bit(t2v_folder: Path, tmp_path: Path) -> None:
    whole = made(t2v_folder, a_request(**LONG))
    with an_engine(t2v_folder, **TIGHT) as engine:
        stop_after_a_step(engine, a_request(**LONG), tmp_path)
        found = engine.resume(tmp_path).result()
    assert torch.equal(found.latents, whole.latents)


def test_a_request_from_before_windows_is_one_without(tmp_path: Path, t2v_folder: Path) -> None:
    with an_engine(t2v_folder) as engine:
        stop_after_a_step(engine, a_request(frames=9, window=0), tmp_path)
        with Journal.open(tmp_path) as journal:
            for name in ("window", "overlap"):
                del journal.record.request[name]
            assert restored_request(journal) == a_request(frames=9, window=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window": 10}, "illegal window"),
        ({"window": 5}, "illegal window"),
        ({"window": 9, "overlap": 2}, "overlap out of range: expected 4 to 4, found 2"),
        ({"window": 81, "overlap": 44}, "overlap out of range: expected 4 to 40, found 44"),
    ],
)
def test_illegal_windows_are_refused(changes: dict[str, int], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        a_request(**changes)


def test_a_fifth_of_a_window_overlaps() -> None:
    assert a_request(frames=241).windows == Windows(81, 16)
    assert a_request(frames=241, overlap=30).windows == Windows(81, 30)
    assert a_request(frames=21, window=9).windows == Windows(9, 4)
    assert a_request(frames=121).windows is a_request(frames=241, window=0).windows is None
    assert a_request(frames=121, window=81).windows == Windows(81, 16)


@pytest.mark.parametrize("size", [(832, 480), (1280, 720)])
def test_planned_windows_share_visits(size: tuple[int, int]) -> None:
    """The plan of a card of 12 GB: as many blocks pass in a step as there are beside the residents,
    once where all windows share a visit."""
    machine = described("RTX 5090 32GB", "64GiB", None)
    options = Options(residual="bf16", chunk_tokens="8192")
    chosen = choose(load("12gb"), options, machine)
    found = {
        frames: plan(
            builtin("wan2.1-i2v-14b", "int8"),
            Workload(VideoShape(*size, frames), 40, True, windows=Windows(81, 16)),
            chosen.hardware,
            chosen.policy,
        )["denoise"]
        for frames in (81, 241)
    }
    assert (found[241].windows, found[241].branches) == (4, 8)
    streams = {frames: each.stream for frames, each in found.items()}
    passing = {n: 40 - s.device_resident for n, s in streams.items() if s is not None}
    block = found[81].copied_bytes / (39 * passing[81] + 40)
    for frames, each in found.items():
        assert each.copied_bytes <= 1.01 * block * (39 * passing[frames] + 40)
    assert found[241].read_bytes <= 1.05 * found[81].read_bytes


def denoising(machine: Any, work: Workload, **options: Any) -> Any:
    chosen = choose(load("12gb"), Options(**options), machine)
    manifest = builtin("wan2.1-i2v-14b", "int8")
    limits = {"pinned_bytes": chosen.pinned_bytes}
    return plan(manifest, work, chosen.hardware, chosen.policy, **limits)["denoise"]


@pytest.mark.parametrize("card", ["RTX 3060 12GB", "RTX 5090 32GB"])
@pytest.mark.parametrize("size", [(832, 480), (1280, 720)])
def test_what_a_step_moves_does_not_grow_with_the_video(
    card: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 241 frames as of 81, in 12 GB and 64 GiB, for so little time; else a card that computes
    for minutes has no reason to let windows share what comes over an idle link."""
    machine = described(card, "64GiB", None)
    work = Workload(VideoShape(*size, 241), 40, True, windows=Windows(81, 16))
    alone = denoising(machine, Workload(VideoShape(*size, 81), 40, True))
    even = denoising(machine, work)
    assert (even.windows, even.branches) == (4, 8)
    assert even.copied_bytes <= 1.05 * alone.copied_bytes
    assert even == denoising(machine, work, residual="bf16")
    monkeypatch.setattr(denoise_plan, "EVEN_COST", 0.0)
    fastest = denoising(machine, work)
    assert fastest.copied_bytes > 1.2 * even.copied_bytes
    assert fastest.seconds < even.seconds <= 1.02 * fastest.seconds


def test_windows_that_cannot_move_as_little_are_as_fast_as_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = described("RTX 3060 12GB", "64GiB", None)
    work = Workload(VideoShape(1280, 720, 241), 40, True, windows=Windows(81, 16))
    found = denoising(machine, work, residual="fp32")
    assert found.branches < 8
    monkeypatch.setattr(denoise_plan, "EVEN_COST", 0.0)
    assert found == denoising(machine, work, residual="fp32")
