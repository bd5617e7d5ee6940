"""Step caches on the trained small model: fewer forwards, and what is left of the full run.

    python -m benchmarks.caches [--pairs N] [--steps 40,20] [--only WORD]... [--save FILE.json]

The clips are held-out pairs of `training.evaluate`; clip i starts from the noise of seed i. Every
row is one setting of one method: the share of transformer blocks that were really computed, of the
full run's; that share as it would be with 40 blocks (a method that always computes the first of 6
pays 1/6 here and 1/40 there); and the PSNR of frames against the full run, of the mean squared
error of all clips and of the worst clip, over a range of 1.

Beside penstock's own (``budget``, ``plan``, and guidance in an interval of noise levels, which
leaves the unconditional half of a step out) stand plain runs of fewer steps, diffusers' hooks, and
a rule that watches the first block and takes penstock's line.
SeaCache is given the step, the noise level and the part of the input that is latents, which its
pipeline for pictures does not pass; TaylorSeer is told the modules' names: it finds none here.
Hooks that decide by what they see run clip by clip; the others run in batches.

``--save`` keeps every row as it comes, and the same command goes on where it was stopped. The last
line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.engine.files.locate import locate
from penstock.engine.run.sampler import Sampler
from penstock.engine.run.stepcache import Budget, Planned, Rule, StepCache, shares_of
from penstock.engine.run.stepplan import Recorded, best_schedule, left_of_errors, line
from penstock.engine.store.durable import FileOps, write_atomically
from penstock.profiles.caching import MOST_SKIPPED, WARM
from training.clips import render
from training.encode import condition_clips, encode, normalise
from training.evaluate import make_pairs
from training.generate import Generator, from_folder
from training.models import build_image_processor, pixels_for
from training.settings import FRAMES
from training.train_dit import with_mask
from training.train_vae import to_batch
from training.wholeclip import decode_clip

MINI = Path(__file__).parent.parent / "penstock" / "assets" / "mini"
GUIDANCE, SHIFT = 4.0, 5.0
TRUE_BLOCKS = 40
"""Of Wan2.1 14B."""
AT_ONCE = 24
"""Clips in a batch."""


@dataclass(frozen=True)
class Row:
    """One setting of one method at one number of steps."""

    steps: int
    method: str
    setting: str
    share: float
    share_40: float
    latents_db: float
    frames_db: float
    worst_db: float
    cpu_s: float


@dataclass
class Counter:
    """Blocks that were really computed, clips counted one by one."""

    first: int = 0
    blocks: int = 0

    def shares(self, full: int, blocks: int) -> tuple[float, float]:
        """Of ``full`` forwards: of ``blocks`` blocks, and as it would be with 40."""
        rest = (self.blocks - self.first) / (full * (blocks - 1))
        first = self.first / full
        mine = (first + rest * (blocks - 1)) / blocks
        return mine, (first + rest * (TRUE_BLOCKS - 1)) / TRUE_BLOCKS


@dataclass
class Clips:
    """Held-out clips as the transformer sees them."""

    generator: Generator
    condition: Tensor
    image: Tensor
    texts: list[tuple[Tensor, Tensor]]
    noise: Tensor
    shift: float = SHIFT
    counter: Counter = field(default_factory=Counter)

    @classmethod
    @torch.no_grad()
    def of(cls, split: str, count: int, shift: float = SHIFT) -> Clips:
        """The first ``count`` pairs of ``split``, sampled with that flow shift."""
        generator, pairs = from_folder(MINI), make_pairs(split, count)
        pictures = [render(pair.scene, frames=1)[0] for pair in pairs]
        images = to_batch([picture[None] for picture in pictures])[:, :, 0]
        clips = condition_clips(images, FRAMES)
        condition = with_mask(normalise(generator.vae, encode(generator.vae, clips)))
        processor = build_image_processor()
        pixels = torch.stack([pixels_for(processor, picture) for picture in pictures])
        noise = [
            torch.randn(condition[:1, 4:].shape, generator=torch.Generator().manual_seed(index))
            for index in range(count)
        ]
        texts = [generator._text([pair.prompt for pair in pairs]), generator._text([""] * count)]
        found = cls(
            generator,
            condition,
            generator.model.encode_image(pixels),
            texts,
            torch.cat(noise),
            shift,
        )
        for index, block in enumerate(generator.model.transformer.blocks):
            block.attn1.to_q.register_forward_pre_hook(partial(found._count, index))
        return found

    def _count(self, index: int, module: Any, given: tuple[Tensor]) -> None:
        self.counter.blocks += len(given[0])
        self.counter.first += len(given[0]) * (index == 0)

    @property
    def transformer(self) -> Any:
        """Diffusers' own module."""
        return self.generator.model.transformer

    def batches(self, size: int) -> Iterator[Tensor]:
        """Indices of all clips, so many at a time."""
        return iter(torch.split(torch.arange(len(self.noise)), size))

    @torch.no_grad()
    def velocity(
        self,
        latents: Tensor,
        moment: Tensor,
        clips: Tensor,
        *,
        guided: bool = True,
        **context: Any,
    ) -> Tensor:
        """Of ``clips``, with or without guidance."""
        given = torch.cat([latents, self.condition[clips]], dim=1)
        found = list[Tensor]()
        for name, (states, bias) in zip(("cond", "uncond"), self.texts, strict=True):
            if found and not guided:
                return found[0]
            with self.transformer.cache_context(name, **context):
                found.append(
                    self.generator._velocity(
                        given, moment, states[clips], bias[clips], self.image[clips]
                    )
                )
        asked, plain = found
        return plain + GUIDANCE * (asked - plain)

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Tensor:
        """In [0, 1]."""
        config = self.generator.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        parts = torch.split(latents * std + mean, 8)
        decoded = torch.cat([decode_clip(self.generator.vae, part) for part in parts])
        return decoded.clamp(-1, 1) / 2 + 0.5


