"""What the pack of a component will be, to the byte, planned from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.engine.family.protocol import ComponentKind
from penstock.engine.files.formats import compute_tag, is_linear
from penstock.engine.files.keys import ComponentSource, recognise, stored_name
from penstock.engine.files.source import RawFile
from penstock.engine.files.storage import COMFY_METADATA
from penstock.engine.lora.place import PlacedLoras
from penstock.engine.packs.file import PackLayout, lay_out
from penstock.engine.packs.layout import Spec
from penstock.engine.packs.names import FILE_NAMES
from penstock.engine.store.digest import stamp
from penstock.errors import UsageError
from penstock.formats.formats import QuantFormat, get_format, writable
from penstock.formats.gguf import PREFIX as GGUF
from penstock.formats.gguf import Gguf
from penstock.formats.rows import Shape
from penstock.formats.scaled import Scaled8
from penstock.offload.checkpoint import TensorEntry
from penstock.quant.policy import default_policy

_RUNS = ("embedding", "rest", "once", "vision", "encoder", "decoder", "cross", "block")
"""Kinds of runs, in the order in which a pack holds them."""

LEAST_RAM_BYTES = 64 << 20
"""The least memory for weights in work that a pack is made in."""


@dataclass(frozen=True)
class PackStep:
    """How one parameter becomes its packed tensors.

    Attributes:
        name: of the parameter.
        shape: its logical shape.
        made: dtype tag and shape of the packed tensors by suffix.
        kept: the stored tensors are copied as they are.
        format: what it is quantised to, if it is not kept; None: its values are cast.
    """

    name: str
    shape: tuple[int, ...]
    made: Mapping[str, Spec]
    kept: bool
    format: QuantFormat | None


@dataclass(frozen=True)
class ComponentPlan:
    """The pack of one component: where everything goes, and the steps of each of its runs.

    Attributes:
        loras: folded into its weights.
    """

    source: ComponentSource
    layout: PackLayout
    steps: tuple[tuple[PackStep, ...], ...]
    loras: PlacedLoras

    @property
    def file(self) -> str:
        """The pack's path inside the model's folder."""
        return f"{self.source.component}/{FILE_NAMES[self.source.kind.made_by[0]]}"

    def origins(self) -> dict[str, Path]:
        """Return every file that the pack is made from, by a name of its own."""
        files = [*sorted(self.source.raw.stamps)]
        files += [path for lora in self.loras.files for path in sorted(lora.file.stamps)]
        return {f"{index} {path.name}": path for index, path in enumerate(files)}

    def foresee(self, path: Path) -> ComponentSource:
        """Return the component as the pack at ``path`` will hold it, before any of it is made: good
        for plans, and not to be read."""
        layout = self.layout
        entries = {
            t.name: TensorEntry(
                t.name, path, layout.data_start + t.offset, t.dtype, t.shape, t.nbytes
            )
            for run in layout.runs
            for t in run.tensors
        }
        metadata = json.loads(layout.header[8:])["__metadata__"]
        return recognise(RawFile(path, "safetensors", entries, metadata, {}), self.source.config)


def plan_component(
    source: ComponentSource, wanted: str, loras: PlacedLoras | None = None
) -> ComponentPlan:
    """Lay out the pack of ``source``, the block matrices of a transformer stored as ``wanted``.

    Args:
        loras: to fold into its weights.

    Raises:
        UsageError: no such format, or one that is only read.
        CheckpointError: ``source`` is not whole.
    """
    if wanted not in writable():
        raise UsageError(
            "a model cannot be packed in this format",
            expected="one of " + ", ".join(writable()),
            found=repr(wanted),
        )
    source.check()
    loras = loras or PlacedLoras(source, (), ())
    changed = {change.parameter for change in loras.changes()}
    target, tag, shapes = get_format(wanted), compute_tag(source), source.shapes
    chosen = set(default_policy(shapes)) if source.kind.is_packed else set()
    steps = {
        run: tuple(
            _step(source, n, shapes[n], target if n in chosen else None, tag, n in changed)
            for n in names
        )
        for run, names in runs_of(source.kind, shapes).items()
    }
    specs = {
        run: {stored_name(step.name, suffix): spec for step in made
              for suffix, spec in step.made.items()}
        for run, made in steps.items()
    }  # fmt: skip
    about = {
        "component": source.component,
        "format": wanted if chosen else source.label(),
        "compute": tag,
        "gguf": _gguf_types(source, [step for made in steps.values() for step in made]),
        "source": {path.name: stamp(path) for path in sorted(source.raw.stamps)},
        **({"loras": loras.merged_names()} if loras.files else {}),
    }
    texts = _comfy_text(source, [step for made in steps.values() for step in made])
    return ComponentPlan(source, lay_out(specs, about, texts), tuple(steps.values()), loras)


def runs_of(kind: ComponentKind, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Return the parameters by the run they are packed in: what is read at once lies together.

    What leaves a transformer's stream (cross-attention K/V projections) are runs of their own, and
    so is what outside its blocks serves once a job; the text encoder's embedding is gathered by
    rows; the VAE's halves are loaded apart.
    """
    runs: dict[str, list[str]] = {}
    for name in shapes:
        runs.setdefault(_run_of(kind, name), []).append(name)
    return dict(sorted(runs.items(), key=lambda item: _run_order(item[0])))


