"""The engine: a model opened under a budget, ready to plan and to run requests."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from penstock.closing import Closing
from penstock.engine.files.locate import Files
from penstock.engine.lora.file import Lora
from penstock.engine.media.claim import OutputClaim
from penstock.engine.media.video import check_no_input, check_output
from penstock.engine.model.opening import Opening
from penstock.engine.prepared import Prepared
from penstock.engine.request.generation import GenerationRequest, workload_of
from penstock.engine.request.settings import Settings, resolve
from penstock.engine.run.job import Job
from penstock.engine.run.jobqueue import JobQueue
from penstock.engine.run.keeper import JournalKeeper, Keeper
from penstock.engine.run.pipeline import run
from penstock.engine.run.preview import Previewer
from penstock.engine.run.stage import Run
from penstock.engine.run.steering import Hooks, OnStep
from penstock.engine.run.stored import (
    Order,
    begin,
    check_conditions,
    check_picture,
    check_unfinished,
    conditions_now,
    read_again,
    restored_order,
    restored_plan,
    restored_request,
    with_own_shift,
)
from penstock.engine.software import check_versions
from penstock.engine.store.journal import Journal
from penstock.errors import UsageError
from penstock.offload.tiers import release_cached
from penstock.profiles.hardware import Hardware
from penstock.profiles.options import Options
from penstock.profiles.phases import Workload
from penstock.profiles.plan import Plan
from penstock.profiles.planner import smaller

log = logging.getLogger(__name__)


class Engine(Closing):
    """A video model under memory budgets: opens it, plans, and runs jobs.

    Nothing of the model is loaded before a job needs it, and each part is given back after its
    phase. One job runs at a time; a second waits for the first. Every method may be called on any
    thread; engines share nothing, so that several of them, each on its own threads and under its
    own budgets, do not know of each other.

    Example:
        >>> with Engine.open("Wan2.1-I2V-14B-720P-Diffusers", vram="12GiB") as engine:
        ...     request = engine.request("a cat", image=Path("cat.png"))
        ...     report = engine.submit(request, "cat.mp4").result().report
    """

    def __init__(
        self, prepared: Prepared, *, overlapped: bool = True, imports_s: float = 0.0
    ) -> None:
        check_versions()
        self._prepared, self.chosen = prepared, prepared.chosen
        self._variants, self.model = prepared.variants, prepared.model
        self._overlapped, self._imports_s = overlapped, imports_s
        self._jobs = JobQueue()
        self._previewer = Previewer()

    @classmethod
    def open(
        cls,
        model: str | Path | None,
        *,
        files: Files | None = None,
        loras: Sequence[Lora | str | Path] = (),
        options: Options | None = None,
        overlapped: bool = True,
        cache: Path | None = None,
        **named: str | int | None,
    ) -> Engine:
        """Open a model; reads headers only.

        Args:
            model: a folder (of diffusers, Wan or ComfyUI), a transformer's file, or a hub id; None
                if ``files`` names every part.
            files: parts given by themselves; they win over what ``model`` holds.
            loras: applied beside the transformer's weights: `Lora`, or "FILE" or "FILE:STRENGTH".
            options: budgets, device, profile, format and the rest of
                `penstock.profiles.options.Options`.
            overlapped: stream ahead of the computation; False is the sequential reference.
            cache: where packs are kept; None: `penstock.folders.cache_folder`.
            named: options by their names: ``vram="12GiB"`` is ``options=Options(vram="12GiB")``.

        Raises:
            CheckpointError: the folder is not a model that penstock runs.
            UsageError: an unknown option, an illegal one, or one that is given twice.
        """
        options = (options or Options()).named(named)
        prepared = Prepared.open(model, files=files, loras=loras, options=options, cache=cache)
        return cls(prepared, overlapped=overlapped)

    @classmethod
    def reopen(
        cls, opening: Opening, *, overlapped: bool = True, cache: Path | None = None
    ) -> Engine:
        """Open a model as it was opened before (`penstock.engine.run.jobs.opening_of` a job).

        Args:
            opening: the model, its parts, its LoRAs and the options.
            overlapped, cache: as for :meth:`open`.

        Raises:
            CheckpointError, UsageError: as for :meth:`open`.
        """
        return cls(Prepared.reopen(opening, cache=cache), overlapped=overlapped)

    def request(self, prompt: str, **asked: Any) -> GenerationRequest:
        """Return a request whose gaps (size, frames, steps, guidance, shift, frame rate) have the
        model's own defaults, as the command line fills them; the size follows a picture's aspect.

        A `GenerationRequest` that is made by itself knows no model, and takes those of Wan2.1 I2V.

        Args:
            prompt: what to show.
            asked: what is no gap, by the names of `penstock.engine.request.settings.Settings`:
                ``image=Path("cat.png")``, ``size="832x480"`` or ``max_area="480p"``, ``steps=20``,
                ``distilled=True``, ...

        Raises:
            UsageError: a name that is none, or both a size and an area.
            RequestError: an illegal value; ImageError: the picture cannot be read.
            CheckpointError: the model's defaults.json is damaged.
        """
        known = [each.name for each in fields(Settings)]
        if unknown := sorted(asked.keys() - set(known)):
            raise UsageError(
                "no such setting of a request",
                expected=", ".join(known),
                found=", ".join(unknown),
                remedy="Options of a run, such as vram, are for Engine.open",
            )
        return resolve(Settings(prompt, **asked), self.model)

    def plan(self, request: GenerationRequest, *, saved: bool = False) -> Plan:
        """Predict what the request will take: arithmetic over headers, nothing is loaded.

        Args:
            request: what to make.
            saved: the job is saved in a folder while it runs, which takes host memory too.

        Raises:
            OverBudget: no plan fits the budgets.
            RequestError: the request does not suit the model.
        """
        return self._prepared.plan(request, saved=saved)

    def plan_workload(self, workload: Workload) -> Plan:
        """Predict what a video of that shape will take, whatever it shows.

        Args:
            workload: its shape, its steps, and whether guidance doubles them.

        Raises:
            OverBudget: no plan fits the budgets; names a profile or a request that does.
        """
        return self._prepared.plan(workload)

    def submit(
        self,
        request: GenerationRequest,
        output: str | Path | None = None,
        *,
        force: bool = False,
        metadata: bool = True,
        job_dir: str | Path | None = None,
        on_step: OnStep | None = None,
        preview_every: int | None = None,
    ) -> Job:
        """Start a job, and return while it runs.

        Args:
            request: what to make. An open seed is drawn now.
            output: path of the mp4; None keeps the frames in the report's job only.
            force: replace an existing file.
            metadata: put prompt, seed and settings into the file.
            job_dir: a folder in which the job is kept while it runs, so that it can be resumed;
                None keeps nothing.
            on_step: called after each step as ``on_step(step, latents)``, on the job's thread, with
                the number of steps done (from 1) and a copy of the latents: fp32, (1, z, t, h, w),
                on the CPU, normalised. It may return None, or latents of that shape to go on with
                (the report then says ``steered``); what it raises ends the job as it is, and
                `JobCancelled` ends it as :meth:`Job.cancel` does. A step counts as done, and is
                kept in ``job_dir``, when ``on_step`` has returned.
            preview_every: put a `Preview` into the `Progress` event of every so many steps.

        Raises:
            OverBudget, RequestError, OutputError: before anything is loaded.
            JournalError: the job cannot be kept in ``job_dir``.
            DeviceLost: an earlier job of this process has lost the device.
            UsageError: ``preview_every`` is no positive number, or the engine is closed.
        """
        hooks = Hooks(on_step, preview_every)
        self._jobs.check_open()
        request = request.with_seed()
        order = Order(None if output is None else Path(output), force, metadata)
        plan = self.plan(request, saved=job_dir is not None)
        claim = self._claimed(order, request)
        try:
            if job_dir is None:
                return self._start(request, plan, order, Keeper(claim), hooks)
            numerics = self._variants.numerics(plan.weight_format)
            now = conditions_now(self.model, self._device, numerics)
            journal, request = begin(Path(job_dir), self.model, request, plan, now, order)
            return self._start(request, plan, order, JournalKeeper(journal, claim), hooks)
        except BaseException:
            if claim is not None:
                claim.release()
            raise

    def _claimed(self, order: Order, request: GenerationRequest) -> OutputClaim | None:
        """Return the output's name, reserved, once it is clear that a video can be written there.

        Raises:
            OutputError: it cannot, or another job is to write that file.
        """
        if order.output is None:
            return None
        check_output(order.output, overwrite=order.overwrite)
        inputs = [*self.model.files.values(), *request.pictures]
        inputs += [] if request.after is None else [request.after]
        check_no_input(order.output, inputs)
        return None if order.overwrite else OutputClaim(order.output)

    def resume(
        self,
        job_dir: str | Path,
        output: str | Path | None = None,
        *,
        force: bool = False,
        allow_nonidentical: bool = False,
        on_step: OnStep | None = None,
        preview_every: int | None = None,
    ) -> Job:
        """Continue a job that was stopped, failed or killed.

        Args:
            job_dir: its folder.
            output: instead of the job's own; None leaves it as it was.
            force: replace an existing file.
            allow_nonidentical: go on also where the result will not be the same to the bit.
            on_step: as for :meth:`submit`, for the steps that remain. A job whose latents were
                replaced needs it again; the result is the same to the bit where it answers the same
                step and latents in the same way.
            preview_every: as for :meth:`submit`.

        Raises:
            FingerprintMismatch: what determines the result has changed; names the fields.
            JournalError: the folder holds no job, one that is done, or a damaged one.
            OverBudget, OutputError, DeviceLost, UsageError: as for :meth:`submit`.
        """
        hooks = Hooks(on_step, preview_every)
        self._jobs.check_open()
        journal = Journal.open(Path(job_dir))
        try:
            return self._resume(journal, output, force, allow_nonidentical, hooks)
        except BaseException:
            journal.close()
            raise

    def _resume(
        self,
        journal: Journal,
        output: str | Path | None,
        force: bool,
        allow_nonidentical: bool,
        hooks: Hooks,
    ) -> Job:
        check_unfinished(journal)
        check_picture(journal)
        request = with_own_shift(journal, restored_request(journal))
        plan, order = restored_plan(journal), restored_order(journal)
        if output is not None:
            order = replace(order, output=Path(output), overwrite=False)
        order = replace(order, overwrite=order.overwrite or force)
        claim = self._claimed(order, request)
        try:
            return self._continue(journal, request, plan, order, claim, allow_nonidentical, hooks)
        except BaseException:
            if claim is not None:
                claim.release()
            raise

    def _continue(
        self,
        journal: Journal,
        request: GenerationRequest,
        plan: Plan,
        order: Order,
        claim: OutputClaim | None,
        allow_nonidentical: bool,
        hooks: Hooks,
    ) -> Job:
        plan = self._fitting(plan, request)
        numerics = self._variants.numerics(plan.weight_format)
        plan = replace(plan, compute=numerics["compute"], compute_path=numerics["compute_path"])
        now, how = read_again(
            journal, self.model.files, conditions_now(self.model, self._device, numerics)
        )
        notices = check_conditions(
            journal,
            plan,
            now,
            self.model.files,
            steers=hooks.on_step is not None,
            allow_nonidentical=allow_nonidentical,
        )
        journal.mark("running", plan=plan.to_json(), error=None, **order.facts())
        keeper = JournalKeeper(journal, claim)
        return self._start(request, plan, order, keeper, hooks, (how, *notices))

    def _fitting(self, plan: Plan, request: GenerationRequest) -> Plan:
        """Return the job's own plan where it fits today's budgets and attention, else a new one."""
        vram_bytes, ram_bytes = self.hardware.vram_bytes, self.hardware.ram_bytes
        too_large = plan.peak_vram_bytes > vram_bytes or plan.peak_ram_bytes > ram_bytes
        if too_large or plan.attention != self.chosen.policy.attention:
            log.info("planned anew: the job's own plan is for %s", plan.attention)
            return self.plan(request, saved=True)
        return replace(
            plan,
            vram_limit_bytes=vram_bytes,
            ram_limit_bytes=ram_bytes,
            options=self.chosen.options,
        )

    def _start(
        self,
        request: GenerationRequest,
        plan: Plan,
        order: Order,
        keeper: Keeper,
        hooks: Hooks,
        notices: tuple[str, ...] = (),
    ) -> Job:
        workload, bare = workload_of(request, saved=keeper.keeps), self.run_of(request, plan)

        def shrink(plan: Plan, phase: str, resource: str) -> Plan | None:
            policy, manifest = self.chosen.policy, bare.model.manifest
            return smaller(manifest, workload, self.hardware, plan, phase, resource, policy)

        work = replace(
            bare,
            output=order.output,
            overwrite=order.overwrite,
            metadata=order.metadata,
            shrink=shrink,
            keeper=keeper,
            notices=(*bare.notices, *notices),
            hooks=hooks,
            previewer=self._previewer,
        )
        return self._jobs.start(work, run)

    def run_of(self, request: GenerationRequest, plan: Plan) -> Run:
        """Return what a job under ``plan`` is made of, besides its output, its keeper and its
        recovery.

        Args:
            request: what to make.
            plan: how.

        Raises:
            Nothing.
        """
        return Run(
            model=self._variants.named(plan.weight_format),
            prepare=self._variants.preparation(plan.weight_format),
            request=request,
            plan=plan,
            device=self._device,
            overlapped=self._overlapped,
            output=None,
            overwrite=False,
            metadata=False,
            notices=self._prepared.notices,
            sources=self.model.files,
            imports_s=self._imports_s,
        )

    @property
    def hardware(self) -> Hardware:
        """What the engine plans for: the device, its budgets and its rates."""
        return self.chosen.hardware

    @property
    def _device(self) -> torch.device:
        return torch.device(self.hardware.place)

    def unload(self) -> None:
        """Give all VRAM and pinned memory back to the system; the next job loads again.

        Weights and activations are given back phase by phase while a job runs, and nothing of them
        is left at its end; what is returned here is what allocators keep for later use (torch's
        cache of device memory, the C library's heap). On a GPU the process keeps its context, and
        what cuBLAS works in (8 to 32 MiB a handle).

        Raises:
            UsageError: a job is running.
        """
        with self._jobs.at_rest():
            gc.collect()
            release_cached(self._device)

    def close(self) -> None:
        """Cancel all jobs, wait for their end, unload, and close the model's files.

        May be called more than once. The engine cannot be used afterwards.

        Raises:
            RuntimeError: called on the thread of one of its jobs (from ``on_step``).
        """
        self._jobs.close()
        if not self._jobs.device_lost:
            self.unload()
        self._variants.close()
