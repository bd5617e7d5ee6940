"""diffusers' own pipelines under a budget: `penstock.attach`, `detach` and `load_pipeline`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from penstock.closing import Closing
from penstock.engine.attach.desk import Desk
from penstock.engine.attach.diffusers_folder import Opened, open_folder
from penstock.engine.attach.foreign import modules_of
from penstock.engine.attach.generic import check_attachable, open_modules
from penstock.engine.attach.livemodel import write_models
from penstock.engine.attach.livepack import live_folder
from penstock.engine.attach.part import Part
from penstock.engine.attach.routing import index_of, is_foreign
from penstock.engine.attach.stream import budgets, close_at_exit, held_bytes
from penstock.engine.attach.unmasked import leave_out_padding
from penstock.engine.family.protocol import ComponentKind, families
from penstock.engine.files.locate import Files
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.storage import block_format
from penstock.engine.packs.firstuse import FirstUse
from penstock.engine.packs.plan import LEAST_RAM_BYTES
from penstock.engine.software import check_versions
from penstock.errors import NotRun, PenstockError, UsageError
from penstock.folders import cache_folder
from penstock.formats.formats import QuantFormat, get_format
from penstock.offload.ledger import ByteLedger
from penstock.offload.tiers import release_cached
from penstock.profiles.hardware import Hardware
from penstock.units import parse_bytes

log = logging.getLogger(__name__)


class AttachFamily(Protocol):
    """What a family's module ``family`` offers to this room, beside `Family`."""

    KINDS: Mapping[str, ComponentKind]

    def claims(self, pipe: Any) -> bool:
        """Return whether a pipeline is of this family, and so its own parts run it or nothing
        does."""

    def attachable(self, pipe: Any) -> None:
        """Refuse a pipeline that penstock does not run as diffusers does.

        Raises:
            UsageError: names the reason.
        """

    def has_parts_for(self, model: ModelFiles) -> bool:
        """Return whether those parts make diffusers' pipeline of a model."""

    def attach_parts(self) -> Mapping[str, type[Part]]:
        """Return what stands in the place of each network of a pipeline, by its name there."""

    def pipeline_of(self, model: ModelFiles, desk: Desk) -> Any:
        """Return diffusers' pipeline of a model, its networks replaced by parts."""


def _family_of(pipe: Any) -> AttachFamily | None:
    """Return the family whose own parts run ``pipe``; None: its modules run by themselves."""
    for family in cast("tuple[AttachFamily, ...]", families()):
        if family.claims(pipe):
            return family
    return None


@dataclass(frozen=True)
class AttachReport:
    """What an attached pipeline holds and has moved; all sizes in bytes.

    Attributes:
        vram_limit_bytes, peak_vram_bytes, vram_bytes: the budget, the most that was reserved of it,
            and what is reserved now.
        ram_limit_bytes, peak_ram_bytes, ram_bytes: likewise.
        disk_bytes: of the packs that hold the pipeline's own weights (0: opened from files).
        read_bytes, copied_bytes: moved from disk to RAM, and from RAM to VRAM, by what was closed.
    """

    vram_limit_bytes: int
    peak_vram_bytes: int
    vram_bytes: int
    ram_limit_bytes: int
    peak_ram_bytes: int
    ram_bytes: int
    disk_bytes: int
    read_bytes: int
    copied_bytes: int


_ATTACHED = "_penstock_attached"
"""Where a pipeline keeps what runs it."""


class _Holder(Protocol):
    """What holds the memory of a pipeline: a `Desk`, or a `SharedBudget`."""

    @property
    def device_ledger(self) -> ByteLedger: ...
    @property
    def host_ledger(self) -> ByteLedger: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def copied_bytes(self) -> int: ...

    def release(self) -> None:
        """Give all memory back."""


