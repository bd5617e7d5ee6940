"""The JSON files in benchmarks/results as tables in README.md and in docs/, and as plots.

    python -m benchmarks.render [--check]

Each table stands between two markers, ``<!-- measured:NAME -->`` and
``<!-- /measured:NAME -->``, and is written anew from the files; nothing in it is typed by hand.
``--check`` changes nothing and fails where a document does not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import known, measured, published
from benchmarks.gpu_plans import step_bytes, vae_phase
from benchmarks.markdown import Results, Rows, gib, mib, named, table
from penstock.engine.bench.plot import Dot, draw
from penstock.units import GIB

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs"
DOCUMENTS = (ROOT / "README.md", *sorted(PLOTS.glob("*.md")))


def main() -> None:
    """Write the tables and the plots, or check the tables."""
    parser = argparse.ArgumentParser(description="Tables and plots of what was measured")
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a difference")
    options = parser.parse_args()
    results = read_results(RESULTS)
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = rendered(before, results)
        if not options.check:
            path.write_text(after, encoding="utf-8")
        elif after != before:
            sys.exit(f"{path.name} differs: run python -m benchmarks.render")
    if options.check:
        return
    for path in plots(results, PLOTS):
        print(path)


def read_results(folder: Path) -> dict[str, Any]:
    """Every JSON file of ``folder`` by its name without the ending; dry runs are left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(value, dict) and value.get("dry_run")):
            found[path.stem] = value
    return found


