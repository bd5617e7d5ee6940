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


def first_and_last(path: Path) -> tuple[float, float, float]:
    """Seconds at which something is heard first and last, and at which the sound ends."""
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        ends = float((stream.start_time + stream.duration) * stream.time_base)
        frames = [(each.time, each.to_ndarray()[0]) for each in file.decode(audio=0)]
        rate = stream.rate
    loud = [start + at / rate for start, wave in frames for at in np.nonzero(np.abs(wave) > 0.2)[0]]
    return loud[0], loud[-1], ends


@pytest.mark.parametrize(("rate", "length"), [(32000, 165_600), (24000, 41_000), (1600, 1_600)])
def test_sound_begins_with_the_first_frame_and_ends_where_it_ended(
    tmp_path: Path, rate: int, length: int
) -> None:
    """The encoder puts samples of its own before the first; players are told to leave them out."""
    samples = np.zeros((2, length), np.float32)
    tone = 0.8 * np.sin(2 * np.pi * (rate / 8) * np.arange(rate // 40) / rate + 1)
    samples[:, : len(tone)] = samples[:, -len(tone) :] = tone
    frames = [np.full((16, 16, 3), 90, np.uint8)] * round(24 * length / rate)
    write_video(tmp_path / "a.mp4", frames, 24, sound=Sound(samples, rate))
    first, last, ends = first_and_last(tmp_path / "a.mp4")
    assert first == pytest.approx(0, abs=0.003)
    assert last == pytest.approx(length / rate, abs=0.003)
    assert ends == pytest.approx(length / rate, abs=0.002)
    with av.open(str(tmp_path / "a.mp4")) as file:
        (video,) = file.streams.video
        assert video.start_time == 0 and video.average_rate == 24
