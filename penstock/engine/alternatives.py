"""How the same request is done sooner on this machine: other options and settings, each planned by
the door that everything is planned by, and what each costs in quality, as far as it was measured.

Free of torch, like a plan.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import (
    AREAS,
    DISTILLED,
    GenerationRequest,
    noise_of,
    workload_of,
)
from penstock.engine.request.levels import TRAINED
from penstock.engine.request.settings import Settings, resolve
from penstock.errors import PenstockError
from penstock.formats.formats import get_format
from penstock.profiles.caching import FEWEST_STEPS, OFF
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan

log = logging.getLogger(__name__)

MOST = 5
WORTH_A_WORD = 0.95
"""Of the plan's seconds: what does not take less is no alternative."""
LONG_S = 3600.0
"""A job that takes longer is told of its best alternative."""

FRAMES_PSNR: Mapping[tuple[str, str], float] = MappingProxyType(
    {("int8", "exact"): 55.5, ("int8", "fast"): 47.7, ("fp8", "exact"): 48.6}
)
"""Decibels of frames against the weights as stored, by format and arithmetic: the small trained
model's 48 held-out clips (``benchmarks/quality.py``; a test holds them to its results)."""

HALF_PSNR: Mapping[tuple[str, int], float] = MappingProxyType(
    {
        ("plan", 40): 80.9, ("plan", 20): 64.8,
        ("plan of two transformers", 40): 78.3, ("plan of two transformers", 20): 60.6,
        ("guidance interval", 40): 34.7,
    }
)  # fmt: skip
"""Decibels of frames against the full run of so many steps, of which half are computed, or guided
(the noisy half): the small trained model's 48 held-out clips (``benchmarks/caches.py`` and
``cache_parts.py``, the worse of both models there; a test holds them to their results)."""

_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "size": "--size", "steps": "--steps", "guidance_scale": "--cfg", "shift": "--shift",
        "sampler": "--sampler", "cfg_interval": "--cfg-interval",
    }
)  # fmt: skip
"""Of the settings that another way leaves to the model."""

_SMALL = "480p"
_UNMEASURED = "quality not measured"


@dataclass(frozen=True)
class Alternative:
    """Another way to the video.

    Attributes:
        flags: what is said otherwise on the command line.
        seconds: that it is predicted to take.
        of_seconds: that the plan it stands beside takes.
        quality: what it costs, in a clause.
    """

    flags: str
    seconds: float
    of_seconds: float
    quality: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        return asdict(self)


@dataclass(frozen=True)
class _Change:
    flags: str
    options: Options
    settings: Settings
    quality: str


def alternatives(
    prepared: Prepared, settings: Settings, plan: Plan, *, saved: bool = True
) -> tuple[Alternative, ...]:
    """Return up to `MOST` ways that fit the machine and take less time than ``plan``, the shortest
    first.

    Args:
        prepared: the model and its options, as ``plan`` was made under them.
        settings: the request with its gaps.
        plan: of that request.
        saved: the job is saved in a folder while it runs.
    """
    request = resolve(settings, prepared.about)
    found = []
    for change in _changes(prepared, settings, request, plan):
        seconds = _predicted(prepared, change, saved)
        if seconds is not None and seconds <= WORTH_A_WORD * plan.seconds:
            found.append(Alternative(change.flags, seconds, plan.seconds, change.quality))
    best = sorted(found, key=lambda each: each.seconds)[:MOST]
    half = _half_guided(prepared, settings, request)
    if half is not None and len(best) < MOST:  # last: it gains least, and changes what is seen
        seconds = _predicted(prepared, half, saved)
        if seconds is not None and seconds <= WORTH_A_WORD * plan.seconds:
            best.append(Alternative(half.flags, seconds, plan.seconds, half.quality))
    return tuple(sorted(best, key=lambda each: each.seconds))


def _half_guided(
    prepared: Prepared, settings: Settings, request: GenerationRequest
) -> _Change | None:
    """Offer guidance in the first half of the steps alone."""
    if max(request.guidance_scales) <= 1 or request.cfg_interval is not None or request.steps < 2:
        return None
    told = prepared.about.official.timesteps(request.video_shape, request.steps, noise_of(request))
    interval = f"{told[request.steps // 2 - 1] / TRAINED:.3f},1"
    measured = _half("guidance interval", request.steps)
    quality = f"guidance in about half of the steps; {measured}"
    other = replace(settings, cfg_interval=interval)
    return _Change(f"--cfg-interval {interval}", prepared.asked, other, quality)


