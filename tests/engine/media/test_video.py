import errno
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from penstock.engine.media import video
from penstock.engine.media.video import check_output, read_frames, read_metadata, write_video
from penstock.errors import OutputError, VideoError

SETTINGS = {"prompt": 'a cat, "猫"\nruns', "seed": 4294967295, "shift": 5.0, "version": "0.1.0"}


def moving_frames(count=9, width=64, height=48):
    """A smooth gradient that drifts: compresses well and differs from frame to frame."""
    y, x = np.mgrid[0:height, 0:width]
    for i in range(count):
        red, green = (x * 2 + 8 * i) % 256, (y * 3 + 4 * i) % 256
        yield np.stack([red, green, (x + y) % 256], axis=-1).astype(np.uint8)


def flat_frames(color, count=3):
    return [np.full((32, 32, 3), color, np.uint8)] * count


def decode(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def leftovers(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_what_is_written_is_read_again(tmp_path):
    written = write_video(tmp_path / "out.mp4", moving_frames(), 16, SETTINGS)
    assert leftovers(tmp_path) == ["out.mp4"]
    assert (written.frames, written.encoder) == (9, "libx264")
    assert written.size_bytes == (tmp_path / "out.mp4").stat().st_size
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.frames, stream.width, stream.height) == (9, 64, 48)
        assert stream.average_rate == 16
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)
        assert context.color_range == 1
        assert float(stream.duration * stream.time_base) == pytest.approx(9 / 16)
    assert read_metadata(tmp_path / "out.mp4") == SETTINGS


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(25, 2)])
def test_a_rate_with_a_fraction_is_exact_in_the_file(tmp_path, rate):
    write_video(tmp_path / "out.mp4", moving_frames(), rate)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert stream.duration * stream.time_base == 9 / rate


def test_a_name_in_another_encoding_is_refused_before_the_job(tmp_path):
    with pytest.raises(OutputError, match="not text in UTF-8"):
        check_output(tmp_path / "caf\udce9.mp4")


def test_frames_keep_their_order_and_look(tmp_path):
    write_video(tmp_path / "out.mp4", moving_frames(), 16, crf=10)
    for ours, source in zip(decode(tmp_path / "out.mp4"), moving_frames(), strict=True):
        # Wrapped gradients have hard edges, which 4:2:0 blurs: compare the middle of the errors
        assert np.median(np.abs(ours.astype(int) - source)) <= 4


@pytest.mark.parametrize("color", [(0, 200, 0), (220, 30, 40), (20, 60, 240), (255, 255, 255)])
def test_colours_are_converted_by_the_matrix_the_file_names(tmp_path, color):
    write_video(tmp_path / "out.mp4", flat_frames(color), 16, crf=1)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        y, u, v = (float(frame.to_ndarray()[row, 5]) for row in (5, 35, 43))
    # ITU-R BT.709-6, limited range
    luma = (y - 16) / 219
    red, blue = luma + 1.5748 * (v - 128) / 224, luma + 1.8556 * (u - 128) / 224
    green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
    assert np.allclose(np.array([red, green, blue]) * 255, color, atol=4)


