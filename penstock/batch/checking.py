"""A list's requests, checked and planned before the first of them runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.batch.folder import LAST_FRAME, OutputFolder
from penstock.batch.lines import Line
from penstock.closing import Closing
from penstock.engine.media.video import check_no_input
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest, check_pictures, check_two, workload_of
from penstock.engine.request.settings import Settings, going_on, resolve
from penstock.profiles.options import Options
from penstock.profiles.phases import Workload
from penstock.profiles.plan import Plan


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
            self._models[key] = Prepared.open(
                line.model, loras=line.loras, options=self.options
            )
        model = self._models[key]
        request = resolve(settled(line, folder), model.model)
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


def settled(line: Line, folder: OutputFolder) -> Settings:
    """A request's settings, those of the video that it goes on from among them, whose last frame
    is written beside its job.

    Raises:
        VideoError, UsageError: that video cannot be gone on from.
    """
    if line.settings.after is None:
        return line.settings
    from PIL import Image

    from penstock.engine.media.seam import Clip

    clip = Clip.open(line.settings.after)
    frame = folder.place_of(line) / LAST_FRAME
    frame.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(clip.last).save(frame)
    return going_on(line.settings, clip, frame)


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, gaps left out."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(settings).items()
        if value is not None
    }
