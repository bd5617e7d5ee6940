"""The documents say what the results say, and the tables of plans what plans say now."""

from __future__ import annotations

import re

import pytest

from benchmarks import known, plans, render
from penstock.engine.family.protocol import builtin_names
from penstock.units import GIB
from tests.profiles import test_true_model as true

RESULTS = render.read_results(render.RESULTS)


def test_of_a_card() -> None:
    card = ("RTX 3060 12GB", "12gb")
    kept = [row for row in RESULTS["plans_cards"] if row["card"] == card[0]]
    assert plans.cards([card]) == kept
    assert len(RESULTS["plans_cards"]) == len(plans.WAYS) * len(plans.CARDS) * len(true.SIZES)


@pytest.mark.parametrize("case", [("480x832x81", "12gb", 16), ("720x1280x81", "4gb", 64)])
def test_of_a_profile(case: tuple[str, str, int]) -> None:
    rows = {(r["size"], r["profile"], r["system_gib"]): r for r in RESULTS["plans_peaks"]}
    assert list(rows) == true.ALL
    made, row = true.made(*case), rows[case]
    assert row["vram_gib"] == round(made.peak_vram_bytes / GIB, 2)
    assert row["ram_gib"] == round(made.peak_ram_bytes / GIB, 2)
    assert 0 <= row["over"][0] <= row["over"][1] <= 5


def test_of_a_model() -> None:
    name = "wan2.2-ti2v-5b"
    assert plans.models([name]) == [r for r in RESULTS["plans_models"] if r["model"] == name]


def test_of_what_models_are_asked_for() -> None:
    assert plans.defaults() == RESULTS["plans_defaults"]
    assert known.MODELS.keys() <= {row["model"] for row in RESULTS["plans_models"]}
    assert len(RESULTS["plans_models"]) == len(plans.MODEL_CARDS) * len(builtin_names())


def test_of_what_a_model_consists_of() -> None:
    assert plans.parts() == RESULTS["plans_parts"]


def test_of_the_question_of_the_readme() -> None:
    """Of one card, each model and video; the others are `test_of_every_card_of_the_readme`'s."""
    card = plans.VIDEO_CARDS[3]
    assert card[0] == "RTX 3060 12GB"
    rows = RESULTS["plans_videos"]
    assert plans.videos([card]) == [row for row in rows if row["card"] == card[0]]
    assert len(rows) == len(plans.VIDEO_CARDS) * len(plans.VIDEOS)


@pytest.mark.faults
def test_of_every_card_of_the_readme() -> None:
    assert plans.videos() == RESULTS["plans_videos"]


def test_the_readme_shows_the_longest_time_and_the_highest_peaks() -> None:
    rows = [
        {"card": "a", "ram": "16GiB", "model": model, "video": "480p, 4 steps", "format": "int8",
         "minutes": minutes, "vram_gib": vram, "ram_gib": 3.0}
        for model, minutes, vram in (("one", 61.0, 4.0), ("two", 60.0, 5.0))
    ]  # fmt: skip
    table = render.will_it_run({"plans_videos": rows}).splitlines()
    assert table[2].startswith("| a | 16GiB | 1 h 01 | ")
    assert table[2].endswith(" | 5.0 GiB | 3.0 GiB |")
    rows[1] = {"card": "a", "ram": "16GiB", "model": "two", "video": "480p, 4 steps",
               "needs": "VRAM", "needs_gib": 7.0}  # fmt: skip
    assert "| a | 16GiB | does not fit | " in render.will_it_run({"plans_videos": rows})


def test_of_a_long_video() -> None:
    card = "RTX 3060 12GB"
    rows = [r for r in RESULTS["plans_windows"] if (r["card"], r["size"]) == (card, "832x480")]
    alone, even = rows[:2]
    assert plans.window_row(card, "832x480", 241, {}).items() <= even.items()
    assert (alone["frames"], even["frames"], even["flags"]) == (81, 241, "")
    assert even["gb_a_step"] <= 1.05 * alone["gb_a_step"]


def test_documents_are_rendered() -> None:
    tables = []
    for path in render.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert render.rendered(text, RESULTS) == text, f"{path.name}: python -m benchmarks.render"
        tables += re.findall(r"<!-- measured:(\w+) -->", text)
    assert sorted(tables) == sorted(render.TABLES)
