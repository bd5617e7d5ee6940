"""The story of one job, top to bottom: a prompt and a picture become a video.

Each phase loads what it needs, computes, and gives everything back; only small results (prompt
states, image states, condition, latents) pass from one to the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from penstock._version import __version__
from penstock.engine import image as pictures
from penstock.engine import text as prompts
from penstock.engine.events import Listener, Monitor, PhaseMonitor
from penstock.engine.model import Component, ModelFiles
from penstock.engine.report import JobResult, RunReport, versions
from penstock.engine.request import GenerationRequest
from penstock.engine.sampler import Sampler, guide, initial_noise, read_scheduler_config
from penstock.engine.video import write_video
from penstock.engine.wan import forward as dit
from penstock.engine.wan.cross import CrossStore
from penstock.engine.wan.vae_decode import decode_frames
from penstock.engine.wan.vae_encode import encode_tiled, first_frame_then_zeros
from penstock.engine.weights import bind, unbind
from penstock.offload.layout import BlockLayout
from penstock.offload.ledger import ByteLedger
from penstock.offload.schedule import Residency, spread
from penstock.offload.streamer import BlockStream, load_block
from penstock.profiles.plan import PhasePlan, Plan, StreamPlan
from penstock.profiles.tiling import TileGrid


@dataclass(frozen=True)
class Run:
    """All that a job is made of.

    Attributes:
        overlapped: stream ahead of the computation (else the sequential reference).
        output: where the mp4 goes; None: decode, but write nothing.
        metadata: prompt and settings go into the file.
    """

    model: ModelFiles
    request: GenerationRequest
    plan: Plan
    device: torch.device
    overlapped: bool
    output: Path | None
    overwrite: bool
    metadata: bool


@torch.no_grad()
def run(job: Run, listener: Listener, cancelled: threading.Event) -> JobResult:
    """Do the whole job and report it.

    Raises:
        JobCancelled: ``cancelled`` was set; nothing is written.
        PenstockError: whatever went wrong, with the remedy.
    """
    started = time.perf_counter()
    stage = Stage(job, listener, cancelled)
    for warning in job.request.warnings:
        stage.monitor.notice(warning.message)
    states = encode_prompts(stage)
    picture = None if job.request.image is None else pictures.open_image(job.request.image)
    image_states = None if picture is None else encode_picture(stage, picture)
    condition = None if picture is None else encode_condition(stage, picture)
    latents = denoise(stage, states, image_states, condition)
    video = decode(stage, latents)
    if job.output is not None:
        mux(stage, video, job.output)
    report = _report(job, stage.monitor, time.perf_counter() - started)
    return JobResult(report, latents, video)


class Stage:
    """What the phases share: the run, its ledgers and its monitor; and how weights come and go."""

    def __init__(self, job: Run, listener: Listener, cancelled: threading.Event) -> None:
        self.job, self.model, self.device = job, job.model, job.device
        self.device_ledger = ByteLedger("VRAM", job.plan.vram_limit_bytes)
        self.host_ledger = ByteLedger("RAM", job.plan.ram_limit_bytes)
        self.monitor = Monitor(listener, self.device_ledger, self.host_ledger, cancelled)

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[tuple[PhasePlan, PhaseMonitor]]:
        """One phase of the plan, its room for activations reserved."""
        plan = self.job.plan[name]
        with (
            self.monitor.phase(plan, total, unit) as phase,
            self.device_ledger.reserve(f"{name}: activations", plan.work_bytes),
        ):
            yield plan, phase

    @contextmanager
    def rest(self, component: Component) -> Iterator[Any]:
        """The network of ``component`` with all that is not in a block loaded."""
        with load_block(
            component.rest,
            device=self.device,
            device_ledger=self.device_ledger,
            host_ledger=self.host_ledger,
        ) as tensors:
            bind(component.module, tensors)
            try:
                yield component.module
            finally:
                unbind(component.module)

    @contextmanager
    def stream(
        self,
        layouts: Sequence[BlockLayout],
        plan: StreamPlan | None,
        phase: PhaseMonitor,
        cycles: int,
    ) -> Iterator[BlockStream]:
        """A stream over ``layouts`` as planned, its statistics joined to the phase's."""
        assert plan is not None
        with BlockStream(
            layouts,
            residency(plan),
            cycles=cycles,
            device=self.device,
            device_ledger=self.device_ledger,
            host_ledger=self.host_ledger,
            overlapped=self.job.overlapped,
        ) as stream:
            phase.streams.append(stream.stats)
            yield stream


def residency(plan: StreamPlan) -> Residency:
    """The plan's counts as places: residents lie evenly between the blocks that stream."""
    on_device = spread(plan.n_blocks, plan.device_resident)
    left = [index for index in range(plan.n_blocks) if index not in set(on_device)]
    in_ram = tuple(left[place] for place in spread(len(left), plan.host_resident))
    return Residency(plan.n_blocks, on_device, in_ram, plan.device_slots, plan.host_slabs)


