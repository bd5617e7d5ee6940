"""What others have published beside what plans say of the same card, model and size.

``results/published_figures.json`` holds each figure with the address where it stands, the day on
which it was published, and how it was made; nothing of it is ours. ``seconds`` are of one step
where ``steps`` is 1, else of the whole job, one figure or the least and the most of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import Results, Rows, between, table


def beside_ours(results: Results, way: str = "default") -> str:
    """Theirs, the plan's, and the ratio; where each figure was published in the default way.

    Args:
        results: the files.
        way: one of `benchmarks.plans.WAYS`.
    """
    sourced = way == "default"
    headings = [
        "figure",
        "theirs",
        "predicted",
        "ratio",
        *(["how, where, when"] if sourced else []),
    ]
    rows: Rows = []
    for figure in results["published_figures"]:
        ours = predicted(results, figure, way)
        if ours is None:
            continue
        told = [
            what(figure),
            between(figure["seconds"], 0),
            f"{ours:.0f}",
            between([ours / theirs for theirs in figure["seconds"]], 1),
        ]
        rows.append((*told, *([source(figure)] if sourced else [])))
    return table(headings, rows)


def what(figure: Mapping[str, Any]) -> str:
    """Card, model, size, program and unit."""
    height, width, frames = figure["size"].split("x")
    unit = "s a step" if figure["steps"] == 1 else f"{figure['steps']} steps, s"
    return (
        f"{figure['card']}, {figure['model']}, {width}x{height}, {frames} frames, "
        f"{figure['by']}, {unit}"
    )


def source(figure: Mapping[str, Any]) -> str:
    """How it was made, with the address and the day."""
    return f"{figure['said']} ([{figure['date']}]({figure['source']}))"


def predicted(results: Results, figure: Mapping[str, Any], way: str) -> float | None:
    """Seconds by the plan; None where there is no plan of that card, model and size in this way."""
    if figure["model"] == "wan2.1-i2v-14b":
        found = [row for row in results["plans_cards"] if row["way"] == way]
    else:
        found = [
            row
            for row in results["plans_models"]
            if (row["model"], row["steps"]) == (figure["model"], figure["steps"])
            and way == "default"
        ]
    for row in found:
        if (row["card"], row["size"]) == (figure["card"], figure["size"]):
            return row["seconds_a_step"] if figure["steps"] == 1 else of_clock(row["total"])
    return None


def of_clock(text: str) -> float:
    """Seconds of ``"1:02:03"`` or ``"2:05"``."""
    seconds = 0
    for part in text.split(":"):
        seconds = 60 * seconds + int(part)
    return seconds
