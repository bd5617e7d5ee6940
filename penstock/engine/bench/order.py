"""From the flags of ``penstock bench`` to measurements: the model found or made, then measured
under one profile or under several."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from penstock.engine.bench.measure import Asked, measure
from penstock.engine.bench.result import BenchResult
from penstock.engine.bench.synthetic import synthetic
from penstock.engine.bench.weights import (
    FREE_BYTES,
    streamed_bytes,
    write_synthetic,
)
from penstock.engine.engine import Engine
from penstock.engine.family.protocol import builtin_names
from penstock.engine.model.official import Official
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.run.events import Listener
from penstock.errors import OverBudget, UsageError, brief
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.phases import Noise
from penstock.units import format_bytes

Tell = Callable[[str], None]

SYNTHETIC_FORMAT = "int8"
FRAMES, GUIDANCE = 81, 5.0

ROOMY = 1 << 50
"""Bytes that hold any model."""


_MOST_MINUTES = 1e9


@dataclass(frozen=True)
class BenchOrder:
    """What a user asks to be measured; None: the default, or what the machine has.

    Attributes:
        frames: None: 81, or the nearest number that the model makes.
        guidance: None: 5, and 1 where the model goes without.
        model: a model as `Engine.open` takes it; or
        synthetic: the name of one that is made on the spot, with ``blocks`` blocks stored as
            ``options.format``, in a temporary folder inside ``folder``.
        steps, warmup: that count, and before them that do not.
        minutes: that a measurement on a synthetic model may take, by the plan; fewer blocks are
            made where all of them would take longer.
        whole: every phase of a job, not denoising alone.
        options: to measure under.
    """

    model: str | None = None
    synthetic: str | None = None
    blocks: int | None = None
    width: int = 832
    height: int = 480
    frames: int | None = None
    steps: int = 3
    warmup: int = 1
    guidance: float | None = None
    folder: Path | None = None
    minutes: float = 10.0
    whole: bool = False
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.synthetic is None):
            raise UsageError(
                "a benchmark needs a model",
                expected="--model PATH or --synthetic NAME",
                found="neither" if self.model is None else "both",
            )
        if self.model is not None and self.blocks is not None:
            raise UsageError(
                "--blocks needs a synthetic model", expected="--blocks with --synthetic"
            )
        if not 0 < self.minutes < _MOST_MINUTES:
            raise UsageError(
                "illegal --minutes", expected="above 0, and finite", found=brief(self.minutes)
            )

    @property
    def stored_format(self) -> str | None:
        """Of the blocks: what is asked for; a synthetic model is int8 unless it is."""
        return self.options.format or (None if self.synthetic is None else SYNTHETIC_FORMAT)

    def request(self, official: Official) -> GenerationRequest:
        """Return the job whose steps are measured.

        Args:
            official: what the model says of requests.

        Raises:
            RequestError: an illegal size or number of steps.
        """
        grid, defaults = official.grid, official.request_defaults
        frames = grid.nearest_frames(FRAMES) if self.frames is None else self.frames
        guidance = self.guidance
        if guidance is None:
            guidance = 1.0 if defaults["guidance_scale"] == 1 else GUIDANCE
        shape = VideoShape(self.width, self.height, frames)
        passes = self.steps + self.warmup
        noise = Noise(defaults.get("sampler", "unipc"))
        # Of MiniMax-H3, N asked steps are N - 1 passes.
        without = passes - len(official.timesteps(shape, passes, noise))
        known = {name: defaults[name] for name in ("fps", "sampler") if name in defaults}
        return GenerationRequest(
            prompt="a benchmark",
            width=self.width,
            height=self.height,
            frames=frames,
            steps=passes + without,
            guidance_scale=guidance,
            seed=0,
            grid=grid,
            **known,
        )


@dataclass(frozen=True)
class SweepPoint:
    """One profile of a sweep: its result, or why there is none."""

    profile: str
    result: BenchResult | None
    refusal: str = ""


def run(order: BenchOrder, listener: Listener, tell: Tell) -> BenchResult:
    """Measure what ``order`` says.

    Args:
        listener: receives the job's events.
        tell: receives a line about what is being made.

    Raises:
        UsageError: an order that cannot be carried out. OverBudget: no plan fits.
    """
    with _model(order, tell) as model:
        return _measure(order, model, listener)


def sweep(
    order: BenchOrder, profiles: Sequence[str], listener: Listener, tell: Tell
) -> list[SweepPoint]:
    """Measure ``order`` under each of ``profiles``, on the same files.

    Raises:
        UsageError: as `run`; a profile that no plan fits is told in its `SweepPoint`.
    """
    points = []
    with _model(order, tell) as model:
        for profile in profiles:
            tell(f"profile {profile}")
            try:
                found = _measure(_under(order, profile), model, listener)
            except OverBudget as error:
                points.append(SweepPoint(profile, None, str(error)))
                continue
            points.append(SweepPoint(profile, found))
    return points


def _under(order: BenchOrder, profile: str) -> BenchOrder:
    return replace(order, options=replace(order.options, profile=profile))


def _measure(order: BenchOrder, model: Path | str, listener: Listener) -> BenchResult:
    with (
        Engine.open(model, options=replace(order.options, format=order.stored_format)) as engine,
        tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch,
    ):
        request = order.request(engine.model.official)
        if engine.model.image_to_video:
            request = replace(request, image=_picture(Path(scratch), order))
        asked = Asked(
            request,
            order.warmup,
            name=order.synthetic or engine.model.streamed.source.title,
            whole=order.whole,
        )
        return measure(engine, asked, listener)


def _picture(scratch: Path, order: BenchOrder) -> Path:
    path = scratch / "picture.png"
    image = Image.radial_gradient("L").resize((order.width, order.height))
    image.convert("RGB").save(path)
    return path


@contextmanager
def _model(order: BenchOrder, tell: Tell) -> Iterator[Path | str]:
    """Provide the model given, or one made for as long as the context lasts."""
    if order.synthetic is None:
        assert order.model is not None
        yield order.model
        return
    with tempfile.TemporaryDirectory(dir=order.folder, prefix="penstock-bench-") as scratch:
        from transformers.utils import logging

        logging.disable_progress_bar()
        weight_format = order.options.format or SYNTHETIC_FORMAT
        blocks = order.blocks or fitting_blocks(order, weight_format, Path(scratch))
        model = synthetic(order.synthetic)
        size = format_bytes(streamed_bytes(model.kind, model.config(blocks), weight_format))
        tell(f"making {blocks} blocks of {order.synthetic} in {weight_format}: {size}")
        yield write_synthetic(
            Path(scratch), order.synthetic, blocks=blocks, weight_format=weight_format
        )


def fitting_blocks(order: BenchOrder, weight_format: str, folder: Path) -> int:
    """As many of the model's blocks as the disk holds and `BenchOrder.minutes` allow, at least one.

    Raises:
        UsageError: no such model or format.
    """
    assert order.synthetic is not None
    model = synthetic(order.synthetic)
    whole = int(model.streamed["num_layers"])
    one, two = (streamed_bytes(model.kind, model.config(n), weight_format) for n in (1, 2))
    room = shutil.disk_usage(folder).free - FREE_BYTES - (2 * one - two)
    by_disk = max(0, room) // (two - one)
    by_time = whole
    if order.synthetic in builtin_names():
        allowed_s = 60 * order.minutes
        by_time = int(whole * allowed_s / max(_predicted_s(order, weight_format), 1e-9))
    return max(1, min(whole, by_disk, by_time))


def _predicted_s(order: BenchOrder, weight_format: str) -> float:
    """Return the seconds of all denoising steps with all blocks, whatever the budgets."""
    options = replace(order.options, vram=ROOMY, ram=ROOMY, format=weight_format)
    prepared = Prepared.open(synthetic=order.synthetic, options=options)
    request = order.request(prepared.about.official)
    return prepared.plan(workload_of(request))["denoise"].seconds