def visits(stream: BlockStream, block: Any, phase: PhaseMonitor) -> Iterator[tuple[int, Any]]:
    """One pass over all blocks: each index with the block module, its weights bound meanwhile."""
    try:
        for index, tensors in stream.cycle():
            phase.check()
            bind(block, tensors)
            yield index, block
            unbind(block)
    finally:
        unbind(block)


def encode_prompts(stage: Stage) -> list[Tensor]:
    """Text states (1, 512, d) of the prompt and, with guidance, of the negative prompt, on CPU."""
    component, request = stage.model.text, stage.job.request
    tokenizer = prompts.load_tokenizer(stage.model.folder / "tokenizer")
    texts = [request.prompt]
    if request.uses_guidance:
        texts.append(request.effective_negative_prompt)
    tokenised = [prompts.tokenise(tokenizer, text) for text in texts]
    for which, prompt in zip(("prompt", "negative prompt"), tokenised, strict=False):
        if prompt.cut:
            stage.monitor.notice(f"the {which} is too long; this is cut: {prompt.cut!r}")
    lengths = [prompt.length for prompt in tokenised]
    with stage.phase("text", len(component.blocks), "layer") as (plan, phase):
        hidden = prompts.embed(
            tokenised,
            lambda rows: component.checkpoint.read_rows("shared.weight", rows),
            dtype=component.dtype,
            device=stage.device,
        )
        with stage.stream(component.blocks, plan.stream, phase, 1) as stream:
            layers = _counted(visits(stream, component.block, phase), phase)
            hidden = prompts.encode_layers(layers, hidden, lengths)
        with stage.rest(component) as module:
            norm = module.encoder.final_layer_norm
            return [
                prompts.finish(norm, states, length).cpu()
                for states, length in zip(hidden, lengths, strict=True)
            ]


def _counted(blocks: Iterator[tuple[int, Any]], phase: PhaseMonitor) -> Iterator[tuple[int, Any]]:
    for index, block in blocks:
        yield index, block
        phase.advance()


def encode_picture(stage: Stage, picture: Image) -> Tensor | None:
    """Image states (1, tokens, image_dim) of the picture, on the CPU; None without an encoder."""
    component = stage.model.image
    if component is None:
        return None
    processor = pictures.load_image_processor(stage.model.folder / "image_processor")
    pixels = pictures.pixel_values(processor, picture)
    with stage.phase("image", len(component.blocks), "layer") as (plan, phase):
        with stage.rest(component) as module:
            hidden = pictures.embed_pixels(
                module.embeddings, module.pre_layrnorm, pixels.to(stage.device)
            )
        with stage.stream(component.blocks, plan.stream, phase, 1) as stream:
            layers = _counted(visits(stream, component.block, phase), phase)
            return pictures.encode_layers(layers, hidden).cpu()


def encode_condition(stage: Stage, picture: Image) -> Tensor:
    """The picture as the transformer sees it: mask and latents, (1, 20, t, h, w), on the CPU."""
    component, request = stage.model.vae_encoder, stage.job.request
    size = (request.frames, request.height, request.width)
    pixels = pictures.preprocess(picture, request.width, request.height)
    tiles = TileGrid(*stage.job.plan["encode"].tiles)
    latent_frames = request.video_shape.latent(stage.model.manifest.vae)[0]
    units = latent_frames * (tiles.rows * tiles.cols + 1)
    with stage.phase("encode", units, "frame") as (_, phase), stage.rest(component) as vae:
        source = first_frame_then_zeros(pixels[0].to(stage.device, component.dtype))
        encoded = encode_tiled(vae, source, size, tiles, should_stop=phase.advance)
        condition = pictures.conditioning(
            encoded.float(), vae.config.latents_mean, vae.config.latents_std
        ).cpu()
    return condition


def denoise(
    stage: Stage, states: list[Tensor], image_states: Tensor | None, condition: Tensor | None
) -> Tensor:
    """From noise to latents (1, z, t, h, w), fp32, on the CPU."""
    component, request = stage.model.transformer, stage.job.request
    sampler = _sampler(stage)
    with stage.rest(component) as model:
        cross, modulation = prepare(stage, model, states, image_states, sampler.timesteps)
        with stage.phase("denoise", request.steps, "step") as (plan, phase):
            passes = plan.passes(len(states))
            cycles = request.steps * len(passes)
            with stage.stream(component.blocks, plan.stream, phase, cycles) as stream:
                forward = Forward(model, component, stream, cross, plan.chunk_tokens, phase)
                latents = _initial_latents(stage)
                rope = dit.rope_tables(model, latents.shape[2:], stage.device)
                condition = None if condition is None else condition.to(stage.device)
                for step in range(request.steps):
                    model_input = _model_input(latents, condition, component.dtype)
                    predictions = [
                        prediction
                        for branches in passes
                        for prediction in forward(model_input, branches, modulation[step], rope)
                    ]
                    del model_input
                    latents = sampler.step(_guided(predictions, request), step, latents)
                    phase.advance()
            return latents.cpu()


