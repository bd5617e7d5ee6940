"""The planning process: ``python -m penstock.serve.planner``. It opens models by their headers and
what clients send by what it says it is, so that neither a hostile file nor a long search holds the
server up.

JSON lines, as with a worker: each question carries a number, and so does its answer, in
their order.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from penstock.engine.alternatives import alternatives
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest, check_pictures, workload_of
from penstock.engine.request.settings import Settings, going_on, resolve
from penstock.errors import ImageError, OverBudget, PenstockError
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from penstock.serve.order import IMAGE, PICTURES, error_values, settings_of
from penstock.serve.worker import Line, be_first_to_go, own_output

log = logging.getLogger(__name__)

MOST_OPEN = 4
"""Models, each with its LoRAs and cache, that stay open."""


class Planner:
    """Answers what a request takes.

    Args:
        models: places by name.
        options: of every job.
        pixels: of a picture at most.
        cache: where packs are kept; None: as everywhere.
    """

    def __init__(
        self, models: Mapping[str, str], options: Options, pixels: int, cache: Path | None
    ) -> None:
        self._models, self._options, self._pixels = dict(models), options, pixels
        self._cache = cache
        self._open: OrderedDict[object, Prepared] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """Return the models, and what they are planned for.

        Raises:
            PenstockError: one cannot be opened.
        """
        return {name: self._about(self._prepared(name)) for name in self._models}

    def _about(self, prepared: Prepared) -> dict[str, Any]:
        model, hardware = prepared.model, prepared.hardware
        pictures = model.manifest.pictures
        return {
            "image": pictures.first,
            "last_image": pictures.last,
            "side": model.grid.side,
            "frames_step": model.grid.temporal,
            "defaults": self._defaults(prepared),
            "device": hardware.place,
            "vram_bytes": hardware.vram_bytes,
            "ram_bytes": hardware.ram_bytes,
        }

    def _defaults(self, prepared: Prepared) -> dict[str, Any]:
        request = resolve(Settings(prompt="-"), prepared.model)
        return {
            "size": f"{request.width}x{request.height}",
            "num_frames": request.frames,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "flow_shift": request.shift,
            "fps": request.fps,
            "negative_prompt": request.negative_prompt,
        }

    def plan(
        self,
        model: str,
        settings: Mapping[str, Any],
        seconds: float | None,
        loras: list[str],
        cache: str | None,
        folder: str | None,
        whole: bool,
        others: bool,
    ) -> dict[str, Any]:
        """Return what a request takes, or why it does not fit.

        Args:
            model: a name.
            settings: what is said of the request, with gaps; files by their names in ``folder``.
            seconds: the length instead of frames; the nearest that the model can make.
            loras, cache: as `penstock.serve.order.Order` has them.
            folder: where pictures lie, and the video that is gone on from; None: none of them.
            whole: it shall be run: pictures are decoded, and the model must take them.
            others: ways to have it sooner are looked for.

        Raises:
            PenstockError: it is illegal; `OverBudget` is part of the answer instead.
        """
        prepared = self._prepared(model, tuple(loras), cache)
        said = settings_of(settings, Path(folder or "."))
        if said.after is not None:
            said = _continued(said)
        if whole:
            self._check_decoded(said)
        if seconds is not None and said.frames is None:
            said = replace(said, frames=_frames(prepared, said, seconds))
        request = resolve(said, prepared.model).with_seed()
        if whole:
            check_pictures(request, prepared.model.manifest.pictures)
        values = _values(request, prepared)
        try:
            plan = prepared.plan(request if whole else workload_of(request, saved=True), saved=True)
        except OverBudget as error:
            return {"settings": values, "plan": _refused(error, prepared)}
        ways = alternatives(prepared, said, plan) if others else ()
        told = _fitting(plan) | {"alternatives": [each.to_json() for each in ways]}
        return {"settings": values, "plan": told}

    def frame(self, video: str, which: str, to: str) -> dict[str, Any]:
        """Write a frame of a video as a picture.

        Args:
            video: its path.
            which: "first" or "last".
            to: the picture's path, .png or .jpg.

        Raises:
            VideoError: the video cannot be read.
        """
        from PIL import Image

        from penstock.engine.media.seam import Clip
        from penstock.engine.media.video import read_frames

        path = Path(video)
        frame = Clip.open(path).last if which == "last" else next(read_frames(path))
        target = Path(to)
        new = target.with_name(f".new-{target.name}")
        Image.fromarray(frame).save(new)
        new.replace(target)
        return {}

    def _prepared(
        self, model: str, loras: tuple[str, ...] = (), cache: str | None = None
    ) -> Prepared:
        key = model, loras, cache
        if key not in self._open:
            options = self._options
            if cache is not None:
                options = replace(options, step_cache=cache)
            place = self._models[model]
            self._open[key] = Prepared.open(place, loras=loras, options=options, cache=self._cache)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        return self._open[key]

    def _check_decoded(self, said: Settings) -> None:
        """Refuse a picture that is none, or damaged or too large, before its job waits."""
        from penstock.engine.media.picture import open_image

        for name in PICTURES:
            if (path := getattr(said, name)) is not None:
                try:
                    open_image(path, max_pixels=self._pixels)
                except ImageError as error:
                    raise _without_path(error, path) from error


def _without_path(error: ImageError, path: Path) -> ImageError:
    """Return the error of a client's picture without its path: where it lies is the server's own
    business."""
    found = None if error.found is None else error.found.replace(str(path), f"the {path.name}")
    return ImageError(error.what, expected=error.expected, found=found, remedy=error.remedy)


def _continued(said: Settings) -> Settings:
    from PIL import Image

    from penstock.engine.media.seam import Clip

    assert said.after is not None
    clip = Clip.open(said.after)
    frame = said.after.with_name(IMAGE)
    Image.fromarray(clip.last).save(frame, "PNG")
    return going_on(replace(said, after=None), clip, frame)


def _frames(prepared: Prepared, said: Settings, seconds: float) -> int:
    """Return the length in frames that is nearest to ``seconds`` and can be made."""
    step = prepared.model.grid.temporal
    fps = said.fps or resolve(Settings(prompt="-"), prepared.model).fps
    return 1 + step * max(0, round((seconds * fps - 1) / step))


def _values(request: GenerationRequest, prepared: Prepared) -> dict[str, Any]:
    """Return a request as settings that say everything; files by the names of the settings."""
    known = {each.name for each in fields(Settings)}
    values = {name: value for name, value in vars(request).items() if name in known}
    files = {name: True for name in (*PICTURES, "after") if values[name] is not None}
    return values | {"size": f"{request.width}x{request.height}", **files}


def _fitting(plan: Plan) -> dict[str, Any]:
    return {
        "fits": True,
        "seconds": plan.seconds,
        "vram_bytes": plan.peak_vram_bytes,
        "ram_bytes": plan.peak_ram_bytes,
        "vram_limit_bytes": plan.vram_limit_bytes,
        "ram_limit_bytes": plan.ram_limit_bytes,
        "phases": [
            {
                "name": phase.name,
                "seconds": phase.seconds,
                "vram_bytes": phase.vram_bytes,
                "ram_bytes": phase.ram_bytes,
            }
            for phase in plan.phases
        ],
        "weight_format": plan.weight_format,
        "problem": None,
        "nearest": None,
    }


def _refused(error: OverBudget, prepared: Prepared) -> dict[str, Any]:
    nearest = error.nearest
    return {
        "fits": False,
        "seconds": None,
        "vram_bytes": error.need_bytes if error.resource == "VRAM" else None,
        "ram_bytes": error.need_bytes if error.resource == "RAM" else None,
        "vram_limit_bytes": prepared.hardware.vram_bytes,
        "ram_limit_bytes": prepared.hardware.ram_bytes,
        "phases": [],
        "weight_format": None,
        "problem": error_values(error),
        "nearest": None
        if nearest is None
        else {"size": f"{nearest[0]}x{nearest[1]}", "num_frames": nearest[2]},
        "alternatives": [],
    }


def _answer(planner: Planner, question: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if question["ask"] == "about":
            return {"answer": planner.about()}
        if question["ask"] == "frame":
            return {"answer": planner.frame(**question["with"])}
        return {"answer": planner.plan(**question["with"])}
    except PenstockError as error:
        return {"error": error_values(error)}
    except Exception as error:  # noqa: BLE001 - one question must not end the others; it is logged
        log.exception("a question")
        return {"error": error_values(error)}


def main() -> None:
    """Answer until standard input ends."""
    line = Line(own_output())
    be_first_to_go()
    config = json.loads(sys.stdin.readline())
    cache = config.get("cache")
    planner = Planner(
        config["models"],
        Options.from_json(config["options"]),
        config["pixels"],
        None if cache is None else Path(cache),
    )
    questions: queue.Queue[Mapping[str, Any]] = queue.Queue()

    def listen() -> None:
        for text in sys.stdin:
            questions.put(json.loads(text))
        os._exit(0)

    threading.Thread(target=listen, name="penstock-questions", daemon=True).start()
    while True:
        question = questions.get()
        line.send({"number": question["number"]} | _answer(planner, question))


if __name__ == "__main__":
    main()
