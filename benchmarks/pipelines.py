"""Pipelines of diffusers, attached: what tiny random ones compute, and a verdict on every class.

    python -m benchmarks.pipelines [--only NAME ...] [--classes] [--results FILE] [--table FILE]

The last line on stdout is JSON. Each recipe of `benchmarks.tiny_pipelines` is called as it is, then
attached under the least budgets that are not refused, called again, detached, and called once more:
results are compared to the bit, and memory by `tests.meter`. ``--classes`` looks at every pipeline
class of diffusers: at what its components are, not at what it computes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import typing
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import penstock
from benchmarks.tiny_pipelines import RECIPES, Tiny, build
from penstock.engine.attach.units import find_units
from penstock.errors import OverBudget
from tests.meter import StorageMeter

ROOM = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe; sizes in bytes.

    Attributes:
        pipeline: its class.
        equal: attached, the same bits as without.
        equal_after: detached, again.
        weights: of all components.
        vram, ram: the least budgets, which it ran in.
        peak: the most that tensors took, weights outside the streams excluded.
        planned: the most that was reserved in both memories, and what the plain call takes besides
            its weights.
        read: from disk, of one call.
    """

    recipe: str
    pipeline: str
    equal: bool
    equal_after: bool
    weights: int
    vram: int
    ram: int
    peak: int
    planned: int
    read: int


def weights_of(pipe: Any) -> list[Tensor]:
    """Parameters and buffers of all components."""
    modules = [each for each in pipe.components.values() if isinstance(each, nn.Module)]
    return [t for each in modules for t in (*each.parameters(), *each.buffers())]


def least(pipe: Any, folder: Path, **asked: Any) -> tuple[int, int]:
    """The least VRAM and RAM, as the refusals of less name them."""
    needs = []
    for vram, ram in ((1, ROOM), (ROOM, 1)):
        try:
            penstock.attach(pipe, vram=vram, ram=ram, device="cpu", folder=folder, **asked)
        except OverBudget as refused:
            needs.append(refused.need_bytes)
        else:
            raise AssertionError(f"{vram} and {ram} bytes were not refused")
    return needs[0], needs[1]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether all tensors are equal, to the bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def attached(name: str, tiny: Tiny, folder: Path, **asked: Any) -> Outcome:
    """One recipe under the least budgets."""
    pipe = tiny.pipe
    wanted = tiny.call()
    with StorageMeter(weights_of(pipe)) as resident:
        tiny.call()
    weights = sum({id(t): t.nbytes for t in weights_of(pipe)}.values())
    vram, ram = least(pipe, folder, **asked)
    kept = weights_of(pipe)
    with (
        StorageMeter(kept) as meter,
        penstock.attach(pipe, vram=vram, ram=ram, device="cpu", folder=folder, **asked) as handle,
    ):
        meter.peak = meter.live
        equal = same(tiny.call(), wanted)
        report, peak = handle.report, meter.peak
    return Outcome(
        recipe=name,
        pipeline=type(pipe).__name__,
        equal=equal,
        equal_after=same(tiny.call(), wanted),
        weights=weights,
        vram=vram,
        ram=ram,
        peak=peak,
        planned=report.peak_vram_bytes + report.peak_ram_bytes + resident.peak,
        read=report.read_bytes,
    )


@dataclass(frozen=True)
class Verdict:
    """On a class of pipelines that was looked at.

    Attributes:
        verdict: "runs" (seen), "should run" (its components are torch modules), "refused" or
            "not here" (a package that it needs is not installed).
        why: the components and their blocks, or the reason.
    """

    pipeline: str
    verdict: str
    why: str