def prepare(
    stage: Stage,
    model: Any,
    states: list[Tensor],
    image_states: Tensor | None,
    timesteps: Tensor,
) -> tuple[CrossStore, list[dit.StepModulation]]:
    """What does not change from step to step: cross-attention K/V, and the time embeddings."""
    component = stage.model.transformer
    with stage.phase("context", len(component.cross), "block") as (plan, phase):
        texts = [text.to(stage.device, component.dtype) for text in states]
        image = None if image_states is None else image_states.to(stage.device, component.dtype)
        contexts = [dit.prepare_context(model, text, image) for text in texts]
        cross = CrossStore(stage.device, on_device=plan.cross_kv_on_device)
        with stage.stream(component.cross, plan.stream, phase, 1) as stream:
            for _, block in _counted(visits(stream, component.block, phase), phase):
                branches: list[dit.CrossKV] = []
                for context in contexts:
                    branches.append(dit.cross_kv(block.attn2, context, *branches[:1]))
                cross.add(branches)
        return cross, dit.step_modulation(model, timesteps, component.dtype)


@dataclass(frozen=True)
class Forward:
    """The streamed transformer: each call is one pass over all blocks, for some branches."""

    model: Any
    component: Component
    stream: BlockStream
    cross: CrossStore
    chunk_tokens: int
    phase: PhaseMonitor

    def __call__(
        self, model_input: Tensor, branches: range, modulation: dit.StepModulation, rope: dit.Rope
    ) -> list[Tensor]:
        """The predictions (1, out_channels, t, h, w), one a branch."""
        return dit.denoise_forward(
            self.model,
            visits(self.stream, self.component.block, self.phase),
            model_input,
            [self.cross.branch(branch) for branch in branches],
            modulation,
            rope,
            self.chunk_tokens,
        )


def _sampler(stage: Stage) -> Sampler:
    request = stage.job.request
    return Sampler(
        read_scheduler_config(stage.model.folder / "scheduler"),
        sampler=request.sampler,
        steps=request.steps,
        shift=request.effective_shift,
        device=stage.device,
    )


def _initial_latents(stage: Stage) -> Tensor:
    request, vae = stage.job.request, stage.model.manifest.vae
    assert request.seed is not None
    shape = (1, vae.z_dim, *request.video_shape.latent(vae))
    return initial_noise(shape, request.seed).to(stage.device)


def _model_input(latents: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
    if condition is None:
        return latents.to(dtype)
    return torch.cat([latents, condition], dim=1).to(dtype)


def _guided(predictions: list[Tensor], request: GenerationRequest) -> Tensor:
    if len(predictions) == 1:
        return predictions[0]
    return guide(*predictions, request.guidance_scale)


def decode(stage: Stage, latents: Tensor) -> Tensor:
    """Latents to the video, uint8 (frames, h, w, 3) in RAM."""
    component, request = stage.model.vae_decoder, stage.job.request
    video_bytes = 3 * request.frames * request.height * request.width
    tiles = TileGrid(*stage.job.plan["decode"].tiles)
    units = latents.shape[2] + request.frames * tiles.rows * tiles.cols
    with (
        stage.phase("decode", units, "frame") as (_, phase),
        stage.host_ledger.reserve("video frames", video_bytes),
        stage.rest(component) as vae,
    ):
        raw = _raw_latents(latents.to(stage.device, component.dtype), vae.config)
        video = decode_frames(vae, raw, tiles, should_stop=phase.advance)
    return video


def _raw_latents(latents: Tensor, config: Any) -> Tensor:
    """Undo the VAE's normalisation, rounded as diffusers' pipelines do."""
    view = (1, config.z_dim, 1, 1, 1)
    mean = torch.tensor(config.latents_mean).view(view).to(latents)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(view).to(latents)
    return latents / inverse_std + mean


def mux(stage: Stage, video: Tensor, output: Path) -> None:
    """Write the frames to ``output``."""
    job = stage.job
    write_video(
        output,
        video.numpy(),
        job.request.fps,
        metadata=_metadata(job.request) if job.metadata else None,
        overwrite=job.overwrite,
    )


def _metadata(request: GenerationRequest) -> dict[str, Any]:
    """What the file tells of itself: all settings but the place of the picture."""
    settings = asdict(request) | {"shift": request.effective_shift, "penstock": __version__}
    return {name: settings[name] for name in settings if name not in ("image", "grid")}


def _report(job: Run, monitor: Monitor, seconds: float) -> RunReport:
    request = job.request
    assert request.seed is not None
    return RunReport(
        output=None if job.output is None else str(job.output),
        frames=request.frames,
        width=request.width,
        height=request.height,
        fps=request.fps,
        seed=request.seed,
        seconds=seconds,
        vram_limit_bytes=job.plan.vram_limit_bytes,
        ram_limit_bytes=job.plan.ram_limit_bytes,
        allocated_vram_bytes=_allocated_bytes(job.device),
        phases=tuple(monitor.phases),
        notices=tuple(monitor.notices),
        versions=versions(),
    )


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