class Attached(Closing):
    """A pipeline that penstock runs; a context manager that ends with :meth:`close`.

    Attributes:
        pipe: the pipeline, to be used as before.
        notices: what is computed otherwise than by the modules themselves.
    """

    notices: tuple[str, ...] = ()

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._weights_return = True
        self._desk: _Holder | None = None
        self._disk_bytes, self._stack = 0, ExitStack()

    def _begin(self, desk: _Holder, disk_bytes: int, stack: ExitStack) -> Attached:
        """Mark it as attached.

        Args:
            desk: holds the memory.
            disk_bytes: of the packs.
            stack: undoes it.
        """
        self._desk, self._disk_bytes, self._stack = desk, disk_bytes, stack
        # Not through the pipeline's __setattr__, which rewrites its config.
        vars(self.pipe)[_ATTACHED] = self
        self._stack.callback(vars(self.pipe).pop, _ATTACHED)
        close_at_exit(self)
        return self

    def _also(self, stack: ExitStack) -> None:
        """Close ``stack`` last, in the end."""
        with ExitStack() as both:
            both.push(stack)
            both.push(self._stack)
            self._stack = both.pop_all()

    @property
    def host_ledger(self) -> ByteLedger:
        """What it holds of RAM."""
        assert self._desk is not None
        return self._desk.host_ledger

    @property
    def report(self) -> AttachReport:
        """What it holds, and what has moved so far."""
        assert self._desk is not None
        vram, ram = self._desk.device_ledger, self._desk.host_ledger
        return AttachReport(
            vram_limit_bytes=vram.cap_bytes,
            peak_vram_bytes=vram.peak,
            vram_bytes=vram.used,
            ram_limit_bytes=ram.cap_bytes,
            peak_ram_bytes=ram.peak,
            ram_bytes=ram.used,
            disk_bytes=self._disk_bytes,
            read_bytes=self._desk.read_bytes,
            copied_bytes=self._desk.copied_bytes,
        )

    def unload(self) -> None:
        """Give back all VRAM and RAM that is held between calls; the next call takes it again.

        A call that ends does so itself; one that an exception ended does not.

        Raises:
            Nothing.
        """
        if self._desk is not None:
            self._desk.release()

    def close(self) -> None:
        """Put the pipeline's own models and their weights back. A second call does nothing.

        Raises:
            CheckpointError: the disk has damaged the packs; names what is wrong.
        """
        self._stack.close()

    def __del__(self) -> None:
        """Threads would wait for ever for a pipeline that nobody has any more. Nobody has its
        modules either: their weights are let go. Files may be closed already, in whatever order
        the garbage is collected."""
        self._weights_return = False
        try:
            self.close()
        except (PenstockError, OSError) as error:
            log.debug("a dropped pipeline: %s", error)


def attach(
    pipe: Any,
    *,
    vram: str | int | None = None,
    ram: str | int | None = None,
    format: str | None = None,
    activations: str | int = 0,
    exact: bool = False,
    device: str = "auto",
    folder: str | Path | None = None,
) -> Attached:
    """Run any pipeline of diffusers, as it is loaded, under a budget.

    Arguments, callbacks, generators and outputs of the pipeline stay as they are. The weights of
    its modules go to packs on disk (and from there to RAM and VRAM, as far as the budgets reach)
    and come back with `detach`. Modules keep their classes, forwards, adapters, hooks and caches:
    a block's weights come when one of them is used, the rest of a module's when the module is,
    and leave when another module needs the room or the pipeline's call ends. The result is that of
    the plain pipeline, bit for bit, unless ``format`` is given.

    A Wan 2.1 pipeline is run by penstock's own code instead: its models are replaced by parts that
    stream: transformer, text and image encoder block by block, the VAE by exact tiles; its tensors
    stay on the device they were on. In fp32, latents are those of the plain pipeline, bit for bit,
    where the budget lets all tokens go through a block at once; else they differ by rounding, and
    so may frames, whose convolutions another kernel computes (3e-6 of a range of 2, measured). That
    is said of weights in memory that torch gave, as after a cast or a move to a GPU. Those that
    `from_pretrained` maps from a file lie anywhere, and some CPUs' matrix products round by that
    (2e-6 of a range of 1, measured).

    Args:
        pipe: a `DiffusionPipeline` or a `ModularPipeline` whose components are loaded.
        vram: budget on the device for all that penstock holds there, such as ``"12GiB"``; None:
            what is free once the weights have left. What the pipeline itself keeps on that device
            comes on top.
        ram: budget of host memory; None: likewise.
        format: store the matrices of the denoiser's blocks (of components whose names begin with
            transformer or unet) in it: ``"int8"``, ``"fp8"``, ``"nf4"``, ...
        exact: keep every module's arithmetic to the bit. Else HunyuanVideo 1.5 leaves padded text
            out of attention, where its own forward masks it with 4 bytes a pair of tokens (48 GiB
            at 1280x720x121): the same mathematics, other last bits. `Attached.notices` says so.
        activations: bytes of ``vram`` to leave to what the modules compute, which is not known
            here; Wan 2.1's own plan needs no such hint.
        device: where to compute: "cuda", "cpu" or "auto" (CUDA where there is one).
        folder: where the packs are written; None: penstock's cache folder.

    Raises:
        UsageError: a pipeline that penstock does not run as diffusers does; names the reason.
        OverBudget: not even one block of each module fits.
        StorageError: no disk space for the packs.

    Example:
        >>> penstock.attach(pipe, vram="12GiB")
        >>> video = pipe(image=picture, prompt="a cat").frames[0]
        >>> penstock.detach(pipe)
    """
    if _ATTACHED in vars(pipe):
        raise UsageError(
            "the pipeline is attached already", remedy="Call penstock.detach(pipe) first."
        )
    family = _family_of(pipe)
    if family is None:
        check_attachable(pipe)
    else:
        family.attachable(pipe)
    check_versions()
    fmt = None if format is None else get_format(format)
    work_bytes = parse_bytes(activations) if activations else 0
    attached = Attached(pipe)
    with ExitStack() as stack:
        place = stack.enter_context(live_folder(None if folder is None else Path(folder)))
        hardware = budgets(device, vram, ram)
        desk: _Holder
        if family is None:
            if vram is None:  # what the modules hold there is the budget's to place
                held = sum(held_bytes(each, hardware) for each in modules_of(pipe).values())
                hardware = replace(hardware, vram_bytes=hardware.vram_bytes + held)
            if not exact:
                attached.notices = _lighten(pipe, stack)
            for module in modules_of(pipe).values():  # who keeps one keeps what brings its weights
                vars(module)[_ATTACHED] = attached
                stack.callback(vars(module).pop, _ATTACHED)
            desk, disk_bytes = open_modules(
                pipe, hardware, fmt, work_bytes, place, stack, lambda: attached._weights_return
            )
        else:
            desk, disk_bytes = _open_parts(
                pipe, family, attached, fmt, torch.device(hardware.place), (device, vram, ram),
                stack, place,
            )  # fmt: skip
        attached._begin(desk, disk_bytes, stack.pop_all())
    return attached