def _run_of(kind: ComponentKind, name: str) -> str:
    if not (kind.blocks and name.startswith(kind.blocks)):
        return kind.run_outside(name)
    number, _, local = name[len(kind.blocks) :].partition(".")
    return f"{'cross' if kind.leaves_stream(local) else 'block'} {number}"


def _run_order(run: str) -> tuple[int, int]:
    kind, _, number = run.partition(" ")
    return _RUNS.index(kind), int(number or 0)


def _step(
    source: ComponentSource,
    name: str,
    shape: tuple[int, ...],
    target: QuantFormat | None,
    tag: str,
    changed: bool,
) -> PackStep:
    stored = source.weights[name]
    found = stored.specs
    matrix = _matrix(shape)
    if isinstance(target, Scaled8) and matrix is not None:
        target = target.suited(matrix)
    if target is not None and matrix is not None and target.fits(matrix):
        made = target.storage(matrix, tag)
        same = stored.label == target.label and found == made
        return PackStep(name, shape, made, same and not changed, target)
    if target is None and not stored.plain and is_linear(name, shape) and not changed:
        return PackStep(name, shape, found, True, None)
    tag = "F32" if source.kind.keeps_single(name) else tag
    plain: dict[str, Spec] = {"weight": (tag, shape)}
    return PackStep(name, shape, plain, stored.plain and found == plain and not changed, None)


def _matrix(shape: tuple[int, ...]) -> Shape | None:
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _comfy_text(source: ComponentSource, steps: list[PackStep]) -> dict[str, str]:
    """Return what tensors do not tell of rotated weights, as ComfyUI's files do; nothing if none
    is."""
    layers = {}
    for step in steps:
        fmt = source.weights[step.name].format if step.kept else step.format
        if isinstance(fmt, Scaled8) and fmt.rotation:
            layers[step.name.removesuffix(".weight")] = {
                "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": fmt.rotation,
            }  # fmt: skip
    return {COMFY_METADATA: json.dumps({"layers": layers})} if layers else {}


def _gguf_types(source: ComponentSource, steps: list[PackStep]) -> dict[str, str]:
    """Return the ggml type of each packed parameter that is stored as blocks: its bytes do not tell
    it."""
    types = {}
    for step in steps:
        found = source.weights[step.name].tensors.get("weight")
        if isinstance(step.format, Gguf):
            types[step.name] = step.format.ggml_type
        elif step.kept and found is not None and found.dtype.startswith(GGUF):
            types[step.name] = found.dtype.removeprefix(GGUF)
    return types
