"""The contact sheet shows the frames that the video has, in order."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penstock.engine.media.sheet import GAP, sheet_beside, write_contact_sheet
from penstock.engine.media.video import write_video
from penstock.errors import OutputError, VideoError


def _video(folder: Path, frames: int) -> Path:
    path = folder / "clip.mp4"
    levels = [np.full((32, 48, 3), 20 + 10 * index, np.uint8) for index in range(frames)]
    write_video(path, levels, 8, crf=0)
    return path


def _level(sheet: Image.Image, row: int, column: int, scale: int = 1) -> int:
    x = column * (48 * scale + GAP) + 5
    y = row * (32 * scale + GAP) + 5
    return sheet.getpixel((x, y))[0]


def test_first_and_last_frame_and_those_between_in_order(tmp_path: Path) -> None:
    path = write_contact_sheet(_video(tmp_path, 17), tmp_path / "sheet.png", count=5, columns=3)
    with Image.open(path) as sheet:
        assert sheet.size == (3 * 48 + 2 * GAP, 2 * 32 + GAP)
        shown = [_level(sheet, *divmod(index, 3)) for index in range(5)]
    assert shown == pytest.approx([20, 60, 100, 140, 180], abs=3)


def test_a_short_video_is_shown_whole_and_scaled(tmp_path: Path) -> None:
    path = write_contact_sheet(_video(tmp_path, 2), tmp_path / "sheet.png", scale=2)
    with Image.open(path) as sheet:
        assert sheet.size == (2 * 96 + GAP, 64)
        assert _level(sheet, 0, 1, 2) == pytest.approx(30, abs=3)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(b"not a video" * 100)
    with pytest.raises(VideoError, match="junk"):
        write_contact_sheet(junk, tmp_path / "sheet.png")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no-such-folder"):
        write_contact_sheet(_video(tmp_path, 3), tmp_path / "no-such-folder" / "sheet.png")


def test_a_sheet_that_is_there_is_not_lost(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    path = sheet_beside(video)
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--force"):
        sheet_beside(video)
    assert sheet_beside(video, overwrite=True) == path