def _lighten(pipe: Any, stack: ExitStack) -> tuple[str, ...]:
    """Let modules compute with less memory, where that is the same mathematics."""
    told = (leave_out_padding(each, stack) for each in modules_of(pipe).values())
    notices = tuple(each for each in told if each is not None)
    for notice in notices:
        log.warning(notice)
    return notices


def _open_parts(
    pipe: Any,
    family: AttachFamily,
    attached: Attached,
    fmt: QuantFormat | None,
    on: torch.device,
    asked: tuple[str, str | int | None, str | int | None],
    stack: ExitStack,
    place: Path,
) -> tuple[Desk, int]:
    """Open a family's own parts in the places of a pipeline's modules; ``stack`` undoes it."""
    disk_bytes = write_models(
        pipe, family.KINDS, place / "model", stack, lambda: attached._weights_return
    )
    model = ModelFiles.open(place / "model")
    if fmt is not None:
        model = _stored_as(model, fmt.name, place)
    release_cached(on)
    desk = Desk(model, budgets(*asked))  # without what the weights took
    stack.callback(desk.close)
    for name, made in family.attach_parts().items():
        own = getattr(pipe, name, None)
        if own is not None:
            part = made(name, desk, own.config, own.device)
            object.__setattr__(part, "attached", attached)
            stack.callback(vars(pipe).__setitem__, name, own)
            vars(pipe)[name] = part
    return desk, disk_bytes


def detach(pipe: Any) -> None:
    """Undo `attach`: the pipeline's own models, with their weights, are back in their places.

    The weights are the same to the bit, in memory that torch gave, wherever they were before.
    A pipeline of `load_pipeline` has no models of its own: it gives all memory back, closes its
    files and cannot be called again.

    Raises:
        UsageError: the pipeline is not attached.
        CheckpointError: the disk has damaged the packs; names what is wrong.
    """
    attached = vars(pipe).get(_ATTACHED)
    if attached is None:
        raise UsageError(
            "the pipeline is not attached",
            expected="one of penstock.attach or penstock.load_pipeline",
            found=f"a {type(pipe).__name__}",
        )
    attached.close()


