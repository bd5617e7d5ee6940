"""The quality table: int8 by rows beats fp8, more bytes are nearer, a judge adds a column, and a
run that was cut short goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import quality
from benchmarks.quality import Clip, Quality, Runs, write_model
from benchmarks.quality_blocks import cosine
from benchmarks.quality_kept import Difference, Kept
from penstock.engine.engine import Engine
from penstock.engine.request.settings import Settings
from penstock.errors import UsageError

SETTINGS = Settings(
    prompt="a red circle moves", negative_prompt="", size="32x32", frames=1, steps=2, seed=3,
    guidance_scale=1.0,
)  # fmt: skip
FORMATS = ("int8", "fp8", "nf4", "gguf-q4_0", "gguf-q4_k")


def judge(limit: float) -> Callable[[Tensor], bool]:
    return lambda video: float(video.double().mean()) > limit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quality]:
    kept = Kept(tmp_path_factory.mktemp("quality") / "kept.json", {})
    clips = [Clip(SETTINGS, judge(-1.0)), Clip(SETTINGS, judge(256.0))]
    return {
        f"{row.format} {row.compute.partition(' ')[0]}": row
        for row in Runs(model, clips, kept).measure(FORMATS)
    }


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("as stored exact", "int8 exact"),
        ("int8 exact", "fp8 exact"),
        ("fp8 exact", "nf4 exact"),
        ("gguf-q4_k exact", "gguf-q4_0 exact"),
    ],
)
def test_formats_are_ordered(rows: dict[str, Quality], better: str, worse: str) -> None:
    assert rows[better].layer_error < rows[worse].layer_error
    assert rows[better].block_error < rows[worse].block_error
    assert rows[better].latents_psnr > rows[worse].latents_psnr
    assert rows[better].frames_psnr > rows[worse].frames_psnr


def test_the_reference_is_itself_and_errors_are_bounded(rows: dict[str, Quality]) -> None:
    assert rows["as stored exact"].latents_psnr == float("inf")
    assert abs(rows["as stored exact"].layer_error) < 1e-12
    assert rows["int8 exact"].block_error < 5e-4
    assert rows["fp8 exact"].block_error < 3e-3
    assert rows["nf4 exact"].block_bytes < 0.6 * rows["int8 exact"].block_bytes


def test_fast_rows_are_worse_than_exact_ones_where_they_multiply(rows: dict[str, Quality]) -> None:
    fast, exact = rows["int8 fast"], rows["int8 exact"]
    if fast.compute == "fast (int8)":
        assert exact.layer_error < fast.layer_error < 10 * exact.layer_error
    else:
        assert fast.layer_error == exact.layer_error


def test_every_way_has_a_row(rows: dict[str, Quality]) -> None:
    wanted = ["as stored exact", "int8 exact", "int8 fast", *(f"{n} exact" for n in FORMATS[1:])]
    assert list(rows) == wanted


def test_a_judge_adds_a_column(rows: dict[str, Quality]) -> None:
    assert {row.score for row in rows.values()} == {0.5}
    assert not any(row.loses for row in rows.values())


def test_a_run_that_was_cut_short_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, path = [Clip(SETTINGS), Clip(SETTINGS, judge(0.0))], tmp_path / "kept.json"
    submit, made = Engine.submit, []

    def counted(engine: Engine, request: object, stop_after: int) -> object:
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(request)
        return submit(engine, request)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "submit", lambda e, r: counted(e, r, 3))
    with pytest.raises(KeyboardInterrupt):
        list(Runs(model, clips, Kept(path, {"a": 1})).measure(["nf4"]))
    made.clear()
    monkeypatch.setattr(Engine, "submit", lambda e, r: counted(e, r, 99))
    again = list(Runs(model, clips, Kept(path, {"a": 1})).measure(["nf4"]))
    assert len(made) == 1
    whole = list(Runs(model, clips, Kept(tmp_path / "other.json", {})).measure(["nf4"]))
    assert again == whole
    made.clear()
    assert list(Runs(model, clips, Kept(path, {"a": 1})).measure(["nf4"])) == whole
    assert not made


def test_figures_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    Kept(path, {"files": {"x": 1}, "torch": "2"}).set_facts("int8 exact", {"path": "dequant"})
    assert Kept(path, {"files": {"x": 1}, "torch": "2"}).facts("int8 exact")
    with pytest.raises(UsageError, match="same files"):
        Kept(path, {"files": {"x": 2}, "torch": "2"})
    path.write_text("[]")
    with pytest.raises(UsageError, match="no figures"):
        Kept(path, {})


@pytest.mark.parametrize(("score", "loses"), [(0.90, False), (0.88, False), (0.87, True)])
def test_what_loses_more_than_two_points_is_marked(score: float, loses: bool) -> None:
    row = Quality("nf4", "exact (dequant)", 0, 0, 1, 9, 9, 1, 100, score, round(0.90 - score, 9))
    assert row.loses is loses
    assert ("loses 3.0 points" in quality.line(row)) is loses


def test_differences_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(6, 50, generator=generator) for _ in range(2))
    whole = Difference.of(found, wanted)
    parts = Difference.total(Difference.of(*each) for each in zip(found, wanted, strict=True))
    assert parts.cosine == pytest.approx(whole.cosine) == pytest.approx(cosine(found, wanted))
    assert parts.psnr() == pytest.approx(whole.psnr())
    error = float((found - wanted).double().square().mean())
    assert whole.psnr(2.0) == pytest.approx(10 * torch.tensor(4 / error).log10().item())


def test_held_out_pairs_are_judged_by_the_tracker(tmp_path: Path) -> None:
    from training.clips import render
    from training.evaluate import make_pairs

    clips = quality.held_out(4, tmp_path, steps=2)
    for clip, pair in zip(clips, make_pairs("test", 4), strict=True):
        assert clip.settings.prompt == pair.prompt and clip.settings.steps == 2
        assert clip.settings.image is not None and clip.settings.image.exists()
        right = torch.from_numpy((render(pair.scene, pair.motion) * 255).round()).byte()
        assert clip.judge is not None and clip.judge(right)
        assert not clip.judge(right[:1].repeat(len(right), 1, 1, 1))  # nothing moves