def new_sampler(steps: int, shift: float = SHIFT) -> Sampler:
    """UniPC, as a job's."""
    config = dict(locate(MINI).scheduler)
    return Sampler(config, sampler="unipc", steps=steps, shift=shift)


@torch.no_grad()
def plain(clips: Clips, steps: int, size: int = AT_ONCE, told: bool = False) -> Tensor:
    """Latents of all clips with every step computed, as far as hooks do not skip it.

    Args:
        size: clips in a batch.
        told: hooks are told where the loop is.
    """
    made = []
    for batch in clips.batches(size):
        sampler, latents = new_sampler(steps, clips.shift), clips.noise[batch].clone()
        for step, moment in enumerate(sampler.timesteps):
            context: dict[str, Any] = (
                {"step_index": step, "sigma": sampler.sigma(step), "num_inference_steps": steps}
                if told
                else {}
            )
            velocity = clips.velocity(latents, moment, batch, **context)
            latents = sampler.step(velocity, step, latents)
        made.append(latents)
        clips.transformer._reset_stateful_cache()
    return torch.cat(made)


@contextmanager
def hooked(clips: Clips, config: Any) -> Iterator[None]:
    """The transformer under one of diffusers' hooks."""
    clips.transformer.enable_cache(config)
    try:
        yield
    finally:
        clips.transformer.disable_cache()


def _fewer(fewer: int, clips: Clips, steps: int) -> Tensor:
    return plain(clips, fewer)


def under(config: Callable[[int], Any], size: int = AT_ONCE, told: bool = False) -> Method:
    """A hook that is made for a number of steps."""

    def made(clips: Clips, steps: int) -> Tensor:
        with hooked(clips, config(steps)):
            return plain(clips, steps, size, told)

    return made


Method = Callable[[Clips, int], Tensor]


