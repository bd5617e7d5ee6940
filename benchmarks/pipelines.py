"""Pipelines of diffusers, attached: what tiny random ones compute, and a verdict on every class.

    python -m benchmarks.pipelines [--only NAME ...] [--classes] [--results FILE]

The last line on stdout is JSON. Each recipe of `benchmarks.tiny_pipelines` is called as it is, then
attached under the least budgets that are not refused, called again, detached, and called once more:
results are compared to the bit, and memory by `tests.meter`. ``--classes`` looks at every pipeline
class of diffusers: at what its components are, not at what it computes. `benchmarks.render` makes
the tables of docs/pipelines.md from the results.
"""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import penstock
from benchmarks.tiny_pipelines import RECIPES, Tiny, build
from penstock.errors import OverBudget
from tests.meter import StorageMeter

ROOM = 1 << 30

UNMETERED = ("Wan-Animate-2",)
"""Compared, but not measured: flex attention does not run under a dispatch mode."""


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
    resident = StorageMeter(weights_of(pipe))
    metered = name not in UNMETERED
    with resident if metered else nullcontext():
        tiny.call()
    weights = sum({id(t): t.nbytes for t in weights_of(pipe)}.values())
    vram, ram = least(pipe, folder, **asked)
    meter = StorageMeter(weights_of(pipe))
    with (
        meter if metered else nullcontext(),
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
        verdict: "runs" (seen), "should run" (its components are torch modules) or "refused".
        why: its torch modules, or the reason.
    """

    pipeline: str
    verdict: str
    why: str


_LIBRARY = ("Model", "ForConditionalGeneration", "ForCausalLM", "WithProjection")
"""Ends of the names of transformers' torch modules."""

_BASES = ("DiffusionPipeline", "ModularPipeline")


class Inspector:
    """Verdicts on pipeline classes by diffusers' source: nothing of it is imported or run."""

    def __init__(self) -> None:
        root = Path(diffusers.__file__).parent
        self._models = {
            node.name for path in sorted((root / "models").rglob("*.py")) for node in _defined(path)
        }
        self._classes: dict[str, tuple[ast.ClassDef, str]] = {}
        for folder in ("pipelines", "modular_pipelines"):
            for path in sorted((root / folder).rglob("*.py")):
                source = path.read_text(encoding="utf-8")
                for node in _defined(path):
                    self._classes[node.name] = node, source

    def look(self, name: str) -> Verdict:
        """At one class."""
        if name in _BASES:
            return Verdict(name, "refused", "no components: what its subclasses are counts")
        if name.startswith(("Onnx", "Flax")):
            return Verdict(name, "refused", "its components are no torch modules")
        if name.endswith("ModularPipeline"):
            return Verdict(name, "should run", "takes the components that its blocks ask for")
        modules = self._modules(name)
        if not modules:
            return Verdict(name, "should run", "states no types: takes what it is given")
        node, source = self._classes[name]
        casts = "upcast_vae" in (ast.get_source_segment(source, node) or "")
        note = "; a VAE in fp16 that asks for fp32 is refused: cast it before" if casts else ""
        return Verdict(name, "should run", ", ".join(modules) + note)

    def _modules(self, name: str) -> list[str]:
        """Torch modules among the annotations of its constructor, or of its base's."""
        if name not in self._classes:
            return []
        node, _ = self._classes[name]
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                given = [each.annotation for each in (*item.args.args, *item.args.kwonlyargs)]
                named = [name for each in given if each is not None for name in _names(each)]
                return list(dict.fromkeys(name for name in named if self._is_module(name)))
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return next((found for base in bases if (found := self._modules(base))), [])

    def _is_module(self, name: str) -> bool:
        return name in self._models or name.endswith(_LIBRARY)


def _defined(path: Path) -> list[ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def _names(annotation: ast.expr) -> list[str]:
    found = []
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def class_names() -> list[str]:
    """All pipeline classes that diffusers exports."""
    return [each for each in sorted(dir(diffusers)) if each.endswith("Pipeline")]


def classes(names: Iterable[str]) -> list[Verdict]:
    """Verdicts on pipeline classes of diffusers."""
    inspector = Inspector()
    return [inspector.look(each) for each in names]


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
    asked = parser.parse_args()
    outcomes, verdicts = _earlier(asked.results)
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only:
            outcomes[name] = attached(name, build(name), Path(folder), exact=True)
            _kept(outcomes, verdicts, asked.results)
            print(outcomes[name], flush=True)
    if asked.classes:
        verdicts = classes(class_names())
    seen = {o.pipeline: o.recipe for o in outcomes.values() if o.equal and o.equal_after}
    verdicts = [
        Verdict(each.pipeline, "runs", f"seen: {seen[each.pipeline]}")
        if each.pipeline in seen else each
        for each in verdicts
    ]  # fmt: skip
    print(json.dumps(_kept(outcomes, verdicts, asked.results)))


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
