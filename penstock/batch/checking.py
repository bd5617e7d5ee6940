"""A list's requests, checked and planned before the first of them runs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from penstock.batch.folder import OutputFolder
from penstock.batch.lines import Line
from penstock.closing import Closing
from penstock.engine.media.video import check_no_input
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import (
    GenerationRequest,
    check_pictures,
    check_two,
    workload_of,
)
from penstock.engine.request.settings import Settings, going_on, resolve
from penstock.profiles.options import Options
from penstock.profiles.phases import Workload
from penstock.profiles.plan import Plan
from penstock.serve.order import FILES, IMAGE, Order


@dataclass
class Checker(Closing):
    """Opens each model once, and plans each shape of video once.

    Attributes:
        options: of all requests.
        seconds: that the requests checked so far will take, by the names of their lines.
    """

    options: Options
    seconds: dict[str, float] = field(default_factory=dict)
    _models: dict[tuple[str, tuple[str, ...]], Prepared] = field(default_factory=dict)
    _plans: dict[tuple[str, tuple[str, ...], Workload], Plan] = field(default_factory=dict)

    def close(self) -> None:
        """Close the models' files."""
        for model in self._models.values():
            model.close()

    def check(self, line: Line, folder: OutputFolder) -> None:
        """Plan a request, and note the seconds.

        Raises:
            PenstockError: it is not legal, does not suit its model, or does not fit.
            OSError: a file of it cannot be read.
        """
        key = (line.model, line.loras)
        if key not in self._models:
            self._models[key] = Prepared.open(line.model, loras=line.loras, options=self.options)
        model = self._models[key]
        with TemporaryDirectory(prefix="penstock-") as frames:
            request = resolve(settled(line, Path(frames)), model.model)
            self._plan(line, folder, model, request)

    def _plan(
        self, line: Line, folder: OutputFolder, model: Prepared, request: GenerationRequest
    ) -> None:
        key = (line.model, line.loras)
        check_pictures(request, model.model.manifest.pictures)
        check_two(request, len(model.model.streaming))
        check_no_input(folder.output_of(line), _inputs(request, model))
        work = workload_of(request, saved=True)
        if (*key, work) not in self._plans:
            self._plans[(*key, work)] = model.plan(work)
        self.seconds[line.name] = self._plans[(*key, work)].seconds


def _inputs(request: GenerationRequest, model: Prepared) -> list[Path]:
    after = [] if request.after is None else [request.after]
    return [*model.model.files.values(), *request.pictures, *after]


def settled(line: Line, frames: Path) -> Settings:
    """Return a request's settings, those of the video that it goes on from among them, whose last
    frame is written into the folder ``frames``.

    Raises:
        VideoError, UsageError: that video cannot be gone on from.
    """
    if line.settings.after is None:
        return line.settings
    from PIL import Image

    from penstock.engine.media.seam import Clip

    clip = Clip.open(line.settings.after)
    frame = frames / IMAGE
    Image.fromarray(clip.last).save(frame, "PNG")
    return going_on(line.settings, clip, frame)


def order_of(line: Line, place: Path) -> Order:
    """Return what a worker is told of a request; its pictures are copied into ``place``.

    Args:
        line: the request.
        place: the order's folder; made if absent.

    Raises:
        OSError: a file cannot be copied.
        VideoError, UsageError: as `settled`.
    """
    place.mkdir(parents=True, exist_ok=True)
    settings = settled(line, place)
    values = {name: value for name, value in vars(settings).items() if value is not None}
    for setting, name in FILES.items():
        if setting in values:
            _copy(values[setting], place / name)
            values[setting] = True
    return Order(line.name, line.model, values, str(place), line.loras, preview_every=None)


def _copy(source: Path, target: Path) -> None:
    if source == target:
        return
    new = target.with_name(f"{target.name}.new")
    shutil.copyfile(source, new)
    new.replace(target)