def ratios(steps: int) -> list[float]:
    """MagCache's, from a full run of eight validation clips, as its calibration takes them."""
    clips = Clips.of("validation", 8)
    blocks, inputs = clips.transformer.blocks, list[Tensor]()
    found, before = list[float](), dict[int, Tensor]()
    blocks[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))

    def leave(module: Any, given: Any, result: Tensor) -> None:
        branch = len(found) % 2
        residual = (result - inputs.pop()).norm(dim=-1)
        found.append(float((residual / before[branch]).mean()) if branch in before else 1.0)
        before[branch] = residual

    blocks[-1].register_forward_hook(leave)
    plain(clips, steps)
    return found[::2]


def skipping(
    clips: Clips,
    steps: int,
    rule: Callable[[], Rule],
    *,
    starts: Sequence[int] = (),
    watched: bool = False,
) -> Tensor:
    """Latents of all clips, each under a step cache of its own.

    Args:
        starts: steps from which nothing is known of those before, as of another transformer's.
        watched: the rules are `Watching`, and are shown the first block of every step.
    """
    made = []
    for batch in clips.batches(AT_ONCE):
        sampler, latents = new_sampler(steps, clips.shift), clips.noise[batch].clone()
        rules = [rule() for _ in batch]
        caches = [StepCache(range(steps), each) for each in rules]
        for step, moment in enumerate(sampler.timesteps):
            if step in starts:
                for cache in caches:
                    cache.reset()
            if watched:
                for each, shown in zip(
                    rules, first_block(clips, latents, moment, batch), strict=True
                ):
                    each.shown = shown  # type: ignore[attr-defined]
            wanted = [index for index, cache in enumerate(caches) if cache.wants(step)]
            found = list[Tensor](latents)
            if wanted:
                computed = clips.velocity(latents[wanted], moment, batch[wanted])
                for index, velocity in zip(wanted, computed, strict=True):
                    found[index] = velocity
                    caches[index].computed(step, velocity, latents[index])
            if watched:  # what was looked at is a part of the passes that follow, and done once
                clips.counter.blocks -= len(wanted)
                clips.counter.first -= len(wanted)
            for index, cache in enumerate(caches):
                if index not in wanted:
                    found[index] = cache.predicted(step)
            latents = sampler.step(torch.stack(found), step, latents)
        made.append(latents)
    return torch.cat(made)


class _Seen(Exception):
    """The first block is through."""


@torch.no_grad()
def first_block(clips: Clips, latents: Tensor, moment: Tensor, batch: Tensor) -> Tensor:
    """What the first block adds to each clip's hidden states, with the prompt."""
    block = clips.transformer.blocks[0]
    seen = list[Tensor]()

    def leave(module: Any, given: tuple[Tensor, ...], result: Tensor) -> None:
        seen.append(result - given[0])
        raise _Seen

    hook = block.register_forward_hook(leave)
    try:
        clips.velocity(latents, moment, batch, guided=False)
    except _Seen:
        return seen[0]
    finally:
        hook.remove()
    raise AssertionError("the first block was not reached")


class Watching(Budget):
    """Skips while what the first block shows of the line's error stays below a budget.

    The first block is computed at every step. How far its own line has gone wrong there stands for
    how far the velocity's has, weighed as `Budget` weighs what it expects.

    Attributes:
        shown: what the first block adds at the step that is asked about.
    """

    shown: Tensor

    def reset(self) -> None:
        """As `Rule`."""
        super().reset()
        self._seen: list[Tensor] = []

    def wants(self, step: int) -> bool:
        """As `Rule`."""
        if len(self._at) < WARM or step == self._last or step - self._at[-1] > MOST_SKIPPED:
            return True
        (b, a), (before, last) = self._at, self._seen
        error = (last + line(a, b, step, 1.0) * (last - before) - self.shown).norm()
        self._spent += self._left_of_errors[step] * float(error / self.shown.norm())
        return self._spent >= self._budget

    def learns(self, step: int, error: float | None, size: float) -> None:
        """As `Rule`."""
        super().learns(step, error, size)
        self._seen = [*self._seen[-1:], self.shown]


