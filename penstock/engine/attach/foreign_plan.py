"""What a call of any pipeline will take: its networks by their headers, its work rehearsed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from penstock._version import __version__
from penstock.engine.attach.calling import NoBar, arguments_of, bars, output_of
from penstock.engine.attach.diffusers_folder import Opened
from penstock.engine.attach.foreign import ForeignModule, modules_of
from penstock.engine.attach.generic import DENOISERS, check_budget, guests_of
from penstock.engine.attach.keeping import RECORDS, Counted, Counter, Kept, kept_of
from penstock.engine.attach.rehearsal import Rehearsed, Visit, rehearse
from penstock.engine.store.durable import FileOps, read_whole, write_atomically
from penstock.engine.store.sealed import open_json, seal_json
from penstock.errors import JournalError, OverBudget
from penstock.folders import cache_folder
from penstock.formats.formats import QuantFormat
from penstock.profiles.hardware import Hardware
from penstock.profiles.policy import Limits
from penstock.profiles.rates import Rates
from penstock.profiles.streams import Network, Pace, best_stream

log = logging.getLogger(__name__)

_STEPS = "num_inference_steps"
REPEATING = (*DENOISERS, "controlnet")
"""What the names of networks begin with that every step calls."""

_REHEARSED_STEPS = 2
"""The others repeat them."""

TILED = "its VAE decodes in tiles that blend: whole frames do not fit"
RESTARTS = "not resumable, a job that is stopped begins again"
UNMEASURED = "how much its calls give is not known without a rehearsal"


@dataclass(frozen=True)
class NetworkPlan:
    """What one network takes; all in bytes.

    Attributes:
        name: of the component.
        weight_bytes: of all its weights.
        blocks: how many stream; 0: it comes whole.
        outside_bytes: on the device while it works: what is in no block.
        block_bytes: of the largest block.
        activation_bytes: on the device meanwhile: what is computed, the pipeline's own tensors
            counted.
        calls: of its forward in a whole call, about.
        seconds: of them all, its weights' way included; None: what it computes is not known.
    """

    name: str
    weight_bytes: int
    blocks: int
    outside_bytes: int
    block_bytes: int
    activation_bytes: int
    calls: int
    seconds: float | None = None

    @property
    def vram_bytes(self) -> int:
        """The least that it runs in."""
        return self.outside_bytes + self.block_bytes + self.activation_bytes


@dataclass(frozen=True)
class CallPlan:
    """What a call of a pipeline takes.

    Attributes:
        pipeline: its class.
        networks: those that work, in the order in which they do.
        vram_bytes, ram_bytes: the least that it runs in.
        vram_limit_bytes, ram_limit_bytes: the budgets.
        notes: what a user should know.
        seconds: of the whole call, by this machine's rates; None: not known.
        kept: for a resume; None: nothing is, and a note says why.
    """

    pipeline: str
    networks: tuple[NetworkPlan, ...]
    vram_bytes: int
    ram_bytes: int
    vram_limit_bytes: int
    ram_limit_bytes: int
    notes: tuple[str, ...]
    seconds: float | None = None
    kept: Kept | None = None

    @property
    def work_bytes(self) -> dict[str, int]:
        """Activations by network."""
        return {each.name: each.activation_bytes for each in self.networks}

    def to_json(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        return asdict(self)


def plan_call(
    opened: Opened,
    given: Mapping[str, Any],
    hardware: Hardware,
    fmt: QuantFormat | None = None,
    activations: int | None = None,
) -> CallPlan:
    """Say what ``opened.pipe(**given)`` takes. Where whole frames do not fit, its VAE's own tiling
    is switched on.

    Args:
        activations: bytes, where they are known; None: the call is rehearsed.

    Raises:
        OverBudget: it does not fit; names the least that does.
        UsageError: it cannot be rehearsed.
    """
    before = _in_tiles(opened.pipe)
    found = _plan(opened, given, hardware, fmt, activations)
    if activations is None and _tiled(opened.pipe, found, hardware.vram_bytes):
        found = _plan(opened, given, hardware, fmt, None)
    if _in_tiles(opened.pipe) != before:
        found = replace(found, notes=(*found.notes, TILED))
    if found.vram_bytes > hardware.vram_bytes:
        worst = max(found.networks, key=lambda each: each.vram_bytes)
        items = (
            (f"{worst.name}: activations", worst.activation_bytes),
            (f"{worst.name}: one block, and what is in none",
             worst.outside_bytes + worst.block_bytes),
            ("buffers", found.vram_bytes - worst.vram_bytes),
        )  # fmt: skip
        raise OverBudget(
            "VRAM", found.vram_bytes, hardware.vram_bytes, items,
            f"Give vram={found.vram_bytes} or more, or ask for fewer pixels or frames",
        )  # fmt: skip
    if found.ram_bytes > hardware.ram_bytes:
        records = 0 if found.kept is None else found.kept.ram_bytes
        raise OverBudget(
            "RAM", found.ram_bytes, hardware.ram_bytes,
            (("one block", found.ram_bytes - records), (RECORDS, records)),
            f"Give ram={found.ram_bytes} or more",
        )  # fmt: skip
    return found


def _plan(
    opened: Opened,
    given: Mapping[str, Any],
    hardware: Hardware,
    fmt: QuantFormat | None,
    activations: int | None,
) -> CallPlan:
    pipe = opened.pipe
    seen, counted = None, None
    if activations is None:
        seen, counted = _rehearsed(opened, given, hardware.vram_bytes)
    roomy = replace(hardware, vram_bytes=1 << 62)
    _, guests, fixed = guests_of(pipe, roomy, fmt, 0, opened.files)
    check_budget(roomy, fixed, guests)
    steps = steps_of(pipe, given)
    scale = max(steps, 1) / min(max(steps, 1), _REHEARSED_STEPS)
    held = sum(nbytes for _, nbytes in fixed)
    kept = _kept(pipe, counted, max(steps, 1), [each.name for each in guests])
    networks = []
    order = [] if seen is None else list(dict.fromkeys(v.component for v in seen.visits))
    for guest in sorted(guests, key=lambda each: (*order, each.name).index(each.name)):
        calls = 0 if seen is None else seen.calls_of(guest.name)
        if seen is not None and not calls:
            continue
        work = activations if seen is None else seen.peak_of(guest.name)
        repeats = scale if guest.name.startswith(REPEATING) else 1.0
        held_bytes = held + guest.outside_bytes + (work or 0)
        room = Limits(hardware.vram_bytes - held_bytes, hardware.ram_bytes)
        seconds = None if seen is None else _seconds(
            guest, seen.flops.get(guest.name, {}), calls, repeats, room, hardware.rates
        )  # fmt: skip
        networks.append(
            NetworkPlan(
                guest.name, guest.weight_bytes, guest.blocks, guest.outside_bytes,
                guest.least_vram_bytes - guest.outside_bytes, work or 0,
                round(calls * repeats), seconds,
            )
        )  # fmt: skip
    return CallPlan(
        pipeline=type(pipe).__name__,
        networks=tuple(networks),
        vram_bytes=held + max(each.vram_bytes for each in networks),
        ram_bytes=max(each.least_ram_bytes for each in guests)
        + (kept.ram_bytes if isinstance(kept, Kept) else 0),
        vram_limit_bytes=hardware.vram_bytes,
        ram_limit_bytes=hardware.ram_bytes,
        notes=(*opened.notices, kept.told() if isinstance(kept, Kept) else f"{RESTARTS}: {kept}"),
        seconds=_sum(each.seconds for each in networks),
        kept=kept if isinstance(kept, Kept) else None,
    )


def _kept(pipe: Any, counted: Counted | None, steps: int, networks: list[str]) -> Kept | str:
    """Return what is kept of a call for a resume; or why nothing is."""
    if counted is None:
        return UNMEASURED
    order = getattr(getattr(pipe, "scheduler", None), "order", 1)
    named = [name for name in networks if name.startswith(REPEATING)]
    return kept_of(counted, min(steps, _REHEARSED_STEPS), steps, order, named)


def _sum(seconds: Iterable[float | None]) -> float | None:
    total = 0.0
    for each in seconds:
        if each is None:
            return None
        total += each
    return total


def _seconds(
    guest: ForeignModule,
    flops: Mapping[str, int],
    calls: int,
    repeats: float,
    room: Limits,
    rates: Rates,
) -> float | None:
    """Return the seconds of all calls of a network: what it computes beside its blocks' way to the
    device.

    Args:
        flops: of the calls that were rehearsed, by kind.
        calls: that were rehearsed.
        repeats: times they come in the whole.
        room: for its blocks.
    """
    attention = rates.attention_flops or rates.flops
    convolution = rates.conv_flops or rates.flops
    compute_s = flops.get("product", 0) / rates.flops + flops.get("attention", 0) / attention
    compute_s += flops.get("convolution", 0) / convolution
    outside_s = guest.outside_bytes * (1 / rates.read_bytes_per_s + 1 / rates.copy_bytes_per_s)
    passes = round(calls * repeats)
    if not guest.blocks or not passes:
        return compute_s * repeats + outside_s
    stream = best_stream(
        Network.of(guest.block_sizes), Pace(compute_s / calls, passes), rates, room
    )
    return None if stream is None else stream.timing.seconds + outside_s


def steps_of(pipe: Any, given: Mapping[str, Any]) -> int:
    """Return the steps of ``pipe(**given)``; 0: the pipeline names none."""
    known = arguments_of(pipe).get(_STEPS)
    found = given.get(_STEPS, None if known is None else known.default)
    return found if isinstance(found, int) else 0


def _in_tiles(pipe: Any) -> set[str]:
    """Return the networks that work in tiles of their own."""
    return {n for n, each in modules_of(pipe).items() if getattr(each, "use_tiling", False)}


def _tiled(pipe: Any, found: CallPlan, vram_bytes: int) -> list[str]:
    """Switch on the tiling of networks that have one and do not fit; their names."""
    modules, names = modules_of(pipe), []
    for each in found.networks:
        tiling = getattr(modules[each.name], "enable_tiling", None)
        if each.vram_bytes > vram_bytes and tiling is not None:
            tiling()
            names.append(each.name)
    return names


def _rehearsed(opened: Opened, given: Mapping[str, Any], limit: int) -> tuple[Rehearsed, Counted]:
    """Return the call's shapes and what its networks give, from the cache where the same was
    rehearsed before. What goes over ``limit`` bytes and can be tiled is tiled from then on."""
    modules: Mapping[str, Any] = modules_of(opened.pipe)
    path = cache_folder() / "rehearsals" / f"{_key(opened, given)}.json"
    ops = FileOps()
    stored = stored_rehearsal(ops, path)
    if stored is not None:
        found, counted, then = stored
        if _holds(found, then, limit, modules):
            for name in found.tiled:
                modules[name].enable_tiling()
            return found, counted
    counter = Counter()
    with counter.watched(modules):
        found = rehearse(
            modules, lambda: call_briefly(opened.pipe, given, counter.bar), limit=limit
        )
    counted = replace(counter.counted, timesteps=_timesteps(opened.pipe))
    value = {
        "visits": [[v.component, v.peak_bytes] for v in found.visits],
        "uses": found.uses,
        "peak_bytes": found.peak_bytes,
        "tiled": found.tiled,
        "flops": found.flops,
        "limit": limit,
        "calls": counted.to_json(),
    }
    ops.mkdir(path.parent)
    write_atomically(ops, path, [seal_json(value)])
    return found, counted


def _timesteps(pipe: Any) -> int:
    """Return how many the scheduler has; 0: there is none, or it does not tell."""
    found = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return len(found) if isinstance(found, torch.Tensor) and found.ndim == 1 else 0


def stored_rehearsal(ops: FileOps, path: Path) -> tuple[Rehearsed, Counted, int] | None:
    """Return what was rehearsed before, which calls, and under which limit; None where nothing is,
    or it is damaged."""
    try:
        stored = read_whole(ops, path)
        if stored is None:
            return None
        value = open_json(stored)
        visits = tuple(Visit(*each) for each in value["visits"])
        tiled = tuple(value["tiled"])
        found = Rehearsed(visits, value["uses"], value["peak_bytes"], tiled, value["flops"])
        return found, Counted.from_json(value["calls"]), int(value["limit"])
    except (JournalError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.info("%s is made anew: %s", path, error)
        return None


def _holds(found: Rehearsed, then: int, now: int, modules: Mapping[str, Any]) -> bool:
    """Return whether what was rehearsed under the limit ``then`` is what would be under ``now``:
    the same networks go over it."""
    whole = [name for name, each in modules.items()
             if hasattr(each, "enable_tiling") and name not in found.tiled]  # fmt: skip
    return (not found.tiled or now <= then) and all(found.peak_of(name) <= now for name in whole)


def call_briefly(
    pipe: Any,
    given: Mapping[str, Any],
    bar: Callable[[int], NoBar] = lambda total: NoBar(),
) -> Any:
    """Return the call with as few steps as show all that it does; ``bar`` is told of its loops."""
    arguments = dict(given)
    known = arguments_of(pipe)
    if _STEPS in known:
        steps = arguments.get(_STEPS, known[_STEPS].default)
        if isinstance(steps, int):
            arguments[_STEPS] = min(steps, _REHEARSED_STEPS)
    with bars(pipe, bar):
        return pipe(**arguments, **output_of(pipe))


def _key(opened: Opened, given: Mapping[str, Any]) -> str:
    """Return a key of all that determines the shapes: classes, configs, arguments, versions,
    tiling."""
    import diffusers
    import transformers

    about: dict[str, Any] = {
        "penstock": __version__,
        "layout": 4,
        "versions": [each.__version__ for each in (torch, diffusers, transformers)],
        "pipeline": type(opened.pipe).__name__,
        "config": str(sorted(dict(opened.pipe.config).items(), key=str)),
        "given": {name: _told(value) for name, value in given.items()},
    }
    for name, module in modules_of(opened.pipe).items():
        types = sorted({str(p.dtype) for p in module.parameters()})
        about[name] = [type(module).__name__, str(module.config), types,
                       getattr(module, "use_tiling", None)]  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _told(value: Any) -> Any:
    size = getattr(value, "size", None)
    return f"picture {size}" if isinstance(size, tuple) else value
