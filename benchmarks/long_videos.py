"""Long videos of the trained small model: in windows, all at once, and clip after clip.

The model knows 17 frames of 64x64 (`penstock/assets/mini`). Held-out pictures whose shape shall
turn, which can go on for ever, are made into 49 and 81 frames: ``windows``, windows of 17 frames
that share visits; ``at once``, one denoising of all frames; ``clips``, jobs of 17 frames each, from
the last frame of the one before; ``clips, matched``, the same with colours matched at the seam as
``--continue`` does. Said of each: the share of stretches of 17 frames in which the asked motion
happens in the asked colour on the right background (`training.score`); how far frames differ at
seams, over the median elsewhere in the same video; and the share of seams that differ no more than
any two neighbouring frames elsewhere. The last line on stdout is JSON.

    python -m benchmarks.long_videos [--clips 6] [--overlap 8] [--frames 49 81]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from penstock.engine.engine import Engine
from penstock.engine.media.seam import Colours
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.settings import Settings, resolve
from training.clips import Motion, caption, possible_motions, random_scene, render, rng_for
from training.score import judge

MINI = Path(__file__).parents[1] / "penstock" / "assets" / "mini"
WINDOW = 17
TURNS = ("clockwise", "counter-clockwise")


def cases(count: int) -> list[tuple[Any, Motion, str]]:
    """``count`` held-out scenes whose shape can turn, and the prompts for it."""
    found: list[tuple[Any, Motion, str]] = []
    index = 0
    while len(found) < count:
        rng = rng_for("test", index)
        index += 1
        scene = random_scene(rng)
        kind = TURNS[len(found) % 2]
        motions = [each for each in possible_motions(scene) if each.kind == kind]
        if motions:
            motion = motions[int(rng.integers(len(motions)))]
            found.append((scene, motion, caption(rng, scene, motion)))
    return found


def made(engine: Engine, request: GenerationRequest) -> np.ndarray:
    """The frames (t, h, w, 3), uint8."""
    video: np.ndarray = engine.submit(request).result().video.numpy()
    return video


def clip_after_clip(engine: Engine, request: GenerationRequest) -> np.ndarray:
    """As many frames, 17 by 17, each from the last picture before; colours as they come."""
    assert request.image is not None and request.seed is not None
    frames = made(engine, replace(request, frames=WINDOW))
    parts = [frames]
    for number in range((request.frames - 1) // (WINDOW - 1) - 1):
        Image.fromarray(parts[-1][-1]).save(request.image)
        again = replace(request, frames=WINDOW, seed=request.seed + 1 + number)
        parts.append(made(engine, again))
    return np.concatenate([parts[0], *(part[1:] for part in parts[1:])])


def matched(engine: Engine, request: GenerationRequest) -> np.ndarray:
    """`clip_after_clip` with each clip in the colours of the one before, which the next sees."""
    assert request.image is not None and request.seed is not None
    frames = list(made(engine, replace(request, frames=WINDOW)))
    number = 0
    while len(frames) < request.frames:
        number += 1
        Image.fromarray(frames[-1]).save(request.image)
        again = made(engine, replace(request, frames=WINDOW, seed=request.seed + number))
        turned = Colours.between(again[1], frames[-1])
        frames += [turned(frame) for frame in again[1:]]
    return np.stack(frames)


def at_once(engine: Engine, request: GenerationRequest) -> np.ndarray:
    """All frames in one denoising."""
    return made(engine, replace(request, window=0))


MAKE: Mapping[str, Callable[[Engine, GenerationRequest], np.ndarray]] = {
    "windows": made,
    "at once": at_once,
    "clips": clip_after_clip,
    "clips, matched": matched,
}


def seams(way: str, request: GenerationRequest) -> list[int]:
    """Frames before which a window begins or ends, or a clip begins."""
    frames = request.frames
    if way == "at once":
        return []
    if way != "windows":
        return list(range(WINDOW, frames, WINDOW - 1))
    assert request.windows is not None
    latent = request.windows.latent(4)
    total = (frames - 1) // 4 + 1
    ends = {edge for part in latent.parts(total) for edge in (part.start, part.stop)}
    return sorted(4 * (edge - 1) + 1 for edge in ends if 0 < edge < total)


def measure(frames: np.ndarray, scene: Any, motion: Motion, at: list[int]) -> dict[str, Any]:
    """What is said of one video."""
    shown: Any = frames.astype(np.float32) / 255
    starts = range(0, len(frames) - WINDOW + 1, WINDOW - 1)
    verdicts = [judge(shown[start : start + WINDOW], scene, motion) for start in starts]
    differences = np.abs(np.diff(shown, axis=0)).mean((1, 2, 3))
    here = np.zeros(len(differences), bool)
    here[[place - 1 for place in at]] = True
    elsewhere = differences[~here]
    jumps = differences[here] / np.median(elsewhere)
    return {
        "right": [verdict.right for verdict in verdicts],
        "moves": [verdict.motion for verdict in verdicts],
        "jumps": jumps.tolist(),
        "within": (differences[here] <= elsewhere.max()).tolist(),
    }


def one_way(
    engine: Engine, way: str, count: int, frames: int, overlap: int
) -> Iterator[dict[str, Any]]:
    """What is said of each video that is made in that way."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        for number, (scene, motion, prompt) in enumerate(cases(count)):
            still = (render(scene, None, 1)[0] * 255).round().astype(np.uint8)
            Image.fromarray(still).save(picture)
            settings = Settings(
                prompt=prompt, image=picture, seed=100 * number, frames=frames, window=WINDOW,
                overlap=overlap,
            )  # fmt: skip
            request = resolve(settings, engine.model)
            video = MAKE[way](engine, request)
            yield measure(video, scene, motion, seams(way, request))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all videos of a row of the table say together."""
    together = {name: [each for row in rows for each in row[name]] for name in rows[0]}
    jumps = together["jumps"]
    return {
        "right": round(statistics.mean(together["right"]), 3),
        "moves": round(statistics.mean(together["moves"]), 3),
        "last_right": round(statistics.mean(row["right"][-1] for row in rows), 3),
        "jump": round(statistics.median(jumps), 2) if jumps else None,
        "largest_jump": round(max(jumps), 2) if jumps else None,
        "within": round(statistics.mean(together["within"]), 3) if jumps else None,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--clips", type=int, default=6)
    arguments.add_argument("--overlap", type=int, default=8)
    arguments.add_argument("--frames", type=int, nargs="+", default=[49, 81])
    arguments.add_argument("--ways", nargs="+", default=list(MAKE))
    options = arguments.parse_args()
    rows = []
    with Engine.open(MINI, device="cpu", vram="1GiB", ram="1GiB") as engine:
        for frames in options.frames:
            for way in options.ways:
                started = time.process_time()
                found = list(one_way(engine, way, options.clips, frames, options.overlap))
                cpu = (time.process_time() - started) / options.clips
                row = {"frames": frames, "way": way, "clips": options.clips, **summary(found)}
                row["cpu_s"] = round(cpu, 1)
                print(row, flush=True)
                rows.append(row)
    print(json.dumps({"benchmark": "long_videos", "overlap": options.overlap, "rows": rows}))


if __name__ == "__main__":
    main()