def recorded(steps: int, count: int) -> Recorded:
    """The mean of full runs of validation clips."""
    clips, samples = Clips.of("validation", count), list[Tensor]()
    whole = clips.velocity

    def watched(*given: Any, **context: Any) -> Tensor:
        velocity = whole(*given, **context)
        samples.append(velocity)
        return velocity

    clips.velocity = watched  # type: ignore[method-assign]
    plain(clips, steps)
    runs = [Recorded.of(levels_of(steps), [v[clip] for v in samples]) for clip in range(count)]
    return Recorded(runs[0].levels, np.stack([run.products for run in runs]).mean(0))


def levels_of(steps: int, shift: float = SHIFT) -> tuple[float, ...]:
    """Noise before each step."""
    sampler = new_sampler(steps, shift)
    return tuple(sampler.sigma(step) for step in range(steps))


def within(low: float, high: float, clips: Clips, steps: int) -> Tensor:
    """Latents of all clips, guided at these noise levels alone."""
    made = []
    for batch in clips.batches(AT_ONCE):
        sampler, latents = new_sampler(steps, clips.shift), clips.noise[batch].clone()
        for step, moment in enumerate(sampler.timesteps):
            guided = low <= sampler.sigma(step) <= high
            velocity = clips.velocity(latents, moment, batch, guided=guided)
            latents = sampler.step(velocity, step, latents)
        made.append(latents)
    return torch.cat(made)


def own(steps: int) -> Iterator[tuple[str, str, Method]]:
    """Penstock's own cache."""
    levels = levels_of(steps)
    left = left_of_errors(levels, shares_of(new_sampler(steps)))
    for budget in {40: (3e-4, 1e-3, 2e-3, 5e-3, 15e-3), 20: (2e-3, 6e-3, 12e-3)}[steps]:
        yield "budget", f"{budget}", _with(partial(Budget, budget, levels, left))
    for budget in {40: (1e-4, 3e-4, 1e-3, 3e-3), 20: (3e-4, 1e-3, 4e-3)}[steps]:
        watching = partial(Watching, budget, levels, left)
        yield "first block watched", f"{budget}", partial(skipping, rule=watching, watched=True)
    for low, high in ((0.0, 0.98), (0.5, 1.0), (0.7, 1.0), (0.85, 1.0), (0.0, 0.85)):
        yield "guidance interval", f"{low}, {high}", partial(within, low, high)
    eight, one = recorded(steps, 8), recorded(steps, 1)
    few = {40: (0.225, 0.2, 0.175), 20: ()}[steps]
    for share in (0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, *few):
        for name, run in (("8 runs", eight), ("1 run", one)):
            schedule = best_schedule(run, left, round(share * steps))
            told = f"{len(schedule.computed)} from {name}"
            yield "plan", told, _with(partial(Planned, schedule))


def _with(rule: Callable[[], Rule]) -> Method:
    return lambda clips, steps: skipping(clips, steps, rule)


def methods(steps: int) -> Iterator[tuple[str, str, Method]]:
    """Every method but penstock's own, with its settings."""
    from diffusers import (
        FirstBlockCacheConfig,
        MagCacheConfig,
        SeaCacheConfig,
        TaylorSeerCacheConfig,
    )

    half = {40: (28, 20, 14, 10), 20: (14, 10, 7)}[steps]
    for fewer in half:
        yield "fewer UniPC steps", str(fewer), partial(_fewer, fewer)
    for threshold in {40: (0.02, 0.04, 0.06, 0.1, 0.15), 20: (0.04, 0.08, 0.16)}[steps]:
        config = partial(_ignoring, FirstBlockCacheConfig, threshold=threshold)
        yield "FirstBlockCache", f"{threshold}", under(config, 1)
    found = ratios(steps)
    swept = ((0.03, 3, 0.2), (0.06, 3, 0.05), (0.12, 3, 0.1), (0.24, 4, 0.1))
    for threshold, most, kept in swept:
        config = partial(
            _ignoring, MagCacheConfig, threshold=threshold, max_skip_steps=most,
            retention_ratio=kept, num_inference_steps=steps, mag_ratios=found,
        )  # fmt: skip
        yield "MagCache", f"{threshold}, {most}, {kept}", under(config)
    for threshold, most in {
        40: ((0.1, 2), (0.25, 2), (0.25, 4), (0.5, 4)), 20: ((0.25, 2), (0.5, 4))
    }[steps]:  # fmt: skip
        config = partial(
            _ignoring, SeaCacheConfig, threshold=threshold, max_consecutive_cached=most,
            raw_vision_callback=_latents_of,
        )  # fmt: skip
        yield "SeaCache with help", f"{threshold}, {most}", under(config, 1, told=True)
    for every, order in ((2, 1), (2, 2), (3, 1), (5, 1)):
        config = partial(
            _ignoring, TaylorSeerCacheConfig, cache_interval=every, max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"],
        )  # fmt: skip
        yield "TaylorSeer, modules named", f"every {every}, order {order}", under(config)


