"""Frames to a finished mp4, or nothing: H.264, 4:2:0, BT.709, playable while it downloads.

Frames are encoded as they come; the file appears under its name only when it is complete. PyAV is
loaded with the first file: what writes none, a benchmark for one, runs without it.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from penstock.engine.software import LEAST_TO_WRITE, check_versions
from penstock.engine.store.durable import FileOps
from penstock.errors import OutputError, VideoError
from penstock.regular import check_regular

SUFFIX = ".mp4"
# libx264 first; the others are what an FFmpeg without it may have on Linux, macOS and Windows
ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "h264_mf")
# Visually lossless for x264 by common usage (its own default is 23)
DEFAULT_CRF = 17
# x264's output depends on its thread count: a fixed one makes files the same everywhere
_X264_THREADS = 4
_BITS_A_PIXEL = 0.25  # for encoders without CRF
MOST_PIXELS = 139_264 * 256
"""Of a frame that is decoded: what the highest level of H.264 holds, in macroblocks (ITU-T H.264,
table A-1). A file may claim any size, and the decoder makes room for it."""
_STEM_CHARS = 40  # what is added to a name must not make it too long for the file system
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_BT709 = 1  # ITU-T H.273: primaries, transfer and matrix alike


@dataclass(frozen=True)
class Sound:
    """What is heard with a video.

    Attributes:
        samples: fp32 ``(channels, n)``, one channel or two, in -1..1.
        rate: samples a second.
    """

    samples: np.ndarray[Any, Any]
    rate: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return float(self.samples.shape[1] / self.rate)


@dataclass(frozen=True)
class WrittenVideo:
    """What `write_video` made.

    Attributes:
        path: the file.
        encoder: the H.264 encoder that wrote it, one of `ENCODERS`.
        frames: number of frames.
        size_bytes: of the file.
    """

    path: Path
    encoder: str
    frames: int
    size_bytes: int


def check_output(path: Path, overwrite: bool = False) -> None:
    """Find out before the job whether ``path`` can be written after it.

    Really makes (and removes) a file in the folder, which is the only sure test.

    Raises:
        OutputError: a name in another encoding, wrong extension, no such folder, folder not
            writable, a folder or device in the file's place, or an existing file without
            ``overwrite``.
        UsageError: PyAV is absent or too old.
    """
    check_versions(LEAST_TO_WRITE)
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise OutputError(
            "the output's name is not text in UTF-8",
            expected="Unicode",
            found=ascii(str(path)),
            remedy="Choose another name",
        )
    if path.suffix.lower() != SUFFIX:
        raise OutputError(
            "unsupported video format",
            expected=f"a name that ends in {SUFFIX}",
            found=str(path),
            remedy=f"Call it {path.with_suffix(SUFFIX).name}" if path.name else None,
        )
    try:
        if not path.parent.is_dir():
            raise OutputError(
                "no such folder",
                expected="an existing folder",
                found=str(path.parent),
                remedy="Make the folder first",
            )
        _check_vacant(path, overwrite)
    except OSError as error:
        raise OutputError(
            "the output cannot be written",
            found=f"{path}: {error.strerror}",
            remedy="Choose another name or folder",
        ) from error
    with _temporary_beside(path):
        pass


def check_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is one of the files that the job reads, whatever its name.

    Raises:
        OutputError: it is one.
    """
    for each in inputs:
        if _same_file(path, each):
            raise OutputError(
                "the output is one of the job's own inputs",
                expected="a file that nothing is read from",
                found=f"{path}, which is {each}",
                remedy="Choose another name; --force does not change this",
            )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False  # one of them is not there


def _check_vacant(path: Path, overwrite: bool) -> None:
    if path.is_symlink() and not path.exists():
        raise OutputError("the output is a broken link", expected="a file name", found=str(path))
    if path.exists() and not path.is_file():
        raise OutputError(
            "the output is not a file", expected="a file name", found=f"{path}, which is none"
        )
    if path.exists() and not overwrite:
        raise taken(path)


def taken(path: Path) -> OutputError:
    """Return the error of an output whose name another file has."""
    return OutputError(
        "the output exists",
        expected="a new file name",
        found=str(path),
        remedy="Choose another name, or overwrite with --force (overwrite=True)",
    )


