"""The moving picture of the README: videos of the small model in the box, side by side.

    python -m documents.film

Made on the CPU in about half a minute; the same file each time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from penstock.engine.engine import Engine
from penstock.engine.prepared import Prepared
from penstock.engine.request.demo import MINI, demo_settings
from penstock.engine.request.settings import resolve
from penstock.profiles.options import Options

FILM = Path(__file__).parent.parent / "docs" / "demo.gif"
PROMPTS = (
    "a green square moves to the right",
    "a green square moves to the left",
    "a green square moves up",
    "a green square grows",
)
SCALE = 3
CAPTION = 26
MARGIN = 6
MILLISECONDS = 125
"""A frame; a GIF counts in hundredths of a second."""


def main() -> None:
    """Write the film."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [frames_of(video) for video in videos(Path(folder))]
    film = [side_by_side(frames) for frames in zip(*rows, strict=True)]
    first, *others = (picture.quantize(64) for picture in film)
    first.save(
        FILM, save_all=True, append_images=others, duration=MILLISECONDS, loop=0, optimize=True
    )
    print(f"{FILM}: {len(film)} frames, {FILM.stat().st_size:,} bytes")


def videos(folder: Path) -> list[Path]:
    """A video for each prompt, all from the demo's picture and seed."""
    made = []
    prepared = Prepared.open(MINI, options=Options(vram="1GiB", ram="1GiB", device="cpu"))
    with Engine(prepared) as engine:
        for place, prompt in enumerate(PROMPTS):
            request = resolve(demo_settings(prompt), prepared.about)
            made.append(folder / f"{place}.mp4")
            engine.submit(request, made[-1]).result()
    return made


def frames_of(video: Path) -> list[Image.Image]:
    """All of its frames."""
    with av.open(video) as opened:
        return [frame.to_image() for frame in opened.decode(video=0)]


def side_by_side(frames: tuple[Image.Image, ...]) -> Image.Image:
    """Enlarged, each under its prompt."""
    width, height = (SCALE * side for side in frames[0].size)
    whole = Image.new("RGB", (len(frames) * (width + MARGIN) - MARGIN, height + CAPTION), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for place, (frame, prompt) in enumerate(zip(frames, PROMPTS, strict=True)):
        left = place * (width + MARGIN)
        pen.text((left + 2, 5), prompt, fill="black", font=font)
        whole.paste(frame.resize((width, height), Image.Resampling.LANCZOS), (left, CAPTION))
    return whole


if __name__ == "__main__":
    main()