def _ignoring(config: Callable[..., Any], steps: int, **settings: Any) -> Any:
    return config(**settings)


def _latents_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = args[0] if args else kwargs["hidden_states"]
    return list(given[:, : module.config.out_channels].unbind(0))


def psnr(found: Tensor, wanted: Tensor, span: float) -> tuple[float, float]:
    """In dB, of all clips together and of the worst."""
    errors = (found.double() - wanted.double()).square().flatten(1).mean(1)
    together, worst = (
        10 * math.log10(span**2 / max(float(error), span**2 * 1e-14))
        for error in (errors.mean(), errors.max())
    )
    return together, worst


@dataclass
class Table:
    """The rows so far, in a file."""

    path: Path | None
    recipe: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["recipe"] != self.recipe:
                raise SystemExit(f"{self.path} holds rows of {kept['recipe']}: name another file")
            self.rows = [Row(**row) for row in kept["rows"]]

    def has(self, steps: int, method: str, setting: str) -> bool:
        """Whether that row is there."""
        asked = steps, method, setting
        return any((row.steps, row.method, row.setting) == asked for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        if self.path is not None:
            write_atomically(
                FileOps(), self.path, [(json.dumps(self.to_json(), indent=1) + "\n").encode()]
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"recipe": self.recipe, "rows": [asdict(row) for row in self.rows]}


def measure(clips: Clips, steps: int, table: Table, only: Sequence[str]) -> None:
    """Every method at so many steps."""
    asked = [
        (method, setting, run)
        for method, setting, run in (*own(steps), *methods(steps))
        if not table.has(steps, method, setting)
        and (not only or any(word in f"{method} {setting}" for word in only))
    ]
    if not asked:
        return
    full = plain(clips, steps)
    pictures = clips.frames(full)
    blocks = len(clips.transformer.blocks)
    for method, setting, run in asked:
        clips.counter, began = Counter(), time.process_time()
        clips.counter.first = clips.counter.blocks = 0
        latents = run(clips, steps)
        cpu_s = time.process_time() - began
        shares = clips.counter.shares(2 * steps * len(clips.noise), blocks)
        far, _ = psnr(latents, full, float(full.max() - full.min()))
        mean, worst = psnr(clips.frames(latents), pictures, 1.0)
        table.add(Row(steps, method, setting, *shares, far, mean, worst, cpu_s))
        print(table.rows[-1], flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Step caches on the trained small model")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--steps", default="40,20")
    parser.add_argument(
        "--only", action="append", default=[], help="words of methods' names and settings"
    )
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    recipe = {"model": MINI.name, "pairs": asked.pairs, "guidance": GUIDANCE, "shift": SHIFT}
    table, clips = Table(asked.save, recipe), Clips.of("test", asked.pairs)
    for steps in map(int, asked.steps.split(",")):
        measure(clips, steps, table, asked.only)
    print(json.dumps(table.to_json()))


if __name__ == "__main__":
    main()
