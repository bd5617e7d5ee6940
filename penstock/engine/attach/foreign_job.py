"""A job of any pipeline: planned, called, its frames and sound or its pictures written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.attach.calling import bars, output_of, parse
from penstock.engine.attach.diffusers_folder import open_folder
from penstock.engine.attach.foreign_plan import CallPlan, plan_call
from penstock.engine.attach.pipe import attach_opened
from penstock.engine.media.video import Sound, check_output, write_video
from penstock.engine.software import check_versions
from penstock.errors import JobCancelled, OutputError, UsageError
from penstock.formats.formats import QuantFormat
from penstock.profiles.hardware import Hardware

FPS = 24
"""Where neither the call nor the pipeline says another."""

PICTURE = ".png"


@dataclass(frozen=True)
class CallReport:
    """What a call took and made.

    Attributes:
        outputs: the files.
        frames: of the video, or pictures.
        seed: of the noise.
        seconds: of the call, weights included.
        peak_vram_bytes, peak_ram_bytes: the most that was reserved.
        read_bytes, copied_bytes: from disk to RAM, and from RAM to VRAM.
    """

    outputs: tuple[str, ...]
    frames: int
    seed: int
    seconds: float
    peak_vram_bytes: int
    peak_ram_bytes: int
    read_bytes: int
    copied_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        return asdict(self)


class CallJob:
    """One call of the pipeline in a folder; opened, it is planned.

    Args:
        folder: of diffusers.
        pairs: ``name=value`` words.
        hardware: the budgets.
        fmt: of the denoiser's blocks.
        activations: bytes, where they are known; None: the call is rehearsed.

    Attributes:
        plan: what it takes.

    Raises:
        CheckpointError, RequestError, OverBudget, UsageError: before any weight is read.
    """

    def __init__(
        self,
        folder: Path,
        pairs: list[str],
        hardware: Hardware,
        fmt: QuantFormat | None = None,
        activations: int | None = None,
    ) -> None:
        check_versions()
        self._hardware, self._fmt = hardware, fmt
        self._stopped = threading.Event()
        with ExitStack() as stack:
            self._opened = open_folder(folder, stack)
            self._given = parse(self._opened.pipe, pairs)
            self.plan: CallPlan = plan_call(self._opened, self._given, hardware, fmt, activations)
            self._stack = stack.pop_all()

    def __enter__(self) -> CallJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cancel(self) -> None:
        """Stop at the next step."""
        self._stopped.set()

    def run(
        self,
        output: Path,
        seed: int,
        fps: Fraction | None = None,
        told: Callable[[int, int], None] = lambda step, steps: None,
        *,
        overwrite: bool = False,
    ) -> CallReport:
        """Make it.

        Args:
            output: an .mp4, or a .png (of many pictures the first; the others are numbered).
            seed: of the noise.
            fps: of the file; None: what the call says.
            told: called with the steps done and their number.
            overwrite: replace existing files.

        Raises:
            JobCancelled: `cancel` was called.
            OutputError, VideoError: it cannot be written.
        """
        _check_suffix(output, overwrite)
        started = time.monotonic()
        pipe = self._opened.pipe
        with (
            attach_opened(
                self._opened, self._hardware, self._fmt, self.plan.work_bytes
            ) as attached,
            bars(pipe, lambda total: _Steps(total, told, self._stopped)),
        ):
            draw = torch.Generator().manual_seed(seed)
            made = pipe(**self._given, **output_of(pipe), generator=draw)
            report = attached.report
        rate = fps or Fraction(str(self._given.get("frame_rate", _default_rate(pipe))))
        files, frames = _write(made, pipe, output, rate, overwrite)
        return CallReport(
            tuple(map(str, files)), frames, seed, time.monotonic() - started,
            report.peak_vram_bytes, report.peak_ram_bytes, report.read_bytes,
            report.copied_bytes,
        )  # fmt: skip


class _Steps:
    """Stands in the place of a pipeline's bar."""

    def __init__(
        self, total: int, told: Callable[[int, int], None], stopped: threading.Event
    ) -> None:
        self._total, self._told, self._stopped, self._done = total, told, stopped, 0

    def update(self, n: int = 1) -> None:
        """Count a step that is done.

        Raises:
            JobCancelled: no other is wanted.
        """
        self._done += n
        self._told(self._done, self._total)
        if self._stopped.is_set():
            raise JobCancelled("the job was cancelled", remedy="Nothing was written.")


