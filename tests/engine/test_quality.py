"""The quality table: int8 by rows beats fp8, more bytes are nearer, a judge adds a column."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from benchmarks.quality import Quality, measure, write_model
from penstock.engine.settings import Settings

SETTINGS = Settings(
    prompt="a red circle moves", negative_prompt="", size="32x32", frames=1, steps=2, seed=3,
    guidance_scale=1.0,
)  # fmt: skip


def brightness(videos: Sequence[Tensor]) -> float:
    return float(sum(video.double().mean() for video in videos)) / len(videos)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quality]:
    folder = tmp_path_factory.mktemp("quality")
    table = measure(
        write_model(folder / "m"), folder, ("int8", "fp8", "nf4"), [SETTINGS], brightness
    )
    return {f"{row.format} {row.compute.partition(' ')[0]}": row for row in table}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("as stored exact", "int8 exact"),
        ("int8 exact", "fp8 exact"),
        ("fp8 exact", "nf4 exact"),
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


def test_a_judge_adds_a_column(rows: dict[str, Quality]) -> None:
    scores = {row.score for row in rows.values()}
    assert None not in scores
    assert rows["as stored exact"].score != rows["nf4 exact"].score