def write_video(
    path: Path,
    frames: Iterable[Any],
    fps: Fraction | int,
    metadata: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
    crf: int = DEFAULT_CRF,
    or_beside: bool = False,
    finished: Callable[[Path], None] = lambda file: None,
    sound: Sound | None = None,
) -> WrittenVideo:
    """Encode frames into an mp4 that appears when it is complete.

    Written to a temporary file in the same folder, flushed to disk and given its name in one step
    that does not replace a file unless ``overwrite`` says so. Whatever goes wrong, Ctrl-C and
    errors of ``frames`` included, nothing is left behind and an existing file is untouched.

    Args:
        path: the mp4.
        frames: uint8 arrays or CPU tensors ``(h, w, 3)``, RGB, all of one even size.
        fps: frames a second; the file holds this very ratio.
        metadata: JSON-ready; stored as the file's comment, read again by `read_metadata`.
        overwrite: replace an existing file.
        crf: x264's constant rate factor, 0 (lossless) to 51.
        or_beside: where another file has the name by then, take a free one like it.
        finished: called with the finished file before it gets its name.
        sound: what is heard with it.

    Raises:
        OutputError: see `check_output`.
        VideoError: no encoder, no frames, a frame of the wrong kind, or a failure of the encoder or
            the disk.
    """
    if not or_beside:
        check_output(path, overwrite)
    encoder = _find_encoder()
    with _temporary_beside(path) as temporary:
        count = _encode(temporary, frames, fps, metadata, encoder, crf, sound)
        with _as_video_error(path):
            ops = FileOps()
            _flush(ops, temporary)
            size_bytes = ops.size(temporary)
            finished(temporary)
            named = _name(ops, temporary, path, overwrite, or_beside)
            ops.fsync_dir(path.parent)
    return WrittenVideo(named, encoder, count, size_bytes)


def _name(ops: FileOps, temporary: Path, path: Path, overwrite: bool, or_beside: bool) -> Path:
    """Give the finished file its name, or the first free one after it.

    Raises:
        OutputError: the name is taken.
    """
    if overwrite:
        ops.rename(temporary, path)
        return path
    for number in itertools.count(1):
        target = path if number == 1 else _numbered(path, number)
        try:
            ops.rename_new(temporary, target)
        except FileExistsError:
            if not or_beside:
                raise taken(path) from None
        else:
            break
    return target


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem[:_STEM_CHARS]}-{number}{path.suffix}")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what `write_video` stored; empty if the file has none of ours.

    Raises:
        VideoError: the file cannot be read as a video.
    """
    with _opened(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        stored = json.loads(comment)
    except (ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def read_frames(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the frames of a video file as uint8 arrays ``(h, w, 3)``, RGB, in order.

    Raises:
        VideoError: the file cannot be read as a video.
    """
    with _opened(path) as container:
        for stream in container.streams.video[:1]:
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def frame_rate_of(path: Path) -> Fraction:
    """Return the frames a second of a video file.

    Raises:
        VideoError: the file cannot be read as a video, or does not say.
    """
    with _opened(path) as container:
        rates = [stream.average_rate for stream in container.streams.video]
    if not rates or rates[0] is None:
        raise VideoError("no frame rate", expected="a video", found=str(path))
    return Fraction(rates[0])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Provide a video file to be read, looked at first: a named pipe keeps the library waiting
    without end, and a device has one."""
    import av

    with _as_video_error(path):
        check_regular(path)
        with av.open(str(path)) as container:
            yield container


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Provide a new file in ``path``'s folder, gone afterwards unless it was renamed."""
    temporary = path.with_name(f".{path.stem[:_STEM_CHARS]}.{secrets.token_hex(4)}.part{SUFFIX}")
    try:
        temporary.open("xb").close()
    except OSError as error:
        raise OutputError(
            "the folder cannot be written",
            expected="a writable folder",
            found=f"{path.parent}: {error.strerror}",
            remedy="Choose another folder, or change its permissions",
        ) from error
    try:
        yield temporary
    finally:
        FileOps().unlink(temporary)


@contextmanager
def _as_video_error(path: Path) -> Iterator[None]:
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(
            "the video could not be written or read",
            found=f"{path}: {error.strerror or error}",
            remedy="Check the free space on the disk and the file",
        ) from error