def _default_rate(pipe: Any) -> float:
    from penstock.engine.attach.calling import arguments_of

    found = arguments_of(pipe).get("frame_rate")
    default = None if found is None else found.default
    return default if isinstance(default, int | float) else FPS


def _check_suffix(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() == PICTURE:
        if output.exists() and not overwrite:
            raise OutputError(
                "the output exists", expected="a new file name", found=str(output),
                remedy="Choose another name, or overwrite with --force (overwrite=True)",
            )  # fmt: skip
        return
    check_output(output, overwrite)


def _write(
    made: Any, pipe: Any, output: Path, fps: Fraction, overwrite: bool
) -> tuple[list[Path], int]:
    """Write what a pipeline gave: its files, and how many frames."""
    frames = _first(made, "frames", "videos", "video")
    if frames is None:
        pictures = _first(made, "images", "image")
        if pictures is None:
            raise UsageError(
                f"{type(pipe).__name__} gave neither frames nor pictures",
                expected="frames, videos or images",
                found=", ".join(_names(made)),
            )
        return _write_pictures(pictures, output, overwrite)
    if output.suffix.lower() == PICTURE:
        raise OutputError(
            "the result is a video, not an image",
            expected="a name that ends in .mp4",
            found=str(output),
        )
    samples = _first(made, "audio", "audios")
    sound = None if samples is None else Sound(_flat(samples), _sound_rate(made, pipe))
    video = frames[0]
    write_video(output, _pixels(video), fps, overwrite=overwrite, sound=sound)
    return [output], len(video)


def _first(made: Any, *names: str) -> Any:
    values = getattr(made, "values", None)
    table = values if isinstance(values, Mapping) else vars(made)
    return next((table[name] for name in names if table.get(name) is not None), None)


def _names(made: Any) -> list[str]:
    values = getattr(made, "values", None)
    return sorted(values if isinstance(values, Mapping) else vars(made))


def _flat(samples: Any) -> Any:
    """Return ``(channels, samples)`` of the first result."""
    tensor = torch.as_tensor(samples).float().cpu()
    while tensor.ndim > 2:
        tensor = tensor[0]
    return tensor.reshape(-1, tensor.shape[-1]).numpy()


def _sound_rate(made: Any, pipe: Any) -> int:
    found = _first(made, "sampling_rate", "sample_rate")
    for name in ("vocoder", "audio_vae"):
        config = getattr(getattr(pipe, name, None), "config", None)
        for key in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            found = found or getattr(config, key, None)
    return int(found or 48000)


def _pixels(video: Any) -> Iterator[Any]:
    """Yield the frames ``(h, w, 3)`` in 8 bits, one at a time, of ``(n, 3, h, w)`` in 0..1."""
    for frame in torch.as_tensor(video):
        yield _bytes(frame)


def _bytes(frame: Tensor) -> Any:
    return frame.float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


def _write_pictures(pictures: Any, output: Path, overwrite: bool) -> tuple[list[Path], int]:
    from PIL import Image

    if output.suffix.lower() != PICTURE:
        raise OutputError(
            "the result is images, not a video",
            expected="a name that ends in .png",
            found=str(output),
        )
    files = []
    for number, each in enumerate(pictures, 1):
        path = output if number == 1 else output.with_name(f"{output.stem}-{number}{PICTURE}")
        picture = Image.fromarray(_bytes(each)) if isinstance(each, Tensor) else each
        with path.open("wb" if overwrite else "xb") as file:
            picture.save(file, format="PNG")
        files.append(path)
    return files, len(files)
