"""The tables of weight formats, from the results of their benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import dequantise, render

ROW = {
    "format": "nf4", "compute": "exact (dequant)", "layer_error": 0.005, "block_error": 0.01,
    "latents_psnr": 40.0, "frames_psnr": None, "block_bytes": 1234, "clips": 9, "score": 0.5,
    "lost": 0.4, "loses": True,
}  # fmt: skip
SPEED = {
    "shape": [1024, 5120], "format": "nf4", "dtype": "bfloat16", "against": "bitsandbytes",
    "ratio": 0.5, "low": 0.4, "high": 0.6,
}  # fmt: skip
OTHER = SPEED | {"shape": [8, 64], "ratio": 2.0}


def test_quality_with_and_without_a_judge() -> None:
    judged = render.quality({"model": "m", "clips": 9, "rows": [ROW]})
    assert (
        "| nf4, exact (dequant) | 5.0e-03 | 1.0e-02 | 40.0 dB | equal | 1,234 | 50.0% (loses)"
        in (judged)
    )
    plain = render.quality({"model": "m", "clips": 1, "rows": [ROW | {"score": None}]})
    assert "| equal | 1,234 |\n" in plain and "score" not in plain


def test_runs_of_several_shapes_are_columns_of_one_table() -> None:
    made = render.formats(
        {"dequantise_a": {"results": [SPEED]}, "dequantise_b": {"results": [OTHER]}}
    )
    assert "| format | against | 1024x5120 bfloat16 | 8x64 bfloat16 |" in made
    assert "| nf4 | bitsandbytes | 0.50 (0.40 to 0.60) | 2.00 (0.40 to 0.60) |" in made
    assert "Nothing has been measured" in render.formats({})


def test_what_is_made_of_each_way_of_storing_and_what_is_said() -> None:
    row = {"stored": "raw fp8", "label": "fp8 raw", "recommended": True, "same": True,
           "packed_cosine": 0.99996, "changed_by_lora": True}  # fmt: skip
    bad = row | {"recommended": False, "same": False, "changed_by_lora": False}
    value = {"rows": [row, bad], "refused": [{"stored": "x", "said": "no"}]}
    made = render.every_format({"every_format_a": value})
    assert "| raw fp8 | fp8 raw | the values' own, bit for bit | 0.99996 | other latents |" in made
    assert "| fp8 raw, not recommended | DIFFERS | 0.99996 | NO CHANGE |" in made
    assert "| x | no |" in made


def test_formats_folders_and_loras_beside_their_libraries() -> None:
    row = {"format": "nvfp4", "library": "x", "dtype": "float32", "difference": 0.0}
    half = row | {"dtype": "bfloat16", "difference": 0.003, "rounded_once": 0.0}
    turned = row | {"format": "convrot", "difference": 2e-7, "ours_off": 1e-8, "theirs_off": 1e-7}
    lora = {"kind": "loha", "streamed": 1e-7, "resident": 3e-7, "packed in": 2e-7, "without": 0.1}
    value = {
        "values": [row, turned, half, turned | {"dtype": "bfloat16"}],
        "folders": [{"stored": "int8, by x", "weights": 0.004, "latents": 0.002}],
        "loras": [lora | {"stored": stored} for stored in render.BASES],
    }
    made = render.libraries({"libraries_a": value})
    assert "| nvfp4 | x | 0 | 3.0e-03 | off the library's fp32 rounded once: ours 0 |" in made
    assert "| convrot | x | 2.0e-07 | 2.0e-07 | off the sum in fp64: ours 1.0e-08, th" in made
    assert "| int8, by x | 4.0e-03 | 2.0e-03 |" in made
    assert "| loha | 3.0e-07 | 3.0e-07 | 3.0e-07 |" in made


def test_a_ratio_is_ours_over_theirs_and_each_side_begins_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def side(name: str, seconds: float) -> Callable[[], object]:
        return lambda: (asked.append(name), seconds)[1]

    monkeypatch.setattr(dequantise, "seconds", lambda function: function())
    case = dequantise.Case("x", "y", torch.float32, side("a", 3.0), side("b", 2.0))
    found = dequantise.measure(case, 4)
    assert (found["ratio"], found["low"], found["high"]) == (1.5, 1.5, 1.5)
    assert (found["ours_ms"], found["theirs_ms"]) == (3000.0, 2000.0)
    assert "".join(asked) == "abba" * 3  # two turns that are not counted, then four
