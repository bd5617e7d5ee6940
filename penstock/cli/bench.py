"""The command that measures. Parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.files import Debug, Json, reported
from penstock.cli.options import NOTHING, with_options
from penstock.cli.paths import path_option
from penstock.cli.terminal import Screen, say
from penstock.profiles.options import Options


@with_options(format="Weight format of the blocks (as stored; a synthetic model: int8).")
def bench(
    model: Annotated[str | None, typer.Option(help="Model to measure, as for generate.")] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            help="Measure random weights of true shapes instead, such as minimax-h3-pruned."
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(help="Blocks of the synthetic model (as many as disk and --minutes allow)."),
    ] = None,
    width: Annotated[int, typer.Option(help="Width in pixels.")] = 832,
    height: Annotated[int, typer.Option(help="Height in pixels.")] = 480,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames (81, or the nearest that the model makes).")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps to measure.")] = 3,
    warmup: Annotated[int, typer.Option(help="Warm-up steps before them, which do not count.")] = 1,
    cfg: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale; 1 turns guidance off: one forward pass a step (5 or 1)."
        ),
    ] = None,
    options: Options = NOTHING,
    folder: Annotated[
        Path | None,
        path_option("Folder for the synthetic model, which is removed afterwards."),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Predicted minutes that the steps of a synthetic model may take.")
    ] = 10.0,
    whole: Annotated[
        bool, typer.Option("--whole", help="Measure every phase of a job, not denoising alone.")
    ] = False,
    save: Annotated[Path | None, path_option("Save the result to this file.")] = None,
    compare: Annotated[Path | None, path_option("Compare with a saved result.")] = None,
    percent: Annotated[
        float,
        typer.Option(
            help="A step is a regression if it is slower by more than this many "
            "percent and by --seconds."
        ),
    ] = 5.0,
    seconds: Annotated[
        float,
        typer.Option(
            help="A step is a regression if it is slower by more than this many "
            "seconds and by --percent."
        ),
    ] = 0.05,
    peak: Annotated[
        str, typer.Option(help="A memory peak is a regression if it is higher by more than this.")
    ] = "32MiB",
    sweep: Annotated[
        Path | None,
        path_option("Measure several profiles, and draw seconds a step over VRAM into this PNG."),
    ] = None,
    profiles: Annotated[
        str, typer.Option(help="Profiles of a sweep, separated by commas.")
    ] = "24gb,16gb,12gb,8gb,6gb,4gb",
    as_json: Json = False,
    as_md: Annotated[bool, typer.Option("--md", help="Print Markdown tables.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a profile here: seconds a step, traffic, stalls and peaks, beside the plan.

    Exit codes: 0 done or PASS, 1 failed or REGRESSION, 2 wrong usage or RECIPE_MISMATCH.
    """
    from penstock.engine.bench.order import BenchOrder
    from penstock.engine.bench.result import Thresholds
    from penstock.units import parse_bytes

    with reported(debug):
        order = BenchOrder(
            model, synthetic, blocks, width, height, frames, steps, warmup, cfg,
            folder, minutes, whole, options,
        )  # fmt: skip
        thresholds = Thresholds(percent, seconds, parse_bytes(peak))
        if sweep is not None:
            _sweep(order, profiles.split(","), sweep, as_json, as_md)
            return
        code = _measure(order, save, compare, thresholds, as_json, as_md)
    raise typer.Exit(code)


def _tell(line: str) -> None:
    Screen(stderr=True).print(line)


def _measure(
    order: object, save: Path | None, compare: Path | None, thresholds: object, as_json: bool,
    as_md: bool,
) -> int:  # fmt: skip
    from penstock.cli.bench_view import markdown, sections, tables, verdict_section
    from penstock.engine.bench import result as bench_result
    from penstock.engine.bench.order import BenchOrder, run

    assert isinstance(order, BenchOrder) and isinstance(thresholds, bench_result.Thresholds)
    old = None if compare is None else bench_result.load(compare)
    if save is not None:
        bench_result.check_place(save)
    result = run(order, lambda event: None, _tell)
    shown = sections(result)
    verdict = None if old is None else bench_result.compare(old, result, thresholds)
    if verdict is not None:
        shown.append(verdict_section(verdict))
    if as_json:
        told = None if verdict is None else {"outcome": verdict.outcome, "lines": verdict.lines}
        say(json.dumps(result.to_json() | {"verdict": told}))
    elif as_md:
        say(markdown(shown))
    else:
        screen = Screen()
        screen.print(tables(shown, screen.width), soft_wrap=True)
    if save is not None:  # last: what was measured is told also where it cannot be kept
        bench_result.save(result, save)
    return 0 if verdict is None else verdict.exit_code


def _sweep(order: object, profiles: list[str], picture: Path, as_json: bool, as_md: bool) -> None:
    from penstock.cli.bench_view import markdown, sweep_section, tables
    from penstock.engine.bench.order import BenchOrder, sweep
    from penstock.engine.bench.plot import PNG, Dot, draw
    from penstock.engine.bench.result import check_place
    from penstock.units import GIB

    assert isinstance(order, BenchOrder)
    check_place(picture, PNG)
    points = sweep(order, profiles, lambda event: None, _tell)
    measured = [(point.profile, point.result) for point in points if point.result is not None]
    draw(
        [Dot(found.peak_vram_bytes / GIB, found.median_s, name) for name, found in measured],
        picture,
        title=measured[0][1].recipe.model if measured else "",
        x_label="peak VRAM, GiB",
        y_label="seconds a step",
    )
    if as_json:
        rows = [
            {"profile": point.profile, "refusal": point.refusal,
             "result": None if point.result is None else point.result.to_json()}
            for point in points
        ]  # fmt: skip
        say(json.dumps(rows))
    elif as_md:
        say(markdown([sweep_section(points)]))
    else:
        screen = Screen()
        screen.print(tables([sweep_section(points)], screen.width), soft_wrap=True)