def load_pipeline(
    path: str | Path,
    *,
    vram: str | int | None = None,
    ram: str | int | None = None,
    format: str | None = None,
    device: str = "auto",
    files: Files | None = None,
    activations: str | int = 0,
    exact: bool = False,
) -> Any:
    """Open a model as a diffusers pipeline that never holds the weights of a network whole.

    Only headers are read now. The pipeline is called as diffusers' own. Wan2.1 is run by
    penstock's own code, its tensors on the CPU. Any other folder of diffusers, Wan2.2's and FLF2V's
    among them, becomes the pipeline that its ``model_index.json`` names: networks keep their
    classes and forwards, and their weights go from the files to where they are used, block by
    block, in the types they are stored in (what a class keeps in fp32 is in fp32; such a network is
    copied to a pack first).

    Args:
        path: a folder (of diffusers, Wan or ComfyUI), a transformer's file, or a hub id; of other
            models than Wan2.1 a folder of diffusers.
        vram, ram, device: as for `attach`.
        format: run the transformer stored in it. None: as its files are. Wan2.1's pack is made
            once, in penstock's cache; another model's at every opening.
        files: parts given by themselves; they win over what ``path`` holds. Wan2.1 only.
        activations, exact: as for `attach`; Wan2.1 needs none.

    Returns:
        A `WanImageToVideoPipeline`, a `WanPipeline` where a Wan model takes no picture, or the
        pipeline that the folder names. `detach` gives everything back.

    Raises:
        CheckpointError: no model that penstock runs, or parts of it are missing.
        NotRun: a model that is run from a folder of diffusers alone, given otherwise.
        UsageError: an illegal size, device or format.
        OverBudget: not even one block of each network fits.
    """
    check_versions()
    hardware = budgets(device, vram, ram)
    if files is None and is_foreign(Path(path)):
        return _foreign_folder(path, hardware, format, activations, exact=exact)
    model = ModelFiles.open(path, files)
    family = cast("AttachFamily", model.source.family)
    if not family.has_parts_for(model):
        model.close()
        _check_whole_folder(model, path, files)
        return _foreign_folder(path, hardware, format, activations, exact=exact)
    if format is not None:
        model = _stored_as(model, get_format(format).name, cache_folder())
    with ExitStack() as stack:
        desk = Desk(model, hardware)
        stack.callback(desk.close)
        pipe = family.pipeline_of(model, desk)
        attached = Attached(pipe)._begin(desk, 0, stack.pop_all())
    for name in family.attach_parts():
        if getattr(pipe, name, None) is not None:
            object.__setattr__(getattr(pipe, name), "attached", attached)
    return pipe


def _foreign_folder(
    path: str | Path,
    hardware: Hardware,
    format: str | None,
    activations: str | int,
    *,
    exact: bool,
) -> Any:
    fmt = None if format is None else get_format(format)
    work_bytes = parse_bytes(activations) if activations else 0
    return attach_folder(Path(path), hardware, fmt, work_bytes, exact=exact).pipe


def _check_whole_folder(model: ModelFiles, path: str | Path, files: Files | None) -> None:
    """Refuse a model that only its own classes run, where they have no folder to open."""
    if files is None and index_of(Path(path)) is not None:
        return
    raise NotRun(
        f"{model.origin} is not a model that load_pipeline opens from files of their own",
        expected="a folder of diffusers, or Wan2.1 text-to-video or image-to-video",
        found=model.streamed.source.title,
        remedy="Use Engine.open or `penstock generate`, or give a folder of diffusers.",
    )


def attach_folder(
    folder: Path,
    hardware: Hardware,
    fmt: QuantFormat | None,
    work_bytes: int,
    *,
    exact: bool,
) -> Attached:
    """Return the pipeline of a folder of diffusers, its networks' weights in their files.

    Raises:
        CheckpointError, UsageError, OverBudget: as `load_pipeline`.
    """
    with ExitStack() as stack:
        opened = open_folder(folder, stack, exact=exact)
        for notice in opened.notices:
            log.warning(notice)
        attached = attach_opened(opened, hardware, fmt, work_bytes)
        attached._also(stack.pop_all())
    return attached


def attach_opened(
    opened: Opened,
    hardware: Hardware,
    fmt: QuantFormat | None,
    work_bytes: int | Mapping[str, int],
) -> Attached:
    """Let a pipeline whose networks have no weights bring them as they are used.

    Args:
        work_bytes: of VRAM, left to what it computes: all the time, or by network.

    Raises:
        UsageError: a pipeline that is not run; names the reason.
        OverBudget: not even one block of each network fits.
    """
    check_attachable(opened.pipe)
    attached = Attached(opened.pipe)
    attached.notices = opened.notices
    with ExitStack() as stack:
        for module in modules_of(opened.pipe).values():
            vars(module)[_ATTACHED] = attached
            stack.callback(vars(module).pop, _ATTACHED)
        place = stack.enter_context(live_folder(None))
        desk, disk_bytes = open_modules(
            opened.pipe, hardware, fmt, work_bytes, place, stack,
            lambda: attached._weights_return, opened.files,
        )  # fmt: skip
        return attached._begin(desk, disk_bytes, stack.pop_all())


def _stored_as(model: ModelFiles, wanted: str, folder: Path) -> ModelFiles:
    """Return the model with its transformer in a format: from a pack in ``folder``, made if need
    be."""
    source = model.streamed.source
    if block_format(source) == wanted:
        return model
    use = FirstUse.of(source, wanted, folder)
    if not use.is_made:
        use.make(LEAST_RAM_BYTES, lambda nbytes: None)
    model.streamed.checkpoint.close()
    return model.with_streamed(use.streamed())