def _find_encoder() -> str:
    import av

    for name in ENCODERS:
        if name in av.codecs_available:
            return name
    raise VideoError(
        "no H.264 encoder",
        expected=" or ".join(ENCODERS) + " in PyAV's FFmpeg",
        found="none of them",
        remedy="Install PyAV's own wheel: pip install --force-reinstall av",
    )


def _encode(
    temporary: Path,
    frames: Iterable[Any],
    fps: Fraction | int,
    metadata: dict[str, Any] | None,
    encoder: str,
    crf: int,
    sound: Sound | None,
) -> int:
    import av

    with _as_video_error(temporary):
        container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
    count = 0
    stream = heard = None
    with ExitStack() as on_failure:
        on_failure.callback(_abandon, container)
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
        for frame in frames:
            pixels = _as_pixels(frame, stream)
            with _as_video_error(temporary):
                if stream is None:
                    stream = _add_stream(container, pixels.shape, fps, encoder, crf)
                    heard = None if sound is None else _add_sound(container, sound)
                container.mux(stream.encode(_convert(pixels, count)))
            count += 1
        if stream is None:
            raise VideoError("there are no frames to write", expected="one frame or more")
        with _as_video_error(temporary):
            container.mux(stream.encode(None))
            if sound is not None:
                _encode_sound(container, heard, sound)
        on_failure.pop_all()
    with _as_video_error(temporary):
        container.close()  # completes the file
    return count


def _abandon(container: Any) -> None:
    import av

    try:
        container.close()
    except (av.error.FFmpegError, OSError):
        # The file is about to be removed, and the first error is the one to report
        return


def _add_stream(
    container: Any, shape: tuple[int, ...], fps: Fraction | int, encoder: str, crf: int
) -> Any:
    from av.video.reformatter import ColorRange

    stream = container.add_stream(encoder, rate=fps)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.color_range = int(ColorRange.MPEG)
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    if encoder == "libx264":
        # x264's macroblock tree reads memory that it never wrote: equal frames gave unequal files
        stream.options = {"crf": str(crf), "preset": "medium", "mbtree": "0"}
        context.thread_count = _X264_THREADS
    else:
        stream.bit_rate = round(_BITS_A_PIXEL * shape[0] * shape[1] * fps)
    return stream


def _add_sound(container: Any, sound: Sound) -> Any:
    """Return an AAC stream; other rates than it has are resampled to 48 kHz."""
    rate = sound.rate if sound.rate in _AAC_RATES else _AAC_RATES[-1]
    return container.add_stream("aac", rate=rate, layout=_layout(sound))


def _layout(sound: Sound) -> str:
    return "mono" if len(sound.samples) == 1 else "stereo"


def _encode_sound(container: Any, stream: Any, sound: Sound) -> None:
    import av

    samples = np.ascontiguousarray(sound.samples[:2], dtype=np.float32).clip(-1, 1)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_layout(sound))
    frame.sample_rate = sound.rate
    # From 0 on: the encoder's own first samples then lie before it, and players leave them out
    frame.pts, frame.time_base = 0, Fraction(1, sound.rate)
    resampler = av.AudioResampler(
        format="fltp", layout=_layout(sound), rate=stream.rate, frame_size=stream.frame_size or 1024
    )
    for each in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(stream.encode(each))
    container.mux(stream.encode(None))


def _as_pixels(frame: Any, stream: Any) -> np.ndarray[Any, Any]:
    pixels = np.ascontiguousarray(frame)
    kind = f"{pixels.dtype} {pixels.shape}"
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise VideoError("not a frame", expected="uint8 (h, w, 3)", found=kind)
    if pixels.shape[0] % 2 or pixels.shape[1] % 2:
        raise VideoError("4:2:0 video has even sides", expected="an even size", found=kind)
    if stream is not None and pixels.shape[:2] != (stream.height, stream.width):
        raise VideoError(
            "the frames differ in size",
            expected=f"uint8 ({stream.height}, {stream.width}, 3)",
            found=kind,
        )
    return pixels


def _convert(pixels: np.ndarray[Any, Any], index: int) -> Any:
    import av

    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    # By name: PyAV 14.0.0 takes no members of its own enums here
    frame = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
    frame.pts = index
    return frame


def _flush(ops: FileOps, path: Path) -> None:
    descriptor = ops.append(path)
    try:
        ops.fsync(descriptor)
    finally:
        ops.close(descriptor)
