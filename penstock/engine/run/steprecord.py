"""The cache of forward passes of a job, and the record that schedules are made from.

A job without a cache leaves a record of its velocities' products in the cache folder, once for a
model, its LoRAs and the settings that determine them: one for all steps that are computed alike, so
that two transformers leave two. A schedule for steps without one is made from the record of the
small model in the box.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from penstock.engine.run.sampler import Sampler, SamplerState
from penstock.engine.run.stage import Stage
from penstock.engine.run.stepcache import Budget, Planned, Rule, StepCache, is_of, shares_of
from penstock.engine.run.stepplan import Recorded, Schedule, best_schedule, left_of_errors
from penstock.engine.store.digest import stamp
from penstock.errors import CheckpointError, StorageError
from penstock.folders import cache_folder
from penstock.profiles.caching import BUDGET, FEWEST_STEPS, PLAN, Caching

MOST_RECORDED = 100
"""Steps of a job that leaves a record: a sample of each waits in host memory until the end."""

_SETTINGS = (
    "steps", "sampler", "guidance_scale", "guidance_high", "cfg_interval", "nag_scale", "distilled",
)  # fmt: skip
"""Of a request, that decide what its transformers give, with the shift."""


_THERE = "records"
"""Among the values of a solver's state: file names."""


def records_there(stage: Stage) -> SamplerState:
    """Return what a job under a plan has to know from its first step to its last: the records that
    there are as it begins. Another job may leave one before this one is resumed, and steps that are
    still to come would be chosen from that."""
    if Caching.of(stage.plan.step_cache).kind != PLAN:
        return SamplerState({}, {})
    return SamplerState({_THERE: sorted(path.name for path in _folder().glob("*.json"))}, {})


def same_records(state: SamplerState) -> SamplerState:
    """Return that part of ``state``."""
    return SamplerState({n: value for n, value in state.values.items() if n == _THERE}, {})


def cache_for(
    stage: Stage,
    steps: range,
    caching: Caching,
    fresh: Callable[[], Sampler],
    state: SamplerState,
) -> StepCache:
    """Return the cache of a transformer's forward passes in a job that stands at ``state``.

    Args:
        steps: that the transformer computes.
        caching: of its forward passes.
        fresh: makes samplers like the job's, on the CPU.
    """
    skips = caching.skips(len(steps))
    rule = _rule(stage, steps, caching, fresh, state) if skips else None
    job = len(fresh().timesteps)
    told = caching.told(steps, job)
    if told is not None:
        stage.monitor.notice(told)
    due = rule is None and _can_be_recorded(stage, steps) and _is_missing(record_path(stage, steps))
    cache = StepCache(steps, rule, recording=due)
    cache.load_state(state)
    return cache


def _can_be_recorded(stage: Stage, steps: range) -> bool:
    """Return whether these are as many steps as leave a record."""
    return FEWEST_STEPS <= len(steps) <= MOST_RECORDED and bool(stage.job.sources)


def _is_missing(path: Path) -> bool:
    """Return whether a record is still to be written, in the place of a damaged one too."""
    try:
        Recorded.read(path)
    except CheckpointError:
        return True
    return False


def _rule(
    stage: Stage,
    steps: range,
    caching: Caching,
    fresh: Callable[[], Sampler],
    state: SamplerState,
) -> Rule:
    levels = _levels(fresh())
    left = left_of_errors(levels, shares_of(fresh()))
    if caching.kind == BUDGET:
        return Budget(caching.budget, levels, left, steps.stop - 1)
    if is_of(state, steps):
        return Planned(Schedule((), ()))
    recorded, told = _own_record(stage, steps, state), "a run of this model"
    if recorded is None:
        recorded, told = Recorded.built_in(), "runs of the small model in the box"
        if _can_be_recorded(stage, steps):
            told += ": a whole job without a cache records this one"
    own = slice(steps.start, steps.stop)
    schedule = best_schedule(recorded.at(levels[own]), left[own], caching.planned)
    computed = tuple(steps.start + step for step in schedule.computed)
    skipped, of = len(steps) - len(computed), f"{len(steps)} steps"
    if len(steps) < len(levels):
        of = f"steps {steps.start + 1} to {steps.stop}"
    stage.monitor.notice(f"{skipped} of {of} are skipped, chosen from {told}")
    return Planned(Schedule(computed, schedule.damping))


def _levels(sampler: Sampler) -> tuple[float, ...]:
    return tuple(sampler.sigma(step) for step in range(len(sampler.timesteps)))


def _own_record(stage: Stage, steps: range, state: SamplerState) -> Recorded | None:
    """Return the model's own record; None: there was none when the job began, or a damaged one,
    which is said."""
    path = record_path(stage, steps)
    if path.name not in state.values.get(_THERE, [path.name]) or not path.exists():
        return None
    try:
        return Recorded.read(path)
    except CheckpointError as error:
        stage.monitor.notice(str(error))
        return None


def keep_record(stage: Stage, cache: StepCache, sampler: Sampler) -> None:
    """Write what ``cache`` has recorded of its steps, if it has them all."""
    if len(cache.samples) != len(cache.steps) or stage.keeper.steered:
        return
    path = record_path(stage, cache.steps)
    try:
        Recorded.of([sampler.sigma(step) for step in cache.steps], cache.samples).write(path)
    except (OSError, StorageError) as error:
        stage.monitor.notice(f"the job's steps are not recorded in {path}: {error}")


def record_path(stage: Stage, steps: range) -> Path:
    """Return where the record of these steps of a model lies, whether it is there or not."""
    request, parts = stage.job.request, (*stage.job.model.streaming, "lora")
    settings = {
        "files": {
            name: stamp(path)
            for name, path in sorted(stage.job.sources.items())
            if name.partition("/")[0] in parts
        },
        "loras": stage.job.model.opening.values()["loras"],  # how strong, and in which transformer
        "shift": stage.model.flow_shift(request.width, request.height, request.shift),
        "computed": [steps.start, steps.stop],
        **{name: getattr(request, name) for name in _SETTINGS},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return _folder() / f"{digest[:16]}.json"


def _folder() -> Path:
    return cache_folder() / "steps"