def rendered(text: str, results: Results) -> str:
    """``text`` with every marked table made anew.

    Raises:
        ValueError: a marker that is not closed, or names no table.
    """
    opened = re.findall(r"<!-- measured:(\w+) -->", text)
    for name in opened:
        if name not in TABLES:
            raise ValueError(f"no table is called {name}; there are {', '.join(TABLES)}")
        pattern = rf"(<!-- measured:{name} -->\n).*?(<!-- /measured:{name} -->)"
        made = TABLES[name](results)
        whole = r"\g<1>" + made.replace("\\", r"\\") + r"\g<2>"
        text, count = re.subn(pattern, whole, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the marker measured:{name} is not closed")
    return text


def streaming(results: Results) -> str:
    """What streams on a CPU machine: the large forward, the disk tier, the peers."""
    rows: Rows = []
    for value in named(results, "big_forward"):
        rows += big_rows(value)
    for value in named(results, "big_h3"):
        rows += big_h3_rows(value)
    for value in named(results, "fake_h3"):
        rows += fake_h3_rows(value)
    for value in named(results, "peers"):
        rows += peer_rows(value)
    if not rows:
        return "Nothing has been measured yet.\n"
    return table(("what", "figure", "shown by"), rows)


def big_rows(value: Any) -> Rows:
    """The forward of a model larger than the memory."""
    stream = value["stream"]
    phases = stream["phases"]
    seconds = sum(phase["seconds"] for phase in phases.values())
    same = "bit-equal to" if value["identical"] else "DIFFERS from"
    return [
        (
            f"{value['parameters'] / 1e9:.1f} B parameters ({value['model']}, "
            f"{value['file_bytes'] / 1e9:.1f} GB on disk), a denoising forward of "
            f"{value['tokens']} tokens, cross-attention K/V included, peak memory of the process",
            f"{value['peak_gib']:.2f} GiB; {seconds:.0f} s on {value['threads']} thread(s); "
            f"{same} the same blocks run one by one",
            "`benchmarks/big_forward.py`",
        )
    ]


def big_h3_rows(value: Any) -> Rows:
    """The forward of MiniMax-H3's blocks."""
    same = "bit-equal to" if value["identical"] else "DIFFERS from"
    return [
        (
            f"{value['parameters'] / 1e9:.1f} B parameters ({value['model']}, "
            f"{value['file_bytes'] / 1e9:.1f} GB on disk), a denoising forward of "
            f"{value['rows']} rows, peak memory of the process",
            f"{value['peak_gib']:.2f} GiB; {same} the same blocks run one by one",
            "`benchmarks/big_h3.py`",
        )
    ]


def fake_h3_rows(value: Any) -> Rows:
    """What a forward of MiniMax-H3 takes beside the weights."""
    return [
        (
            f"MiniMax-H3 at {shape}, activations of a forward, chunks of {value['chunk']} rows",
            f"{row['lean']:.2f} GiB; diffusers {row['diffusers']:.2f} GiB",
            "`benchmarks/fake_h3.py`",
        )
        for shape, row in value.items()
        if isinstance(row, dict)
    ]


def peer_rows(value: Any) -> Rows:
    """The disk tier's rate, and the ratio of each peer."""
    ours, shape = value["peers"].get("penstock_disk", {}), f"{value['model']}, {value['size']}"
    rows: Rows = []
    if "disk_tier_over_plain" in value:
        rows.append(
            (
                f"disk tier in a forward over plain direct reads of the same file, cold, "
                f"{value['file_bytes'] / 1e9:.1f} GB, blocks of {ours['block_bytes'] / 1e9:.2f} GB",
                f"{value['disk_tier_over_plain']:.2f} while it reads, "
                f"{value['forward_over_plain']:.2f} over a whole step",
                "`benchmarks/peers.py`",
            )
        )
    for name, ratios in value.get("against_penstock_disk", {}).items():
        rows.append(
            (
                f"{name.replace('_', ' ')} over penstock from disk, seconds a forward ({shape})",
                f"first {ratios['first_s']:.2f}, later {ratios['step_s']:.2f}",
                "`benchmarks/peers.py`",
            )
        )
    return rows


def gpu(results: Results) -> str:
    """What the GPU suite has found, card by card."""
    parts = [gpu_part(value) for value in named(results, "gpu_suite")]
    parts += [lean_part(value) for value in named(results, "lean_card")]
    return "\n".join(parts) if parts else "The GPU suite has not run on a card yet.\n"


def gpu_part(value: Any) -> str:
    """One card."""
    groups = value["groups"]
    name = groups.get("write", {}).get("machine", {}).get("gpu", "unknown card")
    whole = "" if value.get("complete") else " (cut short, or with failures)"
    parts = [f"**{name}**{whole}\n"]
    for title, headings, rows in (
        ("correctness", ("case", "bit-identical"), correctness_rows(groups)),
        ("speeds of 8 of the 40 blocks, one branch", SPEED_HEADINGS, speed_rows(groups)),
        ("peaks of a guided step at 720x1280x81, all blocks", PEAK_HEADINGS, peak_rows(groups)),
        ("formats", ("kernel", "ms", "TFLOP/s"), kernel_rows(groups)),
        ("VAE at 720x1280x81, bf16", VAE_HEADINGS, vae_rows(groups)),
        ("peers", PEER_HEADINGS, card_peer_rows(groups)),
    ):
        if rows:
            parts.append(f"{title}:\n\n{table(headings, rows)}")
    open_cases = "".join(f"- {line}\n" for line in not_done(groups))
    return "\n".join([*parts, f"Not shown by this run:\n\n{open_cases}"] if open_cases else parts)


LEAN_HEADINGS = ("tokens a chunk", "s/forward", "over diffusers", "activations", "difference")


def lean_part(value: Any) -> str:
    """The lean forward beside diffusers' own on a card."""
    theirs = value["diffusers"]
    rows: Rows = [
        ("diffusers", f"{theirs['seconds'][-1]:.3f}", "", gib(theirs["activation_bytes"]), "")
    ]
    for chunk, row in value["lean"].items():
        rows.append(
            (
                "all" if int(chunk) > 1 << 17 else f"{int(chunk):,}",
                f"{row['seconds'][-1]:.3f}",
                f"{row['ratio']:.3f}",
                gib(row["activation_bytes"]),
                f"{row['relative_difference']:.0e}" if row["relative_difference"] else "none",
            )
        )
    title = f"{value['card']}: the lean forward, {value['blocks']} blocks in bf16, 720x1280x81"
    return f"{title} (`benchmarks/lean_card.py`):\n\n{table(LEAN_HEADINGS, rows)}"


def not_done(groups: Any) -> Iterator[str]:
    """Cases that failed or were left out, with what was said."""
    for group, cases in groups.items():
        for case, found in cases.items():
            said = found.get("failed") or found.get("skipped")
            if said:
                yield f"{group}, {case}: {said.partition('. ')[0]}"


def done(groups: Any, group: str) -> Iterator[tuple[str, Any]]:
    """The cases of a group that came to their end."""
    for case, found in groups.get(group, {}).items():
        if is_done(found):
            yield case, found


def is_done(found: Mapping[str, Any]) -> bool:
    """Whether a case came to its end."""
    return "skipped" not in found and "failed" not in found


def correctness_rows(groups: Any) -> Rows:
    """Each case, and whether it gave the resident model's bits."""
    return [
        (case, "yes" if row["identical"] else "NO") for case, row in done(groups, "correctness")
    ]


SPEED_HEADINGS = (
    "size, weights", "s/forward", "over resident", "computing", "disk GB/s of its ceiling",
)  # fmt: skip


def speed_rows(groups: Any) -> Rows:
    """Each size and place."""
    return [
        (
            case,
            f"{row['s_per_forward']:.3f}",
            f"{row['over_resident']:.3f}",
            f"{row['overlap']:.1%}",
            f"{row['read_gb_per_s']:.2f} of {row['read_ceiling_gb_per_s']:.2f}"
            if case.endswith("disk")
            else "",
        )
        for case, row in done(groups, "speeds")
    ]


PEAK_HEADINGS = (
    "card", "blocks in VRAM / RAM / from disk", "plan", "allocator held", "plan over held",
    "within the card", "s/step, the first",
)  # fmt: skip


def peak_rows(groups: Any) -> Rows:
    """Each cap, beside what plans say of it today."""
    return [
        (
            case,
            "{device_resident} / {host_resident} / {disk_blocks}".format(**row["placement"]),
            gib(step_bytes(row)),
            gib(row["allocated_bytes"]),
            f"{100 * (step_bytes(row) / row['allocated_bytes'] - 1):.1f} %",
            "yes" if row["within_card"] else "NO",
            f"{row['s_per_forward']:.1f}",
        )
        for case, row in caps(groups)
    ]


def caps(groups: Any) -> list[tuple[str, Any]]:
    """The cases of the peaks that imitate a card, the smallest first."""
    cards = [(case, row) for case, row in done(groups, "peaks") if "budget_bytes" in row]
    return sorted(cards, key=lambda item: item[1]["budget_bytes"])


def kernel_rows(groups: Any) -> Rows:
    """Each path and kernel that was timed."""
    return [
        (case, f"{row['ms']:.2f}", f"{row['tflops']:.1f}")
        for case, row in done(groups, "formats")
        if "ms" in row
    ]


VAE_HEADINGS = ("way, tiles", "s", "plan", "tensors", "allocator held", "difference")


def vae_rows(groups: Any) -> Rows:
    """Both ways, tiled and whole, beside what plans say of them today."""
    return [
        (
            f"{case} ({'x'.join(map(str, row['tiles']))})",
            f"{row['s']:.1f}",
            gib(vae_phase(case, row).vram_bytes),
            gib(row["tensor_bytes"]),
            gib(row["allocated_bytes"]),
            f"at most {row['largest_difference']} of 255" if "largest_difference" in row else "",
        )
        for case, row in done(groups, "vae")
    ]


PEER_HEADINGS = ("peer", "first forward, s", "later ones, s", "over penstock", "VRAM")


def card_peer_rows(groups: Any) -> Rows:
    """Others beside penstock with its blocks in RAM, on the card."""
    rows = {name: row for name, row in done(groups, "peers") if "step_s" in row}
    ours = rows.get("penstock_ram")
    return [
        (
            f"{name.replace('_', ' ')} ({row['model']}, {row['size']})",
            f"{row['first_s']:.2f}",
            f"{row['step_s']:.2f}",
            "" if ours is None else f"{row['step_s'] / ours['step_s']:.2f}",
            gib(row["vram_bytes"]),
        )
        for name, row in rows.items()
    ]


def plots(results: Results, folder: Path) -> list[Path]:
    """s/step over VRAM of each card's peaks."""
    made = []
    for name, value in results.items():
        rows = caps(value["groups"]) if name.startswith("gpu_suite") else []
        if rows:
            path = folder / f"{name}.png"
            dots = [Dot(r["allocated_bytes"] / GIB, r["s_per_forward"], cap) for cap, r in rows]
            draw(dots, path, title="Wan2.1 I2V 14B, 720x1280x81, guided: seconds a step",
                 x_label="peak VRAM, GiB", y_label="seconds a step")  # fmt: skip
            made.append(path)
    return made


def formats(results: Results) -> str:
    """Weight formats: what they cost in quality, how fast a CPU decodes them, and their files."""
    parts = [quality(value) for value in named(results, "quality")]
    parts += [decoding(list(named(results, "dequantise")))]
    rows: Rows = []
    for value in named(results, "checked_reads"):
        rows += checked_rows(value)
    for value in named(results, "pack_memory"):
        rows += memory_rows(value)
    parts += [table(("what", "figure", "shown by"), rows)] if rows else []
    return "\n".join(part for part in parts if part) or "Nothing has been measured yet.\n"


def every_format(results: Results) -> str:
    """What each command makes of each way of storing; what is said of those that are not run."""
    (value,) = named(results, "every_format")
    rows: Rows = [
        (
            row["stored"],
            row["label"] + ("" if row["recommended"] else ", not recommended"),
            "the values' own, bit for bit" if row["same"] else "DIFFERS",
            f"{row['packed_cosine']:.5f}",
            "other latents" if row["changed_by_lora"] else "NO CHANGE",
        )
        for row in value["rows"]
    ]
    headings = ("stored as", "inspect", "plan, generate", "pack to int8: cosine", "a LoRA on top")
    refused: Rows = [(row["stored"], row["said"]) for row in value["refused"]]
    return f"{table(headings, rows)}\n{table(('known, not run', 'what is said'), refused)}"


def libraries(results: Results) -> str:
    """Formats, folders and LoRAs beside what the projects that made them make of them."""
    (value,) = named(results, "libraries")
    parts: tuple[tuple[tuple[str, ...], Rows], ...] = (
        (("format", "library", "fp32", "bf16", "beside"), value_rows(value["values"])),
        (
            ("stored by the real tool", "its weights' distance", "its latents'"),
            [
                (row["stored"], share(row["weights"]), share(row["latents"]))
                for row in value["folders"]
            ],
        ),
        (
            ("LoRA, streamed, resident and packed in", *(f"on {name}" for name in BASES)),
            lora_rows(value["loras"]),
        ),
    )
    return "\n".join(table(headings, rows) for headings, rows in parts)


BASES = ("plain", "int8", "gguf")


def value_rows(rows: Sequence[Any]) -> Rows:
    """The largest difference from a library's own values, in each dtype."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["format"], row["library"]), {})[row["dtype"]] = row
    return [
        (*key, share(row["float32"]["difference"]), share(row["bfloat16"]["difference"]),
         beside(row))
        for key, row in found.items()
    ]  # fmt: skip


def beside(row: Mapping[str, Any]) -> str:
    """Where the two differ: which is nearer to the sum in fp64, or to what is rounded once."""
    said = []
    if "ours_off" in row["float32"]:
        ours, theirs = (row["float32"][key] for key in ("ours_off", "theirs_off"))
        said.append(f"off the sum in fp64: ours {ours:.1e}, theirs {theirs:.1e}")
    elif "rounded_once" in row["bfloat16"]:
        once = share(row["bfloat16"]["rounded_once"])
        said.append(f"off the library's fp32 rounded once: ours {once}")
    return "; ".join(said)


def share(value: float) -> str:
    """A relative distance."""
    return "0" if value == 0 else f"{value:.1e}"


def lora_rows(rows: Sequence[Any]) -> Rows:
    """The worst of three ways, for each kind and what it lies on."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        worst = max(row[way] for way in ("streamed", "resident", "packed in"))
        found.setdefault(row["kind"], {})[row["stored"]] = worst
    return [(kind, *(share(cells[name]) for name in BASES)) for kind, cells in found.items()]


def quality(value: Any) -> str:
    """A model in every format."""
    headings = ("format", "layer", "block", "latents", "frames", "bytes a block")
    judged = any(row["score"] is not None for row in value["rows"])
    rows = [
        (
            f"{row['format']}, {row['compute']}",
            f"{max(row['layer_error'], 0):.1e}",
            f"{max(row['block_error'], 0):.1e}",
            decibels(row["latents_psnr"]),
            decibels(row["frames_psnr"]),
            f"{row['block_bytes']:,}",
            *([f"{row['score']:.1%}{' (loses)' if row['loses'] else ''}"] if judged else []),
        )
        for row in value["rows"]
    ]
    scored = (
        "; score: the share of clips that show what was asked, of which one clip is "
        f"{100 / value['clips']:.1f} points; more than two points lost are marked"
    )
    return (
        f"Quality, model {value['model']}, {value['clips']} clip(s), against the weights as "
        "stored: 1 - cosine of the worst matrix and of the worst block, PSNR of latents and frames"
        f"{scored if judged else ''} (`benchmarks/quality.py`):\n\n"
        f"{table((*headings, *(['score'] if judged else [])), rows)}"
    )


def decibels(value: float | None) -> str:
    """PSNR; nothing differs where it is infinite."""
    return "equal" if value is None else f"{value:.1f} dB"


def decoding(runs: Sequence[Any]) -> str:
    """Ratios of CPU time, a column for each shape and dtype."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in (row for run in runs for row in run["results"]):
        rows, columns = row["shape"]
        column = f"{rows}x{columns} {row['dtype']}"
        cell = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        found.setdefault((row["format"], row["against"]), {})[column] = cell
    if not found:
        return ""
    headings = list(dict.fromkeys(column for cells in found.values() for column in cells))
    lines = [
        (*key, *(cells.get(column, "") for column in headings)) for key, cells in found.items()
    ]
    return (
        "Decoding on one core, CPU time of ours over theirs, median and quartiles of a run's "
        'rounds (`benchmarks/dequantise.py`; below 1 ours is faster; "control" is noise; "torch, '
        'rounded" rounds the scale as well, so it gives other values):\n\n'
        + table(("format", "against", *headings), lines)
    )


def checked_rows(value: Any) -> Rows:
    """What comparing with checksums costs."""
    return [
        (
            "reading blocks of a pack and comparing them with their checksums, over reading alone, "
            f"wall time, {value['cores']} cores, busy, {value['direct_share']:.0%} direct",
            f"{value['ratio']:.2f} ({value['low']:.2f} to {value['high']:.2f}); CPU "
            f"{value['checked_cpu_s_per_gb']:.3f} against {value['unchecked_cpu_s_per_gb']:.3f} "
            "s a GB",
            "`benchmarks/checked_reads.py`",
        )
    ]


def memory_rows(value: Any) -> Rows:
    """Peaks of `inspect` and `pack`."""
    inspect, pack = value["inspect"], value["pack"]
    return [
        (
            f"peak of `inspect`, whole process, a file of {inspect['file_bytes'] / 1e9:.1f} GB "
            "(holes for data)",
            f"{mib(inspect['peak_bytes'])} of {mib(inspect['limit_bytes'])} allowed, "
            f"{inspect['seconds']:.2f} s",
            "`benchmarks/pack_memory.py`",
        ),
        (
            f"peak of `pack --format {pack['format']}` beside its libraries, a transformer of "
            f"{pack['file_bytes'] / 1e9:.1f} GB",
            f"{mib(pack['peak_bytes'])} of {mib(pack['budget_bytes'])} allowed",
            "`benchmarks/pack_memory.py`",
        ),
    ]


def long_videos(results: Results) -> str:
    """Ways to make a long video of the small model: what happens in it, and its seams."""
    headings = (
        "frames", "way", "videos", "stretches as asked", "frame difference at a seam / median",
        "largest", "seams within the video's own spread", "CPU s",
    )  # fmt: skip
    rows: Rows = []
    for row in results["long_videos_2core_cpu"]["rows"]:
        seams = ("", "", "")
        if row["jump"] is not None:
            within = f"{100 * row['within']:.0f} %"
            seams = (f"{row['jump']:.2f}", f"{row['largest_jump']:.2f}", within)
        right, cpu = f"{100 * row['right']:.0f} %", f"{row['cpu_s']:.0f}"
        rows.append((str(row["frames"]), row["way"], str(row["clips"]), right, *seams, cpu))
    return table(headings, rows)


def plan_peaks(results: Results) -> str:
    """Profiles and sizes: predicted peaks, and how much they are over the measured ones."""
    headings = (
        "size", "profile", "system RAM", "format", "peak VRAM, GiB", "peak RAM, GiB", "chunk",
        "branches a visit", "hidden states", "blocks", "decode tiles", "over measured",
    )  # fmt: skip
    rows: Rows = [
        (
            row["size"],
            row["profile"],
            f"{row['system_gib']} GiB",
            row["format"],
            f"{row['vram_gib']:.2f} of {row['limit_gib']:.1f}",
            f"{row['ram_gib']:.2f}",
            f"{row['chunk']:,}",
            str(row["branches"]),
            row["residual"],
            f"{row['in_vram']} / {row['in_ram']} / {row['from_disk']}",
            row["decode_tiles"],
            f"{row['over'][0]:.2f} to {row['over'][1]:.2f} %",
        )
        for row in results["plans_peaks"]
    ]
    return table(headings, rows)


def plan_profiles(results: Results) -> str:
    """The same, shortly: a row a profile, a column a size."""
    cells: dict[tuple[str, str], list[Any]] = {}
    for row in results["plans_peaks"]:
        cells.setdefault((row["profile"], row["size"]), []).append(row)
    sizes = list(dict.fromkeys(size for _, size in cells))
    most = max(row["over"][1] for row in results["plans_peaks"])
    rows: Rows = []
    for profile in dict.fromkeys(profile for profile, _ in cells):
        whole = [cells[profile, size] for size in sizes]
        limit, kind = whole[0][0]["limit_gib"], whole[0][0]["format"]
        found = [
            f"{each[0]['vram_gib']:.2f} / {each[0]['ram_gib']:.1f}; "
            f"{each[1]['vram_gib']:.2f} / {each[1]['ram_gib']:.1f}"
            for each in whole
        ]
        rows.append((profile, f"{limit:.1f}", kind, *found))
    return (
        table(("profile", "VRAM ceiling", "format", *sizes), rows)
        + "\nPeaks of VRAM / RAM in GiB with 16; with 64 GiB of system RAM. No phase's peak is "
        "under what the real code takes with the plan's chunks and tiles, at most "
        f"{most:.2f} % over (measured on fake tensors of the true shapes, `benchmarks/plans.py`).\n"
    )


def plan_cards(results: Results, way: str = "default") -> str:
    """Cards, a column for each size: seconds a step, and of the job; one of the ways of
    `benchmarks.plans`."""
    rows = [row for row in results["plans_cards"] if row["way"] == way]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    cards = dict.fromkeys((row["card"], row["profile"]) for row in rows)
    lines = []
    for card, profile in cards:
        mine = {
            row["size"]: row for row in rows if (row["card"], row["profile"]) == (card, profile)
        }
        formats, bounds = (
            " / ".join(dict.fromkeys(row[name] for row in mine.values() if name in row))
            for name in ("format", "bound")
        )
        lines.append((card, profile, formats, *(card_cell(mine[size]) for size in sizes), bounds))
    return table(("card", "profile", "format", *sizes, "bound"), lines)


def plan_models(results: Results) -> str:
    """What is known without files, at its own size: of `benchmarks.plans`."""
    rows = results["plans_models"]
    cards = list(dict.fromkeys(row["card"] for row in rows))
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = {row["card"]: row for row in rows if row["model"] == model}
        one = mine[cards[0]]
        cells = (
            f"{row['format']}, {row['seconds_a_step']:.0f} ({row['total']}), "
            f"{row['vram_gib']:.1f} / {row['ram_gib']:.1f} GiB"
            for row in mine.values()
        )
        lines.append((model, one["size"], str(one["steps"]), *cells))
    return table(("model", "size", "steps", *cards), lines)


def plan_videos(results: Results) -> str:
    """Cards, models and videos: time, format and both peaks."""
    rows = results["plans_videos"]
    headings = ("card", "system RAM", "model", "video", "format", "time", "VRAM", "RAM")
    lines: Rows = [
        (row["card"], row["ram"], row["model"], row["video"], *video_cells(row)) for row in rows
    ]
    return table(headings, lines)


def video_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Format, time and peaks of a plan; what a video that does not fit takes at the least."""
    if "needs_gib" in row:
        return "", f"needs {row['needs_gib']} GiB of {row['needs']}", "", ""
    peaks = f"{row['vram_gib']:.1f} GiB", f"{row['ram_gib']:.1f} GiB"
    return row["format"], duration(row["minutes"]), *peaks


def will_it_run(results: Results) -> str:
    """The same, a row a card: the longer time of models that share a column, the highest peaks;
    and what has been measured of it."""
    columns = ("480p, 4 steps", "480p, 40 steps", "720p, 40 steps", "480p, 20 steps",
               "768p, 40 steps")  # fmt: skip
    rows = results["plans_videos"]
    lines: Rows = []
    for card in dict.fromkeys(row["card"] for row in rows):
        mine = [row for row in rows if row["card"] == card]
        cells = []
        for column in columns:
            asked = [row for row in mine if row["video"] == column]
            fitting = all("minutes" in row for row in asked)
            longest = max((row["minutes"] for row in asked), default=0) if fitting else 0
            cells.append(duration(longest) if fitting else "does not fit")
        fits = [row for row in mine if "minutes" in row]
        vram, ram = (max(row[name] for row in fits) for name in ("vram_gib", "ram_gib"))
        lines.append((card, mine[0]["ram"], *cells, f"{vram:.1f} GiB", f"{ram:.1f} GiB"))
    lines += [held_down(case, row) for value in named(results, "gpu_suite")
              for case, row in caps(value["groups"]) if case == "8 GiB"]  # fmt: skip
    wan, h3 = "Wan2.1 and 2.2, 14B: ", "MiniMax-H3: "
    headings = (wan + columns[0], *columns[1:3], h3 + columns[3], columns[4])
    return table(("card", "RAM", *headings, "VRAM used", "RAM used"), lines)


def held_down(case: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The measured row: a guided 720p step of the whole model, forty times."""
    time = duration(40 * row["s_per_forward"] / 60)
    used = f"**{gib(row['allocated_bytes'])}**"
    return (f"H200 held to {case}, **measured**", "", "", "", f"**{time}**", "", "", used, "")


def duration(minutes: float) -> str:
    """Minutes, as people say them."""
    if minutes < 60:
        return f"{max(1, round(minutes))} min"
    whole = round(minutes)
    return f"{whole // 60} h {whole % 60:02d}" if whole < 24 * 60 else f"{round(whole / 60)} h"


def plan_windows(results: Results) -> str:
    """What a step of a long video moves over what a step of one window does."""
    headings = (
        "card, 12 GB", "size", "frames", "hidden states", "tokens a chunk", "branches a visit",
        "blocks in VRAM", "GB a step", "over 81 frames", "s a step",
    )  # fmt: skip
    lines: Rows = []
    alone = 1.0
    for row in results["plans_windows"]:
        moved = row["gb_a_step"]
        alone = moved if row["frames"] == 81 else alone
        lines.append(
            (
                row["card"],
                row["size"],
                f"{row['frames']} {row['flags']}".strip(),
                row["residual"],
                str(row["chunk"]),
                f"{row['branches']} of {row['of_branches']}",
                str(row["in_vram"]),
                f"{moved:.2f}",
                "" if row["frames"] == 81 else f"{moved / alone:.2f}",
                f"{row['seconds_a_step']:.0f}",
            )
        )
    return table(headings, lines)


def swaps(results: Results) -> str:
    """The swap of two transformers on the simulated machine: of `benchmarks.expert_swap`."""
    rows = results["expert_swap_simulated"]
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["card"], row["ram"]), {})[row["job"]] = f"{row['of_bound']:.3f}"
    lines = [(*who, *(mine.get(job, "") for job in jobs)) for who, mine in cells.items()]
    return table(("card", "RAM", *jobs), lines)


def card_cell(row: Mapping[str, Any]) -> str:
    """Seconds a step and of the job, or what it would take."""
    if "needs_gib" in row:
        return f"needs {row['needs_gib']:.2f} GiB"
    return f"{row['seconds_a_step']:.0f} ({row['total']})"


def caches(results: Results) -> str:
    """Step caches: what is left of the full run, and what a job from disk does not read."""
    headings = ("steps", "method", "setting", "forwards", "of 40 blocks", "frames", "worst clip")
    parts = []
    for value in named(results, "caches"):
        rows = sorted(value["rows"], key=lambda row: (-row["steps"], -row["share"]))
        cells: Rows = [
            (
                str(row["steps"]),
                f"**{row['method']}**" if row["method"] in ("budget", "plan") else row["method"],
                row["setting"],
                f"{row['share']:.3f}",
                f"{row['share_40']:.3f}",
                f"{row['frames_db']:.1f} dB",
                f"{row['worst_db']:.1f} dB",
            )
            for row in rows
        ]
        parts.append(
            f"{value['recipe']['pairs']} held-out clips of the model in the box (`benchmarks/"
            f"caches.py`), penstock's own in bold:\n\n{table(headings, cells)}"
        )
    parts += [cache_parts(value) for value in named(results, "cache_parts")]
    parts += [cached_stream(value) for value in named(results, "cached_stream")]
    return "\n".join(parts) if parts else "Nothing has been measured yet.\n"


def cache_parts(value: Any) -> str:
    """How the forwards of a plan are shared out among two transformers."""
    headings = (
        "Wan2.2 A14B", "steps of the two", "forwards", "by steps", "frames; worst clip",
        "as a job does", "frames; worst clip",
    )  # fmt: skip
    rows: Rows = []
    for row in value["rows"]:
        first, forwards = row["first"], row["forwards"]
        cells = [row["model"], f"{first} and {row['steps'] - first}", str(forwards)]
        for way in ("by_steps", "by_loss"):
            mean, worst = row[f"{way}_db"]
            cells += [f"{row[way]} and {forwards - row[way]}", f"{mean:.1f}; {worst:.1f} dB"]
        rows.append(tuple(cells))
    return (
        "The same model in place of both transformers of Wan2.2 A14B, with its flow shift and "
        f"boundary: {value['recipe']['pairs']} held-out clips, schedules from the record in the "
        f"box (`benchmarks/cache_parts.py`):\n\n{table(headings, rows)}"
    )


def cached_stream(value: Any) -> str:
    """A job from disk under each cache."""
    headings = (
        "cache", "forwards", "read", "saved, of what skipping should save",
        "after the first step: forwards; wall time; CPU time",
        "stall a forward; without a cache",
    )  # fmt: skip
    rows: Rows = [
        (
            row["cache"],
            f"{row['forwards']} of {value['steps']}",
            gib(row["read_bytes"]),
            "" if row["saved_of_expected"] is None else f"{row['saved_of_expected']:.3f}",
            f"{row['forwards_over_full']:.2f}; {row['seconds_over_full']:.2f}; "
            f"{row['cpu_s_over_full']:.2f}",
            f"{1e3 * row['stall_s_a_forward']:.2f} ms; "
            f"{1e3 * row['stall_s_a_forward_full']:.2f} ms",
        )
        for row in value["rows"]
    ]
    title = f"Denoising with all blocks from disk ({value['model']}, `benchmarks/cached_stream.py`)"
    return f"{title}:\n\n{table(headings, rows)}"


@dataclass(frozen=True)
class Fault:
    """A row of what was killed, damaged and starved.

    Attributes:
        test: how the names of its tests end, before their parameters.
        told: finds figures in what they printed; those of several tests are added up, or where
            they have a point the greatest is taken.
        what, outcome: with the figures' names in braces, "passed" among them.
    """

    test: str
    told: str
    what: str
    outcome: str

    def row(self, tests: Mapping[str, Any]) -> tuple[str, str] | None:
        """Of results by test; None where none of it has run."""
        mine = [case for name, case in tests.items() if name.partition("[")[0].endswith(self.test)]
        ran = [case for case in mine if case["outcome"] != "skipped"]
        if not ran:
            return None
        if any(case["outcome"] != "passed" for case in ran):
            return re.sub(r"\{\w+\}", "...", self.what), "FAILED"
        figures: dict[str, Any] = {"passed": len(ran)}
        for case in ran:
            found = re.search(self.told, "\n".join(case["told"]))
            if found is None:
                raise ValueError(f"{self.test} has not printed {self.told}: {case['told']}")
            for key, value in found.groupdict().items():
                if value.replace(",", "").isdecimal():
                    figures[key] = figures.get(key, 0) + int(value.replace(",", ""))
                elif value.replace(".", "", 1).isdecimal():
                    figures[key] = max(figures.get(key, value), value, key=lambda each: float(each))
                else:
                    figures[key] = value
        shown = {k: f"{v:,}" if isinstance(v, int) else v for k, v in figures.items()}
        return self.what.format(**shown), self.outcome.format(**shown)


RACE = r"'{}': \((?P<races>\d+), 0\)"

FAULTS = (
    Fault("::test_sigkill_at_failpoints", r"all (?P<places>\d+) .*, (?P<redone>\d+) steps",
          "SIGKILL before and after every file operation and phase, {places} places",
          "all resumed, frames identical; {redone} steps done again, at most one a job"),
    Fault("::test_sigkill_across_the_swap_of_two_transformers",
          r"at (?P<hit>\d+) of (?P<places>\d+) .*: (?P<redone>\d+) steps",
          "the same of a model of two transformers, {hit} of {places} places",
          "all resumed, frames identical; {redone} steps done again"),
    Fault("::test_sigkill_of_a_job_that_skips_steps",
          r"each of (?P<kills>\d+) steps, identical, (?P<redone>\d+)",
          "SIGKILL of jobs that skip forward passes, after each step, {kills} kills",
          "all resumed, frames identical; {redone} steps done again"),
    Fault("::test_sigkill_of_two_transformers_that_skip_steps",
          r"each of (?P<kills>\d+) steps, (?P<redone>\d+)",
          "the same of two transformers, with records of their steps left by another job between "
          "the {kills} kills and what follows",
          "all resumed with the steps that they began with, frames identical; {redone} steps done "
          "again"),
    Fault("::test_sigkill_of_a_job_with_cheaper_guidance",
          r"each of (?P<steps>\d+) steps: (?P<redone>\d+)",
          "SIGKILL after each step of jobs with guidance at some steps (`--cfg-interval`) or "
          "normalized (`--nag`), {steps} kills",
          "all resumed, frames identical; {redone} steps done again"),
    Fault("::test_sigkill_at_random_moments",
          r"(?P<kills>\d+) kills in (?P<jobs>\d+) jobs, all identical, (?P<redone>\d+)",
          "SIGKILL at random moments, {kills} kills in {jobs} jobs",
          "all resumed, frames identical; {redone} steps done again"),
    Fault("::test_power_loss_leaves_the_old_or_the_new_state", r"(?P<states>\d+) states",
          "power lost after any file operation: what was not synced dropped or torn, {states} "
          "states",
          "always the old or the new state"),
    Fault("::test_out_of_memory_at_every_allocation",
          r"at (?P<places>\d+) of .*: (?P<same>\d+) finished identical, (?P<ended>\d+) ended",
          "out of memory at each of a job's allocations, once, and from there on: {places} runs",
          "{same} finished identical, {ended} ended resumable and finished when resumed"),
    Fault("::test_ram_and_vram_budgets_of_60_to_120_percent_of_the_plan", r"plan: (?P<told>.*)",
          "budgets, % of the plan", "{told}"),
    Fault("::test_address_space_of_60_to_120_percent_of_the_plan", r"plan: (?P<told>.*)",
          "address space of the process limited (RLIMIT_AS), % of the plan", "{told}"),
    Fault("::test_cgroup_of_60_to_120_percent_of_the_plan", r"plan: (?P<told>.*)",
          "memory cgroup, % of the plan", "{told}"),
    Fault("::test_address_space_of_what_was_promised", r"(?P<jobs>\d+) jobs .* (?P<n>\d+) under",
          "RLIMIT_AS at 1.05 of what the report promised for the process: {jobs} jobs of random "
          "budgets, the demo and a model of 1 GB", "all finished, {n} under a smaller plan"),
    Fault("::test_a_cgroup_of_what_was_promised", r"(?P<jobs>\d+) jobs .* is (?P<most>[\d.]+) of",
          "a memory cgroup of 1.05 of it: {jobs} jobs",
          "all finished; the most that one took is {most} of the promise"),
    Fault("::test_hostile_files_in_full", r"(?P<cases>\d+) cases .*: (?P<refused>\d+) refused",
          "{cases} hostile files: headers, GGUF, every config, indices, LoRAs, profiles, extra "
          "paths, tokenizers, pictures",
          "{refused} refused in one line, the others harmless: 0 tracebacks, 0 aborts, 0 over 5 s "
          "of computing, 0 over 1 GiB, 0 files left"),
    Fault("::test_changed_bytes_of_large_weights",
          r"in (?P<size>[\d,]+) .*changes=(?P<n>\d+), packs=(?P<packs>\d+), resumes=(?P<again>\d+)",
          "one byte changed in {size} bytes of weights, {n} times, half of them with the file's "
          "time set back: between two jobs that use a pack, and between stop and resume",
          "{packs} and {again} noticed"),
    Fault("::test_two_hundred_kills_under_fifty_jobs", r"(?s).*\n(?P<kills>\d+) kills met",
          "SIGKILL of the server at random moments under a queue of 50 jobs, {kills} kills",
          "every video made once, frames identical to those of a server that nobody disturbed"),
    Fault("::test_a_hundred_lines_killed_at_any_moment_are_each_made_once",
          r"(?P<lines>\d+) lines, (?P<kills>\d+) kills",
          "SIGKILL of a batch and of its workers: a list of {lines} lines, {kills} kills",
          "each video made once, each line noted once"),
    Fault("::test_no_request_of_many_is_answered_by_a_failure",
          r"(?P<each>\d+) requests of each of (?P<operations>\d+)",
          "requests drawn from the OpenAPI page, {each} of each of {operations} operations",
          "none is answered by a failure of the server's own"),
    Fault("::test_a_path_that_is_no_good_is_one_line", "",
          "each path option with each fault (no permission, a loop, too long, a pipe, a device, a "
          "socket, stale, ...), {passed} pairs",
          "one line and exit code 1 or 2; nothing made, changed or removed"),
    *(Fault("::test_races", RACE.format(name), f"two processes, {what}: {{races}} races", outcome)
      for name, what, outcome in (
          ("one output", "one output's name", "nothing lost, and the loser knows"),
          ("one job", "one job's folder", "nothing lost, and the loser knows"),
          ("a job removed and begun", "a folder whose job is being removed", "nothing lost"),
          ("one cache", "a pack in a cache that is listed and cleared", "nothing lost"),
      )),
)  # fmt: skip


def faults(results: Results) -> str:
    """Killed, damaged and starved; what has not run is named beneath."""
    (value,) = named(results, "faults")
    rows = [(fault, fault.row(value["tests"])) for fault in FAULTS]
    away = dict.fromkeys(fault.test.removeprefix("::") for fault, row in rows if row is None)
    made = table(("what", "outcome"), [row for _, row in rows if row is not None])
    return made + (f"\nNot run again for this table: {', '.join(away)}.\n" if away else "")


TABLES: Mapping[str, Callable[[Results], str]] = {
    "streaming": streaming,
    "gpu": gpu,
    "formats": formats,
    "every_format": every_format,
    "libraries": libraries,
    "caches": caches,
    "long_videos": long_videos,
    "plan_peaks": plan_peaks,
    "plan_cards": plan_cards,
    "plan_models": plan_models,
    "plan_videos": plan_videos,
    "will_it_run": will_it_run,
    "plan_cards_8_bits": partial(plan_cards, way="8 bits"),
    "plan_profiles": plan_profiles,
    "faults": faults,
    "plan_windows": plan_windows,
    "swaps": swaps,
    "on_cpus": measured.on_cpus,
    "held_by_tests": measured.held_by_tests,
    "real_runs": measured.real_runs,
    "pipelines": measured.pipelines,
    "pipeline_classes": measured.pipeline_classes,
    "published": published.beside_ours,
    "published_8_bits": partial(published.beside_ours, way="8 bits"),
    "model_defaults": known.model_defaults,
    "model_parts": known.model_parts,
}


if __name__ == "__main__":
    main()
