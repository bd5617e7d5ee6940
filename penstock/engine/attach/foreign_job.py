"""A job of any pipeline: planned, called, its frames and sound or its pictures written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.attach.calling import NoBar, bars, output_of, parse
from penstock.engine.attach.diffusers_folder import open_folder
from penstock.engine.attach.foreign import modules_of
from penstock.engine.attach.foreign_kept import (
    Call,
    absolute,
    begin,
    conditions_now,
    files_of,
    order_of,
    resumed,
)
from penstock.engine.attach.foreign_plan import CallPlan, plan_call, steps_of
from penstock.engine.attach.keeping import RECORDS
from penstock.engine.attach.pipe import Attached, attach_opened
from penstock.engine.attach.recorded import CallKeeper, Recorder, intercepted
from penstock.engine.media.claim import OutputClaim
from penstock.engine.media.video import Sound, check_output, taken, write_video
from penstock.engine.run.ending import Ending
from penstock.engine.run.fingerprint import Fingerprint
from penstock.engine.run.keeper import Keeper
from penstock.engine.run.stored import Order
from penstock.engine.software import check_versions
from penstock.engine.store.durable import FileOps, write_new
from penstock.engine.store.journal import Journal
from penstock.engine.store.sums import Sums
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
        answered_calls: of networks, that came from what an earlier run of the job had kept.
        computed_calls: of the same networks, that did not.
        problems: what was found and worked around, as sentences.
    """

    outputs: tuple[str, ...]
    frames: int
    seed: int
    seconds: float
    peak_vram_bytes: int
    peak_ram_bytes: int
    read_bytes: int
    copied_bytes: int
    answered_calls: int = 0
    computed_calls: int = 0
    problems: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The first of the files."""
        return self.outputs[0]

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
        self._folder, self._hardware, self._fmt = folder, hardware, fmt
        self._stopped = threading.Event()
        with ExitStack() as stack:
            self._opened = open_folder(folder, stack)
            self._given = parse(self._opened.pipe, pairs)
            self._words, self._pictures = absolute(self._opened.pipe, pairs)
            self.plan: CallPlan = plan_call(self._opened, self._given, hardware, fmt, activations)
            self._stack = stack.pop_all()

    def __enter__(self) -> CallJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cancel(self) -> None:
        """Stop at the next call of a network, or step."""
        self._stopped.set()

    def call(self, seed: int | None, fps: Fraction | None) -> Call:
        """Return what is asked for, as a job's record has it.

        Args:
            seed, fps: as for `run`; a seed of None is any.
        """
        return Call(
            str(self._folder.absolute()), self._words, seed, None if fps is None else str(fps),
            self._format, steps_of(self._opened.pipe, self._given),
        )  # fmt: skip

    def begin(
        self, folder: Path, output: Path, seed: int, fps: Fraction | None, *, overwrite: bool
    ) -> CallKeeper:
        """Make a folder in which the job is kept while it runs.

        Args:
            folder: new, or empty.
            output, seed, fps, overwrite: as for `run`.

        Raises:
            OutputError: the output cannot be written, or another job is to write it.
            StorageError, JournalError: the job cannot be kept there.
        """
        order, now = Order(output, overwrite), self._conditions(self._files)
        claim = _claimed(order)
        try:
            return begin(
                folder, self.call(seed, fps), self.plan, now, order, self._hardware.place, claim
            )
        except BaseException:
            _let_go(claim)
            raise

    def resume(
        self, journal: Journal, output: Path | None, *, force: bool, allow_nonidentical: bool
    ) -> tuple[CallKeeper, Order, tuple[str, ...]]:
        """Go on with a job: what keeps it, where its output goes, and what is to be told.

        Args:
            journal: open; it is the keeper's from now on.
            output: another one than the job's own.
            force: replace an existing file.
            allow_nonidentical: go on also where the result will not be the same to the bit.

        Raises:
            FingerprintMismatch: what determines the result has changed; names it.
            JournalError, OutputError: it is done, or its output cannot be written.
        """
        order, files = order_of(journal, output, force=force), self._files
        keeper, told = resumed(
            journal, self.plan, self._conditions(files), files, order, lambda: _claimed(order),
            allow_nonidentical=allow_nonidentical,
        )  # fmt: skip
        return keeper, order, told

    def _conditions(self, files: Mapping[str, Path]) -> Fingerprint:
        return conditions_now(self._opened, self.plan, self._format, self._place, files)

    @property
    def _files(self) -> dict[str, Path]:
        return files_of(self._folder, self._opened, self._pictures)

    @property
    def _format(self) -> str | None:
        return None if self._fmt is None else self._fmt.name

    @property
    def _place(self) -> torch.device:
        return torch.device(self._hardware.place)

    def run(
        self,
        output: Path,
        seed: int,
        fps: Fraction | None = None,
        told: Callable[[int, int], None] = lambda step, steps: None,
        *,
        overwrite: bool = False,
        keeper: CallKeeper | None = None,
        trusts: bool = False,
    ) -> CallReport:
        """Make it.

        Args:
            output: an .mp4, or a .png (of many pictures the first; the others are numbered).
            seed: of the noise.
            fps: of the file; None: what the call says.
            told: called with the steps done and their number.
            overwrite: replace existing files.
            keeper: keeps the job, and is closed; None: nothing is kept.
            trusts: take what the keeper has also where it would be asked for otherwise now.

        Raises:
            JobCancelled: `cancel` was called.
            OutputError, VideoError: it cannot be written.
            FingerprintMismatch: what was kept is not what this call would compute.
            StorageError: what is to be kept cannot be written.
        """
        noted = keeper or Keeper()
        try:
            with Ending(noted, self._place):
                recorder = self._recorder(keeper, trusts)
                report = self._made(output, seed, fps, told, overwrite, noted, recorder)
                noted.finished(report)
        finally:
            noted.close()
        return report

    def _made(
        self,
        output: Path,
        seed: int,
        fps: Fraction | None,
        told: Callable[[int, int], None],
        overwrite: bool,
        noted: Keeper,
        recorder: Recorder | None,
    ) -> CallReport:
        _check_suffix(output, overwrite)
        started = time.monotonic()
        pipe = self._opened.pipe
        if noted.lacks_sums():
            noted.save_sums({n: Sums().of(p, self._check).value for n, p in self._files.items()})
        with (
            attach_opened(
                self._opened, self._hardware, self._fmt, self.plan.work_bytes
            ) as attached,
            self._kept(recorder, attached),
            bars(pipe, lambda total: _Steps(total, told, self._check)),
            _seeded(seed, self._place),
        ):
            draw = torch.Generator().manual_seed(seed)
            made = pipe(**self._given, **output_of(pipe), generator=draw)
            report = attached.report
        rate = fps or Fraction(str(self._given.get("frame_rate", _default_rate(pipe))))
        files, frames = _write(made, pipe, output, rate, overwrite, noted.writing_output)
        return CallReport(
            tuple(map(str, files)), frames, seed, time.monotonic() - started,
            report.peak_vram_bytes, report.peak_ram_bytes, report.read_bytes,
            report.copied_bytes,
            0 if recorder is None else recorder.answered,
            0 if recorder is None else recorder.computed,
            (*noted.problems, *(() if recorder is None else recorder.problems)),
        )  # fmt: skip

    def _recorder(self, keeper: CallKeeper | None, trusts: bool) -> Recorder | None:
        if keeper is None or self.plan.kept is None:
            return None
        modules = modules_of(self._opened.pipe)
        networks = {name: modules[name] for name in self.plan.kept.networks}
        return Recorder(networks, keeper, self._place, trusts=trusts)

    @contextmanager
    def _kept(self, recorder: Recorder | None, attached: Attached) -> Iterator[None]:
        """Answer and keep calls inside; RAM for one at a time is held."""
        nbytes = 0 if self.plan.kept is None else self.plan.kept.ram_bytes
        with (
            attached.host_ledger.reserve(RECORDS, nbytes),
            intercepted(modules_of(self._opened.pipe), self._unless_stopped),
            nullcontext() if recorder is None else recorder.watched(),
        ):
            yield

    def _unless_stopped(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a network; pipelines with a bar of their own tell no steps."""
        self._check()
        return run(*args, **kwargs)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise JobCancelled("the job was cancelled", remedy="Nothing was written.")


