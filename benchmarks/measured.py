"""What was measured on CPUs, row by row, and what tests hold: the tables of docs/measurements.md,
and those of docs/plans.md and docs/pipelines.md that no other file of results makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import Results, Rows, between, gib, table
from penstock.units import GIB

ROOT = Path(__file__).parent.parent
HD = "720x1280x81"


def held_by_tests(results: Results) -> str:
    """What tests of the ordinary suite hold, each of which says the figure itself.

    Raises:
        ValueError: a test does not say what the table tells of it.
    """
    rows: Rows = []
    for row in results["held_by_tests"]:
        source = (ROOT / row["test"]).read_text(encoding="utf-8")
        for said in row["says"]:
            if said not in source:
                raise ValueError(f"{row['test']} does not say any more: {said}")
        rows.append((row["what"], row["held"], f"`{row['test']}`"))
    return table(("what", "held", "test"), rows)


def on_cpus(results: Results) -> str:
    """A row or two of each benchmark that has no table of its own."""
    rows = [row for name, made in ROWS.items() for row in made(results[name])]
    return table(("what", "figure", "shown by"), rows)


def activations(value: Any) -> Rows:
    """Of the transformer at its true shapes."""
    row = value[HD]
    shown = "`benchmarks/fake_dit.py`"
    return [
        (
            f"true 14B shapes, {HD}, bf16, above the weights (fake tensors): forward of one branch",
            f"{row['lean_1']:.2f} GiB (diffusers {row['diffusers']:.2f} GiB)",
            shown,
        ),
        ("the same, both CFG branches in one visit", f"{row['lean_2']:.2f} GiB", shown),
    ]


def frames(value: Any) -> Rows:
    """Of the VAE at its true shapes."""
    grids = {row["grid"]: row for row in value["rows"] if row["size"] == HD}
    whole = value["diffusers"][HD]
    return [
        (
            "the same, VAE decode in 3x3 tiles / encode in 2x2",
            f"{grids['3x3']['decode_bytes'] / GIB:.2f} / {gib(grids['2x2']['encode_bytes'])} "
            f"(diffusers, whole frames: {whole['decode'] / GIB:.2f} / {gib(whole['encode'])})",
            "`benchmarks/fake_vae.py`",
        )
    ]


def predictions(value: Any) -> Rows:
    """Peaks by the plan beside those of the real code."""
    low, high = (bound(row["over"][n] for row in value) for n, bound in ((0, min), (1, max)))
    return [
        (
            "predicted over measured peaks of each phase, true shapes, every profile and size "
            f"({len(value)} plans)",
            f"{'never under' if low >= 0 else f'{-low:.1f} % UNDER'}, at most {high:.1f} % over",
            "`benchmarks/plans.py`",
        )
    ]


def reuse(value: Any) -> Rows:
    """Encoding and decoding beside an earlier build."""
    encoded = [row["new_over_old"] for row in value["rows"] if row["half"] == "encode"]
    same = "bit for bit" if value["identical"] else "DIFFERS"
    tiles = value["tiles_over_whole"]
    return [
        (
            "the picture's clip of 81 frames (true structure, narrow) encoded, CPU time over an "
            "earlier build's that computed every frame, whole and in 2x2 tiles, fp32 and bf16, one "
            "run, medians",
            f"{between(encoded)}, {same}",
            "`benchmarks/vae_reuse.py`",
        ),
        (
            "VAE decode at 720p in 3x3 tiles over whole frames, the same run: CPU time; arithmetic",
            f"{tiles['new']:.2f} (the earlier build {tiles['old']:.2f}; the same bits); "
            f"{tiles['flops']:.2f}",
            "`benchmarks/vae_reuse.py`",
        ),
    ]


def builds(value: Any) -> Rows:
    """Jobs and older benchmarks beside the build before step caches."""
    said = {
        "job": "40 steps by the small model",
        "lean_forward": "lean forward, one block of the 1.3B model's width",
        "disk_tier": "disk tier",
        "overlap": "streams on simulated machines",
    }
    same = "" if value["job"]["identical"] else " (NOT the same bits)"
    rows: Rows = []
    for part, name in said.items():
        found = value[part]["rows"]
        figures = "; ".join(row["figure"] for row in found)
        ratios = "; ".join(f"{row['new_over_old']:.2f}" for row in found)
        apart = "; ".join(f"{row['old_spread']:.2f}" for row in found)
        what = f"over the build before step caches, pairs in turns ({len(found[0]['old'])}), {name}"
        told = f"{ratios}{same}; that build's own runs lie apart by {apart}"
        rows.append((f"{what}: {figures}", told, "`benchmarks/earlier.py`"))
    return rows


def forwards(value: Any) -> Rows:
    """The lean forward beside diffusers'."""
    return [
        (
            f"CPU time of a step of the lean forward over diffusers', {run['tokens']:,} tokens, "
            f"chunk {run['chunk']}, {run['dtype']}, one run, median of {run['rounds']} pairs",
            f"{run['step_ratio']:.2f}",
            "`benchmarks/lean_forward.py`",
        )
        for run in value
    ]


def streams(value: Any) -> Rows:
    """Planned streams on simulated machines."""
    return [
        (
            "streams as planned for random simulated machines, cold start included, over the bound "
            "max(compute, copy, read)",
            f"{value['reach_98']:,} of {value['machines']:,} reach 98 %; "
            f"{value['held_back_by_short_rings']} are held back by short rings, which their "
            f"budgets force, and {value['below']} by something else; the worst reaches "
            f"{value['worst']:.2f}",
            "`benchmarks/overlap.py`",
        )
    ]


