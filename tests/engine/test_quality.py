"""The quality table: int8 by rows beats fp8, and what costs more bytes is nearer."""

from __future__ import annotations

import pytest

from benchmarks.quality import Quality, measure


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Quality]:
    table = measure(tmp_path_factory.mktemp("quality"), ("fp32", "int8", "fp8", "nf4"), steps=2)
    return {f"{row.format} {row.compute.partition(' ')[0]}": row for row in table}


@pytest.mark.parametrize(
    ("better", "worse"),
    [("fp32 exact", "int8 exact"), ("int8 exact", "fp8 exact"), ("fp8 exact", "nf4 exact")],
)
def test_formats_are_ordered(rows: dict[str, Quality], better: str, worse: str) -> None:
    assert rows[better].block_cosine > rows[worse].block_cosine
    assert rows[better].latents_psnr > rows[worse].latents_psnr
    assert rows[better].frames_psnr > rows[worse].frames_psnr


def test_full_precision_changes_nothing_and_errors_are_bounded(rows: dict[str, Quality]) -> None:
    assert rows["fp32 exact"].latents_psnr == float("inf")
    assert 1 - rows["int8 exact"].block_cosine < 5e-4
    assert 1 - rows["fp8 exact"].block_cosine < 3e-3
    assert rows["nf4 exact"].block_bytes < 0.6 * rows["int8 exact"].block_bytes