def _claimed(order: Order) -> OutputClaim | None:
    """Return the output's name, reserved."""
    assert order.output is not None
    _check_suffix(order.output, order.overwrite)
    return None if order.overwrite else OutputClaim(order.output)


def _let_go(claim: OutputClaim | None) -> None:
    if claim is not None:
        claim.release()


@contextmanager
def _seeded(seed: int, place: torch.device) -> Iterator[None]:
    """Make what a pipeline draws without a generator a function of the seed, too; torch's own state
    is left as it was."""
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Steps(NoBar):
    """Stands in the place of a pipeline's bar."""

    def __init__(
        self, total: int, told: Callable[[int, int], None], check: Callable[[], None]
    ) -> None:
        self._total, self._told, self._check, self._done = total, told, check, 0

    def update(self, n: int = 1) -> None:
        """Count a step that is done.

        Raises:
            JobCancelled: no other is wanted.
        """
        self._done += n
        self._told(self._done, self._total)
        self._check()


def _default_rate(pipe: Any) -> float:
    from penstock.engine.attach.calling import arguments_of

    found = arguments_of(pipe).get("frame_rate")
    default = None if found is None else found.default
    return default if isinstance(default, int | float) else FPS


def _check_suffix(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() == PICTURE:
        if output.exists() and not overwrite:
            raise taken(output)
        return
    check_output(output, overwrite)


def _write(
    made: Any,
    pipe: Any,
    output: Path,
    fps: Fraction,
    overwrite: bool,
    finished: Callable[[Path], None] = lambda file: None,
) -> tuple[list[Path], int]:
    """Write what a pipeline gave: its files, and how many frames.

    Args:
        finished: called with a finished video, or the first picture, before it gets its name.
    """
    frames = _first(made, "frames", "videos", "video")
    if frames is None:
        pictures = _first(made, "images", "image")
        if pictures is None:
            raise UsageError(
                f"{type(pipe).__name__} gave neither frames nor pictures",
                expected="frames, videos or images",
                found=", ".join(_names(made)),
            )
        return _write_pictures(pictures, output, overwrite, finished)
    if output.suffix.lower() == PICTURE:
        raise OutputError(
            "the result is a video, not an image",
            expected="a name that ends in .mp4",
            found=str(output),
        )
    samples = _first(made, "audio", "audios")
    sound = None if samples is None else Sound(_flat(samples), _sound_rate(made, pipe))
    video = frames[0]
    write_video(output, _pixels(video), fps, overwrite=overwrite, sound=sound, finished=finished)
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


def _write_pictures(
    pictures: Any, output: Path, overwrite: bool, finished: Callable[[Path], None]
) -> tuple[list[Path], int]:
    """Write pictures, each of which appears when it is complete; the first before the others.

    Raises:
        OutputError: a name is taken, or is none of a picture.
        StorageError: the disk is full or fails.
    """
    from PIL import Image

    if output.suffix.lower() != PICTURE:
        raise OutputError(
            "the result is images, not a video",
            expected="a name that ends in .png",
            found=str(output),
        )
    files: list[Path] = []
    ops = FileOps()
    for number, each in enumerate(pictures, 1):
        path = output if number == 1 else output.with_name(f"{output.stem}-{number}{PICTURE}")
        picture = Image.fromarray(_bytes(each)) if isinstance(each, Tensor) else each
        content = BytesIO()
        picture.save(content, format="PNG")
        new = write_new(ops, path, [content.getbuffer()])
        if not files:
            finished(new)
        try:
            (ops.rename if overwrite else ops.rename_new)(new, path)
        except FileExistsError:
            ops.unlink(new)
            raise taken(path) from None
        files.append(path)
    return files, len(files)