def _lists(kind: type) -> str:
    """The blocks of a model of diffusers as its class makes it by default."""
    if not issubclass(kind, diffusers.ModelMixin):
        return kind.__name__
    try:
        with torch.device("meta"):
            units = find_units(kind())
    except (TypeError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        return f"{kind.__name__} (no default: {type(error).__name__})"
    counts = Counter(unit.list_name for unit in units)
    if len(counts) > 4:
        return f"{kind.__name__} ({len(units)} blocks in {len(counts)} lists)"
    lists = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{kind.__name__} ({lists or 'whole'})"


class Inspector:
    """Verdicts on classes, by the types of their components.

    Args:
        seen: classes that were attached.
    """

    def __init__(self, seen: dict[str, str]) -> None:
        self._seen = seen
        self._known: dict[type, str] = {}

    def look(self, kind: Any) -> Verdict:
        """At one class."""
        name = kind.__name__
        if name in self._seen:
            return Verdict(name, "runs", f"seen: {self._seen[name]}")
        if getattr(kind, "_backends", None) is not None:
            return Verdict(name, "not here", "needs " + ", ".join(kind._backends))
        if name.startswith(("Onnx", "Flax")):
            return Verdict(name, "refused", "its components are no torch modules")
        if inspect.isabstract(kind) or kind in (diffusers.DiffusionPipeline,
                                                diffusers.ModularPipeline):  # fmt: skip
            return Verdict(name, "refused", "no components: what its subclasses are counts")
        modules = self._modules(kind)
        if not modules:
            return Verdict(name, "should run", "takes what components its blocks ask for")
        notes = [self._lists(each) for each in modules]
        if "upcast_vae" in inspect.getsource(kind):
            notes.append("an fp16 VAE that asks for fp32 must be cast before attaching")
        return Verdict(name, "should run", "; ".join(notes))

    def _lists(self, kind: type) -> str:
        if kind not in self._known:
            self._known[kind] = _lists(kind)
        return self._known[kind]

    def _modules(self, kind: Any) -> list[type]:
        """Torch modules among the types that its constructor, or its blocks, name."""
        if issubclass(kind, diffusers.ModularPipeline):
            return _modular_modules(kind)
        try:
            hints = typing.get_type_hints(kind.__init__)
        except (NameError, TypeError):
            hints = dict(kind.__init__.__annotations__)
        found = [each for hint in hints.values() for each in (typing.get_args(hint) or (hint,))]
        return [each for each in found if isinstance(each, type) and issubclass(each, nn.Module)]


def _modular_modules(kind: Any) -> list[type]:
    import diffusers.modular_pipelines as modular

    blocks = getattr(modular, str(kind.default_blocks_name), None)
    if blocks is None or getattr(blocks, "_backends", None) is not None:
        return []
    hints = [spec.type_hint for spec in blocks().expected_components]
    return [each for each in hints if isinstance(each, type) and issubclass(each, nn.Module)]


def classes(seen: dict[str, str]) -> list[Verdict]:
    """Verdicts on all pipeline classes that diffusers exports."""
    inspector = Inspector(seen)
    verdicts = []
    for name in sorted(dir(diffusers)):
        if name.endswith("Pipeline") and not name.startswith("AutoPipeline"):
            kind = getattr(diffusers, name)
            if isinstance(kind, type):
                verdicts.append(inspector.look(kind))
    return verdicts


def table(outcomes: list[Outcome], verdicts: list[Verdict]) -> str:
    """Both as Markdown."""
    lines = [
        "# Pipelines of diffusers under `penstock.attach`",
        "",
        "Made by `python -m benchmarks.pipelines --classes --table docs/pipelines.md` with "
        f"diffusers {diffusers.__version__} and torch {torch.__version__}.",
        "",
        "## Seen: tiny random pipelines at the least budgets, fp32, on the CPU",
        "",
        "Equal means equal to the plain pipeline to the bit, attached and after `detach`. Peak is "
        "what an independent meter saw, planned what was reserved and what the plain call takes "
        "besides its weights; bytes.",
        "",
        "| recipe | class | equal | weights | VRAM | RAM | peak | planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {o.recipe} | {o.pipeline} | {'yes' if o.equal and o.equal_after else 'NO'} | "
        f"{o.weights:,} | {o.vram:,} | {o.ram:,} | {o.peak:,} | {o.planned:,} |"
        for o in outcomes
    ]
    if verdicts:
        lines += [
            "",
            "## Looked at: every pipeline class",
            "",
            "*runs*: seen above. *should run*: inspected only: its components are torch modules "
            "(in brackets the lists of blocks of a transformer as its class makes it by default; "
            "*whole*: it has none, and comes and goes as one). *not here*: a package that it needs "
            "was not installed.",
            "",
            "| class | verdict | why |",
            "|---|---|---|",
        ]
        lines += [f"| {v.pipeline} | {v.verdict} | {v.why} |" for v in verdicts]
    return "\n".join(lines) + "\n"


def _earlier(results: Path | None) -> tuple[dict[str, Outcome], list[Verdict]]:
    """Of runs before, with the same versions."""
    if results is None or not results.exists():
        return {}, []
    found = json.loads(results.read_text())
    if (found["diffusers"], found["torch"]) != (diffusers.__version__, torch.__version__):
        return {}, []
    outcomes = {each["recipe"]: Outcome(**each) for each in found["outcomes"]}
    return outcomes, [Verdict(**each) for each in found["verdicts"]]


def main() -> None:
    """Run the recipes, look at the classes, and say what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=list(RECIPES))
    parser.add_argument("--classes", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    outcomes, verdicts = _earlier(asked.results)
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only:
            outcomes[name] = attached(name, build(name), Path(folder), exact=True)
            _kept(outcomes, verdicts, asked.results)
            print(outcomes[name], flush=True)
    if asked.classes:
        verdicts = classes({})
    seen = {o.pipeline: o.recipe for o in outcomes.values() if o.equal and o.equal_after}
    verdicts = [
        Verdict(each.pipeline, "runs", f"seen: {seen[each.pipeline]}")
        if each.pipeline in seen else each
        for each in verdicts
    ]  # fmt: skip
    found = _kept(outcomes, verdicts, asked.results)
    if asked.table is not None:
        rows = [outcomes[name] for name in RECIPES if name in outcomes]
        asked.table.write_text(table(rows, verdicts))
    print(json.dumps(found))


def _kept(
    outcomes: dict[str, Outcome], verdicts: list[Verdict], results: Path | None
) -> dict[str, Any]:
    found = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "outcomes": [asdict(each) for each in outcomes.values()],
        "verdicts": [asdict(each) for each in verdicts],
    }
    if results is not None:
        results.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