def _half(method: str, steps: int) -> str:
    """Say what was measured of the most steps that are no more than these: with fewer, less is
    left."""
    of = max((n for name, n in HALF_PSNR if name == method and n <= steps), default=None)
    if of is None:
        return _UNMEASURED
    return f"{HALF_PSNR[method, of]:.0f} dB of {of} full steps, on the small trained model"


def _left_out(settings: Settings, other: Settings) -> str:
    """Name the flags that ``other`` must do without, as a clause."""
    named = [
        flag
        for name, flag in _FLAGS.items()
        if getattr(settings, name) is not None and getattr(other, name) is None
    ]
    return f"; leave out {', '.join(named)}" if named else ""


def _predicted(prepared: Prepared, change: _Change, saved: bool) -> float | None:
    """Return the seconds under ``change``; None: it does not fit, or not this model."""
    other = prepared.again(change.options)
    try:
        request = resolve(change.settings, other.about)
        return other.plan(workload_of(request, saved=saved)).seconds
    except PenstockError as error:
        log.debug("no alternative: %s: %s", change.flags, error)
        return None
    finally:
        other.close()


def _changes(
    prepared: Prepared, settings: Settings, request: GenerationRequest, plan: Plan
) -> Iterator[_Change]:
    options = prepared.asked
    if not request.distilled and request.steps > DISTILLED["steps"]:
        few = replace(
            settings,
            distilled=True,
            steps=None,
            guidance_scale=None,
            guidance_high=None,
            shift=None,
            sampler=None,
            cfg_interval=None,
        )
        told = f"{DISTILLED['steps']} steps without guidance, the LoRA's own weights not counted"
        told += f"{_left_out(settings, few)}; {_UNMEASURED}"
        yield _Change("--distilled --lora 4STEP.safetensors", options, few, told)
    share = AREAS[_SMALL] / (request.width * request.height)
    if share < WORTH_A_WORD:
        small = replace(settings, size=None, max_area=_SMALL)
        told = f"{share:.2f} of the pixels{_left_out(settings, small)}"
        yield _Change(f"--max-area {_SMALL}", options, small, told)
    if plan.attention == "sdpa" and options.attention is None and prepared.hardware.device != "cpu":
        eight = replace(options, attention="int8")
        yield _Change("--attention int8", eight, settings, _UNMEASURED)
    if options.step_cache is None and plan.step_cache == OFF and request.steps >= FEWEST_STEPS:
        half = f"plan:{request.steps // 2}"
        other = replace(options, step_cache=half)
        denoising = [phase for phase in plan.phases if phase.forwards[1]]
        method = "plan" if len(denoising) == 1 else "plan of two transformers"
        told = f"{request.steps // 2} of {request.steps} forwards; {_half(method, request.steps)}"
        yield _Change(f"--cache {half}", other, settings, told)
    yield from _formats(options, settings, plan, prepared.hardware.device)
    yield from _budgets(options, settings)


def _formats(options: Options, settings: Settings, plan: Plan, device: str) -> Iterator[_Change]:
    """Yield the formats to try: what is quantised already is not quantised again. A CPU's products
    in 8 bits are left out: their trial would load torch for every plan."""
    if options.format is not None or not get_format(plan.weight_format).plain:
        return
    for (name, compute), decibels in FRAMES_PSNR.items():
        if compute == "fast" and device == "cpu":
            continue
        flags = f"--format {name}" + (" --compute fast" if compute == "fast" else "")
        other = replace(options, format=name, compute=compute)
        told = f"frames at {decibels:.0f} dB of the unquantised, on the small trained model"
        yield _Change(flags, other, settings, told)


def _budgets(options: Options, settings: Settings) -> Iterator[_Change]:
    """Yield the changes without the ceilings that were asked for: up to what the machine has
    free."""
    for name in ("ram", "vram"):
        if options.given.get(name) is not None:
            other = replace(options, **{name: None})
            yield _Change(f"without --{name}", other, settings, "none: the same arithmetic")