def steadiness(value: Any) -> Rows:
    """Whether anything grows."""
    grown = value["growth"]
    rest = sum(grown[name] for name in grown if name != "rss_bytes")
    return [
        (
            f"{value['steps']} denoising steps of a small model under tight budgets, "
            f"{value['read_bytes'] / 1e9:.1f} GB read: growth of resident memory; of VRAM, RAM, "
            "descriptors and threads together",
            f"{grown['rss_bytes'] / 1e6:+.1f} MB; {rest:+.0f}",
            "`benchmarks/soak.py`",
        )
    ]


def disk(value: Any) -> Rows:
    """The disk tier beside plain reads."""
    return [
        (
            "disk tier over plain sequential direct reads of the same file, cold, "
            f"{value['size_bytes'] / 1e9:.1f} GB in {value['block_bytes'] / 1e6:.0f} MB blocks, "
            "one run, median of 3: files as users have them; packs",
            f"{value['raw']['ratio']:.2f}; {value['pack']['ratio']:.2f}",
            "`benchmarks/disk_tier.py`",
        )
    ]


def starts(value: Any) -> Rows:
    """How soon commands begin, beside an earlier build."""
    return [
        (
            "CPU time of `penstock demo` as a whole, and of `generate` with the model in the box "
            "up to its first denoising step, over an earlier build's, pairs in one run",
            f"{value['demo']['ratio']:.2f}; {value['generate']['ratio']:.2f}",
            "`benchmarks/start_up.py`",
        )
    ]


def light(value: Any) -> Rows:
    """Plans and refusals without torch."""
    found = value["results"]
    commands = [name for name in found if name != "import torch"]
    longest = max(found[name]["here"]["longest_wall_s"] for name in commands)
    return [
        (
            "CPU time over that of `import torch` alone, one run, median of "
            f"{value['rounds']}: {'; '.join(commands)}",
            "; ".join(f"{found[name]['over_import_torch']:.2f}" for name in commands)
            + f" (on the wall {longest:.1f} s at the longest)",
            "`benchmarks/light_plan.py`",
        )
    ]


def jobs(value: Any) -> Rows:
    """Real jobs beside their plans."""
    seconds = value["seconds_predicted_over_measured"]
    near = sum(0.75 <= row["seconds"] <= 1.25 for row in value["rows"])
    return [
        (
            f"real jobs on the CPU under {len(value['rows'])} pairs of budgets: ledgers; resident "
            "memory over the plan's peak; predicted over measured CPU seconds ([Plans](plans.md))",
            f"{between(value['ledger_measured_over_predicted'])}; "
            f"{between(value['rss_measured_over_predicted'], 3)}; {between(seconds)}, "
            f"{near} of {len(value['rows'])} within 25 %",
            "`benchmarks/saved.py`",
        )
    ]


ROWS: Mapping[str, Callable[[Any], Rows]] = {
    "fake_dit": activations,
    "fake_vae": frames,
    "plans_peaks": predictions,
    "vae_reuse_2core_cpu": reuse,
    "earlier_2core_cpu": builds,
    "lean_forward_2core_cpu": forwards,
    "overlap_simulated": streams,
    "soak_2core_cpu": steadiness,
    "disk_tier_2core_cpu": disk,
    "start_up_2core_cpu": starts,
    "light_plan_2core_cpu": light,
    "saved_2core_cpu": jobs,
}
"""By the name of the file of results."""


def real_runs(results: Results) -> str:
    """Real jobs on the CPU beside their plans, phase by phase."""
    value = results["saved_2core_cpu"]
    rows: Rows = [
        (
            "ledgers, every phase, VRAM and RAM, measured over predicted",
            between(value["ledger_measured_over_predicted"], 3),
        ),
        (
            "growth of resident memory over the plan's peak",
            between(value["rss_measured_over_predicted"], 3),
        ),
    ]
    for phase in value["rows"][0]["rss_of_phases"]:
        pairs = [row["rss_of_phases"][phase] for row in value["rows"]]
        told = between([measured / planned for measured, planned in pairs])
        rows.append((f"the same of a phase: {phase}", told))
    seconds = [row["seconds"] for row in value["rows"]]
    near = sum(0.75 <= each <= 1.25 for each in seconds)
    told = f"{between(seconds)}, {near} of {len(seconds)} within 25 %"
    rows.append(("seconds of the job, predicted over measured", told))
    for phase in value["rows"][0]["seconds_of_phases"]:
        pairs = [row["seconds_of_phases"][phase] for row in value["rows"]]
        told = between([planned / measured for planned, measured in pairs])
        rows.append((f"of a phase: {phase}", told))
    rows.append(("one and the same small work after a row over before it", between(value["drift"])))
    return table(("", "least and most"), rows)


def pipelines(results: Results) -> str:
    """Pipelines of diffusers that were run attached, with the bytes that were planned and seen."""
    headings = ("recipe", "class", "equal", "weights", "VRAM", "RAM", "peak", "planned")
    rows: Rows = [
        (
            row["recipe"],
            row["pipeline"],
            "yes" if row["equal"] and row["equal_after"] else "NO",
            *(f"{row[name]:,}" for name in ("weights", "vram", "ram", "peak", "planned")),
        )
        for row in results["pipelines_2core_cpu"]["outcomes"]
    ]
    return table(headings, rows)


def pipeline_classes(results: Results) -> str:
    """Every pipeline class of diffusers, and what was seen or read of it."""
    rows: Rows = [
        (row["pipeline"], row["verdict"], row["why"])
        for row in results["pipelines_2core_cpu"]["verdicts"]
    ]
    return table(("class", "verdict", "why"), rows)
