#!/usr/bin/env bash
# PyAV 18.1.0 (its wheel's FFmpeg): an AAC encoder puts 1,024 samples of its own before the first one.
# A frame with a pts leads to packets that begin 1,024 samples before it, and the mp4 tells players to
# leave these out. A frame without a pts (the default of AudioFrame.from_ndarray) is encoded without a
# word, its packets begin at 0, and nothing is left out: all players give the sound 1,024 samples late,
# 32 ms at 32 kHz, three quarters of a frame of a video at 24 frames a second; it ends as late.
# Set frame.pts = 0 and frame.time_base = 1 / rate.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q av==18.1.0 numpy
cat > "$place/seen.py" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np

RATE, LENGTH = 32000, 32000


def first_heard(path, timed):
    samples = 0.8 * np.sin(np.arange(LENGTH) / 3 + 1).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = RATE
    if timed:
        frame.pts, frame.time_base = 0, Fraction(1, RATE)
    with av.open(path, "w") as file:
        stream = file.add_stream("aac", rate=RATE, layout="mono")
        cut = av.AudioResampler(format="fltp", layout="mono", rate=RATE, frame_size=1024)
        for each in (*cut.resample(frame), *cut.resample(None)):
            file.mux(stream.encode(each))
        file.mux(stream.encode(None))
    with av.open(path) as file:
        heard = [(each.time, each.to_ndarray()[0]) for each in file.decode(audio=0)]
        ends = file.streams.audio[0].duration
    start, wave = next((t, w) for t, w in heard if np.abs(w).max() > 0.2)
    return round(start * RATE) + int(np.argmax(np.abs(wave) > 0.2)), ends


late, its_end = first_heard(sys.argv[1] + "/late.mp4", timed=False)
right, right_end = first_heard(sys.argv[1] + "/right.mp4", timed=True)
print(f"without a pts: heard from sample {late} on, {its_end} samples long")
print(f"with a pts:    heard from sample {right} on, {right_end} samples long")
assert 1000 < late < 1100 and right < 50, (late, right)
assert its_end == LENGTH + 1024 and right_end == LENGTH, (its_end, right_end)
PY
"$place/venv/bin/python" "$place/seen.py" "$place"
