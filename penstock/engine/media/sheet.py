"""A video on one page: frames from first to last, side by side, as a PNG."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from penstock.engine.media.video import read_frames
from penstock.errors import OutputError, VideoError

GAP = 4
"""Pixels between frames."""


def sheet_beside(video: Path, *, overwrite: bool = False) -> Path:
    """Return where the contact sheet of ``video`` goes: ``clip.mp4`` has ``clip.frames.png``.

    Raises:
        OutputError: it is there already, and is not to be replaced.
    """
    path = video.with_suffix(".frames.png")
    if path.exists() and not overwrite:
        raise OutputError(
            "the contact sheet exists",
            expected="a new file name",
            found=str(path),
            remedy="Choose another name for the video, or overwrite with --force",
        )
    return path


def write_contact_sheet(
    video: Path, path: Path, *, count: int = 8, columns: int = 4, scale: int = 1
) -> Path:
    """Write ``count`` evenly spaced frames of ``video``, the first and the last among them.

    Args:
        video: a video file, read as `read_frames` does.
        path: the PNG; replaced if it is there.
        count: frames shown, at most as many as there are.
        columns: frames in a row.
        scale: pixels of the sheet for one of the video, for small videos.

    Returns:
        ``path``.

    Raises:
        VideoError: the video cannot be read or is empty.
        OutputError: the PNG cannot be written.
    """
    frames = list(read_frames(video))
    if not frames:
        raise VideoError("the video is empty", expected="one frame or more", found=str(video))
    count = min(count, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
    height, width = (side * scale for side in frames[0].shape[:2])
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for index, frame in enumerate(chosen):
        row, column = divmod(index, columns)
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(picture, (column * (width + GAP), row * (height + GAP)))
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise OutputError(
            "the contact sheet cannot be written",
            expected="a writable place",
            found=f"{path}: {error.strerror or error}",
            remedy="Choose another folder for the output",
        ) from error
    return path