def test_faststart_puts_the_index_first(tmp_path):
    write_video(tmp_path / "out.mp4", moving_frames(), 16)
    data = (tmp_path / "out.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_without_metadata(tmp_path):
    write_video(tmp_path / "out.mp4", moving_frames(1), 16)
    assert read_metadata(tmp_path / "out.mp4") == {}
    assert SETTINGS["prompt"].encode() not in (tmp_path / "out.mp4").read_bytes()


@pytest.mark.parametrize("comment", ["just words", "[1, 2]"])
def test_a_foreign_comment_is_not_ours(tmp_path, comment):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(flat_frames(9)[0], format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    assert read_metadata(tmp_path / "a.mp4") == {}


def test_reading_metadata_of_no_video(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(VideoError, match="a.mp4"):
        read_metadata(tmp_path / "a.mp4")


def test_tensors_and_arrays_give_the_same_file(tmp_path):
    write_video(tmp_path / "a.mp4", moving_frames(), 16)
    write_video(tmp_path / "b.mp4", map(torch.from_numpy, moving_frames()), 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


WRITE = """
import hashlib, sys
from pathlib import Path
import numpy as np
from penstock.engine.media.video import write_video
frames = np.load(sys.argv[1])
write_video(Path(sys.argv[2]), frames, 16)
print(hashlib.sha256(Path(sys.argv[2]).read_bytes()).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
@pytest.mark.parametrize(("width", "height"), [(64, 64), (112, 64), (416, 240)])
def test_the_file_does_not_depend_on_what_memory_held(tmp_path, width, height):
    """glibc fills new memory with another byte in each process; the file must be the same."""
    rng = np.random.default_rng(0)
    frames = np.stack(list(moving_frames(17, width, height)))
    frames[:, 8:24, 8:24] = rng.integers(0, 256, (17, 16, 16, 3))
    np.save(tmp_path / "frames.npy", frames)
    told = [
        subprocess.run(
            [sys.executable, "-c", WRITE, tmp_path / "frames.npy", tmp_path / f"{fill}.mp4"],
            env=os.environ | {"MALLOC_PERTURB_": str(fill)},
            capture_output=True, text=True, check=True,
        ).stdout
        for fill in (17, 85, 165, 254)
    ]  # fmt: skip
    assert len(set(told)) == 1


def test_a_higher_crf_makes_a_smaller_file(tmp_path):
    sizes = [
        write_video(tmp_path / f"{crf}.mp4", moving_frames(), 16, crf=crf).size_bytes
        for crf in (5, 40)
    ]
    assert sizes[1] < sizes[0]


def test_frames_are_taken_one_by_one(tmp_path):
    alive = []

    def frames():
        for frame in moving_frames(6):
            alive.append(len(leftovers(tmp_path)))
            yield frame

    write_video(tmp_path / "out.mp4", frames(), 16)
    assert alive == [1] * 6


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("decode"), OSError("mine")])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_an_interrupted_job_leaves_nothing(tmp_path, error, position):
    def frames():
        for i, frame in enumerate(moving_frames()):
            if i == position:
                raise error
            yield frame

    with pytest.raises(type(error)) as caught:
        write_video(tmp_path / "out.mp4", frames(), 16, SETTINGS)
    assert caught.value is error
    assert leftovers(tmp_path) == []


def test_an_interrupted_overwrite_keeps_the_old_file(tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"old")

    def frames():
        yield from moving_frames(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "out.mp4", frames(), 16, overwrite=True)
    assert leftovers(tmp_path) == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    write_video(tmp_path / "out.mp4", moving_frames(2), 16, overwrite=True)
    assert len(decode(tmp_path / "out.mp4")) == 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([np.zeros((32, 32), np.uint8)], "not a frame"),
        ([np.zeros((32, 32, 4), np.uint8)], "not a frame"),
        ([np.zeros((32, 32, 3), np.float32)], "float32"),
        ([np.zeros((33, 32, 3), np.uint8)], "even"),
        ([*flat_frames(0), np.zeros((32, 34, 3), np.uint8)], "differ in size"),
    ],
)
def test_wrong_frames(tmp_path, frames, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / "out.mp4", frames, 16)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["replace", "fsync", "mux", "close"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullContainer:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            if name == call:
                self._inner.close()
                return full
            return getattr(self._inner, name)

    open_container = av.open
    if call == "replace":
        monkeypatch.setattr(os, "link", full)
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(av, "open", lambda *a, **k: FullContainer(open_container(*a, **k)))
    with pytest.raises(VideoError, match="No space left"):
        write_video(tmp_path / "out.mp4", moving_frames(), 16)
    assert leftovers(tmp_path) == []


def test_an_error_while_abandoning_does_not_hide_the_first(tmp_path, monkeypatch):
    class Container:
        metadata: dict = {}

        def close(self):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(av, "open", lambda *a, **k: Container())
    with pytest.raises(VideoError, match="no frames"):
        write_video(tmp_path / "out.mp4", [], 16)
    assert leftovers(tmp_path) == []


def test_encoders_in_order_and_none(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"h264_mf", "libopenh264"})
    assert video._find_encoder() == "libopenh264"
    monkeypatch.setattr(av, "codecs_available", {"h264", "vp9"})
    with pytest.raises(VideoError, match="no H.264 encoder.*libx264"):
        write_video(tmp_path / "out.mp4", moving_frames(), 16)
    assert leftovers(tmp_path) == []


def test_an_encoder_without_crf_gets_a_bit_rate(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        # mpeg4 stands in: PyAV's wheel has only one H.264 encoder that runs anywhere
        stream = video._add_stream(container, (48, 64, 3), 16, "mpeg4", 17)
        assert stream.bit_rate == 12288
        assert "crf" not in stream.options


def test_outputs_that_are_refused_before_the_job(tmp_path):
    existing = tmp_path / "there.mp4"
    existing.write_bytes(b"old")
    (tmp_path / "folder.mp4").mkdir()
    for path, message in [
        (tmp_path / "out.avi", "ends in .mp4.*out.avi.*Call it out.mp4"),
        (tmp_path / "out", "Call it out.mp4"),
        (tmp_path / "none" / "out.mp4", "no such folder"),
        (existing / "out.mp4", "no such folder"),
        (existing, "exists.*--force"),
        (tmp_path / "folder.mp4", "not a file"),
    ]:
        with pytest.raises(OutputError, match=message):
            check_output(path)
        with pytest.raises(OutputError, match=message):
            write_video(path, moving_frames(), 16)
    check_output(existing, overwrite=True)
    with pytest.raises(OutputError, match="not a file"):
        check_output(tmp_path / "folder.mp4", overwrite=True)
    check_output(tmp_path / "OUT.MP4")
    assert leftovers(tmp_path) == ["folder.mp4", "there.mp4"]
    assert existing.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write")
def test_an_unwritable_folder():
    with pytest.raises(OutputError, match="cannot be written.*/proc"):
        check_output(Path("/proc/out.mp4"))


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path):
    def frames():
        yield from moving_frames(2)
        (tmp_path / "out.mp4").write_bytes(b"new")

    with pytest.raises(OutputError, match="exists"):
        write_video(tmp_path / "out.mp4", frames(), 16)
    assert (tmp_path / "out.mp4").read_bytes() == b"new"
    assert leftovers(tmp_path) == ["out.mp4"]


def test_the_folder_is_flushed_where_that_exists(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(handle))
    write_video(tmp_path / "a.mp4", moving_frames(1), 16)
    assert len(flushed) == (2 if os.name == "posix" else 1)


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_video(tmp_path / "a.mp4", moving_frames(1), 16)
    assert (tmp_path / "a.mp4").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_frame_larger_than_any_video_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, [np.zeros((32, 48, 3), np.uint8)] * 2, 8)
    monkeypatch.setattr(video, "MOST_PIXELS", 40 * 64)  # the decoder counts what it pads to
    assert len(list(read_frames(path))) == 2
    monkeypatch.setattr(video, "MOST_PIXELS", 32 * 48 - 1)
    with pytest.raises(VideoError, match="a.mp4"):
        list(read_frames(path))
