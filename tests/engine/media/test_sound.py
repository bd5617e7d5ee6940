"""Sound beside frames: as long as it was, as loud as it was, at a rate that AAC has."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from penstock.engine.media.video import Sound, write_video


@pytest.mark.parametrize(("rate", "channels", "kept"), [(32000, 2, 32000), (1600, 1, 48000)])
def test_a_tone(tmp_path: Path, rate: int, channels: int, kept: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(rate) / rate)
    frames = [np.full((16, 16, 3), 90, np.uint8)] * 8
    sound = Sound(np.stack([tone] * channels).astype(np.float32), rate)
    write_video(tmp_path / "a.mp4", frames, 8, sound=sound)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.audio[0]
        assert stream.rate == kept and stream.channels == channels
        heard = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], axis=1)
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 8
    # AAC codes 1,024 samples at a time, and begins with some that were not there.
    assert abs(heard.shape[1] - kept) <= 3 * 1024
    middle = heard[0, kept // 4 : kept // 2]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    crossings = np.count_nonzero(np.diff(np.signbit(middle)))
    assert crossings == pytest.approx(2 * 200 / 4, abs=2)
