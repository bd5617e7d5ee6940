"""The story of one job, top to bottom: a prompt and a picture become a video.

Each phase loads what it needs, computes, and gives everything back; only small results (prompt
states, image states, condition, latents) pass from one to the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from penstock._version import __version__
from penstock.engine.families.wan import clip as pictures
from penstock.engine.families.wan import forward as dit
from penstock.engine.families.wan import umt5 as prompts
from penstock.engine.families.wan.attention import Attention, attention, self_attention_of
from penstock.engine.families.wan.cross import CrossStore
from penstock.engine.families.wan.film import Film
from penstock.engine.families.wan.vae_decode import raw_latents
from penstock.engine.families.wan.vae_encode import encode_tiled, first_frame_then_zeros
from penstock.engine.media.picture import open_image
from penstock.engine.media.video import write_video
from penstock.engine.model.files import Component
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.run.ending import Ending
from penstock.engine.run.events import Listener, Monitor, PhaseMonitor
from penstock.engine.run.keeper import Conditions
from penstock.engine.run.preview_fit import prepare_previews, preview_of
from penstock.engine.run.report import JobResult, RunReport, versions
from penstock.engine.run.sampler import guide
from penstock.engine.run.sampling import Sampling
from penstock.engine.run.stage import Run, Stage, visits
from penstock.engine.store.sums import PIECE_BYTES, Sums, how_told
from penstock.offload.allocator import allocator_capped
from penstock.offload.device import made_current
from penstock.offload.streamer import BlockStream
from penstock.profiles.tiling import TileGrid

STEERED = "on_step replaced the latents: the request and the seed alone do not lead to this video"


@torch.no_grad()
def run(job: Run, listener: Listener, cancelled: threading.Event) -> JobResult:
    """Do the whole job and report it.

    Raises:
        JobCancelled: ``cancelled`` was set; nothing is written.
        PenstockError: whatever went wrong, with the remedy.
    """
    started = time.perf_counter()
    stage = Stage(job, listener, cancelled)
    capped = allocator_capped(job.device, job.plan.vram_limit_bytes)
    with Ending(job.keeper, job.device), made_current(job.device), capped, closing(stage):
        for message in (*job.notices, *(warning.message for warning in job.request.warnings)):
            stage.monitor.notice(message)
        know_sources(stage)
        latents = sample(stage)
        video = stage.attempt("decode", lambda: decode(stage, latents))
        output = asked = job.output
        if asked is not None:
            output = stage.attempt("mux", lambda: mux(stage, video, asked))
        if job.keeper.steered:
            stage.monitor.notice(STEERED)
        for problem in job.keeper.problems:
            stage.monitor.notice(problem)
        report = _report(job, stage.monitor, output, time.perf_counter() - started)
        job.keeper.finished(report)
    return JobResult(report, latents, video)


def know_sources(stage: Stage) -> None:
    """Keep checksums of every byte that a kept job's result depends on, before any of it is made:
    a resume then notices whatever has changed."""
    if not stage.keeper.lacks_sums():
        return
    with stage.host_ledger.reserve("files being read for their checksums", PIECE_BYTES):
        sums = {n: Sums().of(p, stage.monitor.check) for n, p in stage.job.sources.items()}
    stage.keeper.keep_sums({name: each.value for name, each in sums.items()})
    stage.monitor.notice(f"the model's files are known for a resume: {how_told(sums.values())}")


def sample(stage: Stage) -> Tensor:
    """The final latents (1, z, t, h, w), fp32, on the CPU: those that are kept, or new ones."""
    keeper = stage.keeper
    latents = keeper.latents()
    if latents is None:
        stage.prepare()
        conditions = stage.attempt("context", lambda: kept_conditions(stage))
        if conditions is None:
            conditions = condition(stage)
            keeper.keep_conditions(conditions)
        if stage.job.hooks.preview_every and not stage.job.previewer.is_ready:
            stage.attempt("decode", lambda: prepare_previews(stage))
        sampling = stage.attempt("denoise", lambda: Sampling(stage))
        latents = stage.attempt("denoise", lambda: denoise(stage, conditions, sampling))
        keeper.keep_latents(latents)
    return latents


def kept_conditions(stage: Stage) -> Conditions | None:
    """The encoded prompt and picture of a job that goes on; None: they are still to be made."""
    with stage.restoring():
        return stage.keeper.conditions()


def condition(stage: Stage) -> Conditions:
    """Encode the prompt and the picture."""
    path = stage.job.request.image
    texts = stage.attempt("text", lambda: encode_prompts(stage))
    if path is None:
        return Conditions(tuple(texts))
    picture = open_image(path)
    return Conditions(
        tuple(texts),
        stage.attempt("image", lambda: encode_picture(stage, picture)),
        stage.attempt("encode", lambda: encode_condition(stage, picture)),
    )


def encode_prompts(stage: Stage) -> list[Tensor]:
    """Text states (1, 512, d) of the prompt and, with guidance, of the negative prompt, on CPU."""
    component, request = stage.model.text, stage.job.request
    tokenizer = stage.model.tokenizer()
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
            lambda rows: component.read_rows("shared.weight", rows),
            dtype=component.dtype,
            device=stage.device,
        )
        with stage.stream(component.blocks, plan.stream, phase, 1) as stream:
            layers = _counted(visits(stream, component, phase), phase)
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
    processor = pictures.make_image_processor(stage.model.source.image_processor)
    pixels = pictures.pixel_values(processor, picture)
    with stage.phase("image", len(component.blocks), "layer") as (plan, phase):
        with stage.rest(component) as module:
            hidden = pictures.embed_pixels(
                module.embeddings, module.pre_layrnorm, pixels.to(stage.device)
            )
        with stage.stream(component.blocks, plan.stream, phase, 1) as stream:
            layers = _counted(visits(stream, component, phase), phase)
            return pictures.encode_layers(layers, hidden).cpu()


def encode_condition(stage: Stage, picture: Image) -> Tensor:
    """The picture as the transformer sees it: mask and latents, (1, 20, t, h, w), on the CPU."""
    component, request = stage.model.vae_encoder, stage.job.request
    size = (request.frames, request.height, request.width)
    pixels = pictures.preprocess(picture, request.width, request.height)
    tiles = TileGrid(*stage.plan["encode"].tiles)
    latent_frames = request.video_shape.latent(stage.model.manifest.vae)[0]
    units = latent_frames * (tiles.rows * tiles.cols + 1)
    with stage.phase("encode", units, "frame") as (_, phase), stage.rest(component) as vae:
        source = first_frame_then_zeros(pixels[0].to(stage.device, component.dtype))
        encoded = encode_tiled(vae, source, size, tiles, should_stop=phase.advance)
        return pictures.conditioning(
            encoded.float(), vae.config.latents_mean, vae.config.latents_std
        ).cpu()


def denoise(stage: Stage, conditions: Conditions, sampling: Sampling) -> Tensor:
    """From the point that ``sampling`` has reached to latents (1, z, t, h, w), fp32, on the CPU."""
    component, request = stage.model.transformer, stage.job.request
    if sampling.steps_done == request.steps:
        return sampling.latents.cpu()
    with closing(sampling.resume()) as sampler, stage.rest(component) as model:
        start, steps, latents = sampler.next_step, request.steps, sampling.latents
        stage.steps_left = steps - start
        cross, modulation = prepare(stage, model, conditions, sampler.timesteps)
        with stage.phase("denoise", steps, "step", done=start) as (plan, phase):
            passes = plan.passes(len(conditions.texts))
            cycles = stage.steps_left * len(passes)
            with stage.stream(component.blocks, plan.stream, phase, cycles) as stream:
                attend = self_attention_of(stage.plan.attention)
                forward = Forward(model, component, stream, cross, plan.chunk_tokens, phase, attend)
                rope = dit.rope_tables(model, latents.shape[2:], stage.device)
                picture = _on_device(conditions.condition, stage.device)
                for step in range(start, steps):
                    if step == steps - 1:
                        stage.read_decoder_ahead()
                    model_input = _model_input(latents, picture, component.dtype)
                    predictions = [
                        prediction
                        for branches in passes
                        for prediction in forward(model_input, branches, modulation[step], rope)
                    ]
                    del model_input
                    component.checkpoint.check_unchanged()
                    prediction = _guided(predictions, request)
                    preview = preview_of(stage, sampler, prediction, latents)
                    latents = sampling.step(sampler, prediction, latents)
                    phase.advance(preview)
            stage.keeper.settle()
            return latents.cpu()


def prepare(
    stage: Stage,
    model: Any,
    conditions: Conditions,
    timesteps: Tensor,
) -> tuple[CrossStore, list[dit.StepModulation]]:
    """What does not change from step to step: cross-attention K/V, and the time embeddings."""
    component = stage.model.transformer
    with stage.phase("context", len(component.cross), "block") as (plan, phase):
        texts = [text.to(stage.device, component.dtype) for text in conditions.texts]
        image = _on_device(conditions.image, stage.device, component.dtype)
        contexts = [dit.prepare_context(model, text, image) for text in texts]
        cross = CrossStore(stage.device, on_device=plan.cross_kv_on_device)
        with stage.stream(component.cross, plan.stream, phase, 1) as stream:
            for _, block in _counted(visits(stream, component, phase), phase):
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
    attend: Attention = attention

    def __call__(
        self, model_input: Tensor, branches: range, modulation: dit.StepModulation, rope: dit.Rope
    ) -> list[Tensor]:
        """The predictions (1, out_channels, t, h, w), one a branch."""
        return dit.denoise_forward(
            self.model,
            visits(self.stream, self.component, self.phase),
            model_input,
            [self.cross.branch(branch) for branch in branches],
            modulation,
            rope,
            self.chunk_tokens,
            self.attend,
        )


def _on_device(
    tensor: Tensor | None, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor | None:
    return None if tensor is None else tensor.to(device, dtype)


def _model_input(latents: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
    if condition is None:
        return latents.to(dtype)
    return torch.cat([latents, condition], dim=1).to(dtype)


def _guided(predictions: list[Tensor], request: GenerationRequest) -> Tensor:
    if len(predictions) == 1:
        return predictions[0]
    conditional, unconditional = predictions
    return guide(conditional, unconditional, request.guidance_scale)


def decode(stage: Stage, latents: Tensor) -> Tensor:
    """Latents to the video, uint8 (frames, h, w, 3) in RAM."""
    component, request = stage.model.vae_decoder, stage.job.request
    shape = (request.frames, request.height, request.width, 3)
    grid = TileGrid(*stage.plan["decode"].tiles)
    units = latents.shape[2] + request.frames * grid.rows * grid.cols
    with (
        stage.phase("decode", units, "frame") as (_, phase),
        stage.rest(component) as vae,
    ):
        raw = raw_latents(latents.to(stage.device, component.dtype), vae.config)
        film = Film(vae, raw, grid, shape, stage.keeper)
        film.decode(should_stop=phase.advance)
        stage.keeper.settle()
        component.checkpoint.check_unchanged()
    return film.video


def mux(stage: Stage, video: Tensor, output: Path) -> Path:
    """Write the frames to ``output``, or where that is taken by now to a free name like it."""
    job = stage.job
    with stage.phase("mux", len(video), "frame") as (_, phase):
        written = write_video(
            output,
            _counted_frames(video, phase),
            job.request.fps,
            metadata=_metadata(job) if job.metadata else None,
            overwrite=job.overwrite,
            or_beside=True,
            finished=stage.keeper.writing_output,
        )
    if written.path != output:
        stage.monitor.notice(f"{output} is another file by now: the video is in {written.path}")
    return written.path


def _counted_frames(video: Tensor, phase: PhaseMonitor) -> Iterator[Any]:
    for frame in video.numpy():
        yield frame
        phase.advance()


def _metadata(job: Run) -> dict[str, Any]:
    """What the file tells of itself: all settings but the place of the picture."""
    request = job.request
    settings = asdict(request) | {"shift": request.effective_shift, "penstock": __version__}
    steered = {"steered": True} if job.keeper.steered else {}
    return {name: settings[name] for name in settings if name not in ("image", "grid")} | steered


def _report(job: Run, monitor: Monitor, output: Path | None, seconds: float) -> RunReport:
    request = job.request
    assert request.seed is not None
    return RunReport(
        output=None if output is None else str(output),
        frames=request.frames,
        width=request.width,
        height=request.height,
        fps=request.fps,
        seed=request.seed,
        seconds=seconds,
        vram_limit_bytes=job.plan.vram_limit_bytes,
        ram_limit_bytes=job.plan.ram_limit_bytes,
        allocated_vram_bytes=_allocated_bytes(job.device),
        weight_format=job.plan.weight_format,
        compute=job.plan.compute,
        compute_path=job.plan.compute_path,
        attention=job.plan.attention,
        phases=tuple(monitor.phases),
        notices=tuple(monitor.notices),
        versions=versions(),
        steered=job.keeper.steered,
    )


def _allocated_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
