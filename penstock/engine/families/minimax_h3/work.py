"""The phases of a job with MiniMax-H3 as they run: a prompt, and pictures at both ends, become a
video with sound.

Each phase loads what it needs, computes, and gives everything back; only small results (the
prompt's states, the pictures' latents, what is denoised) pass from one to the next.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.attention.kernels import Attention, attention, self_attention_by_step
from penstock.engine.families.minimax_h3.denoise_plan import CONTEXT, DENOISE
from penstock.engine.families.minimax_h3.forward import Angles, angles, packed_forward, refine
from penstock.engine.families.minimax_h3.layout import Layout, unpack
from penstock.engine.families.minimax_h3.model import model_of
from penstock.engine.families.minimax_h3.pictures import keyframes
from penstock.engine.families.minimax_h3.preview import prepare_previews, preview_of
from penstock.engine.families.minimax_h3.sampling import (
    PackedSampling,
    as_rows,
    given_rows,
    velocity,
)
from penstock.engine.families.minimax_h3.sizes import FPS, Latents
from penstock.engine.families.minimax_h3.sound.decode import decode as decode_sound
from penstock.engine.families.minimax_h3.tables import StepTables, StepTimes, TablesInWork
from penstock.engine.families.minimax_h3.terms import TEXT_TOKENS, anchors
from penstock.engine.families.minimax_h3.text.encode import encode as encode_text
from penstock.engine.families.minimax_h3.video_vae.decode import decode as decode_video
from penstock.engine.families.minimax_h3.video_vae.encode import encode as encode_pictures
from penstock.engine.model.component import Component
from penstock.engine.run.events import PhaseMonitor
from penstock.engine.run.keeper import Conditions
from penstock.engine.run.pipeline import Products, SavePoint, Work
from penstock.engine.run.stage import Stage, visits
from penstock.engine.run.steprecord import keep_record
from penstock.errors import RequestError
from penstock.offload.streamer import BlockStream
from penstock.profiles.caching import Caching


def _text(stage: Stage, found: Products) -> None:
    check_rate(stage)
    found["frames"] = stage.attempt("text", lambda: keyframes(stage))
    found["texts"] = stage.attempt("text", lambda: encode_text(stage, found["frames"]))


def check_rate(stage: Stage) -> None:
    """Refuse another frame rate than the sound is made for.

    Raises:
        RequestError: it is another.
    """
    asked = stage.job.request.fps
    if asked != FPS:
        raise RequestError(
            "the sound is made for one frame rate",
            expected=f"{FPS} frames a second",
            found=f"{asked:g}",
            remedy="Leave --fps out",
        )


def _encode(stage: Stage, found: Products) -> None:
    frames = found["frames"]
    found["condition"] = stage.attempt("encode", lambda: encode_pictures(stage, frames))


def _denoise(stage: Stage, found: Products) -> None:
    found.pop("frames", None)
    if stage.job.hooks.preview_every and not stage.job.previewer.is_ready:
        stage.attempt("decode", lambda: prepare_previews(stage))
    conditions, sizes = _conditions(found), sizes_of(stage)
    pictures = len(stage.job.request.pictures)
    shift = model_of(stage).manifest.sound_shift
    sampling = stage.attempt(DENOISE, lambda: PackedSampling(stage, sizes, shift, pictures))
    found["latents"] = stage.attempt(DENOISE, lambda: denoise(stage, conditions, sampling))


def _decode(stage: Stage, found: Products) -> None:
    video, _ = unpack(found["latents"], sizes_of(stage))
    found["video"] = stage.attempt("decode", lambda: decode_video(stage, video))


def _sound(stage: Stage, found: Products) -> None:
    video, sound = unpack(found["latents"], sizes_of(stage))
    found["sound"] = stage.attempt("sound", lambda: decode_sound(stage, sound))
    found["latents"] = video


def sizes_of(stage: Stage) -> Latents:
    """Return the sizes of what the job denoises."""
    return model_of(stage).sizes(stage.job.request.video_shape)


def _conditions(found: Products) -> Conditions:
    return Conditions(tuple(found["texts"]), condition=found.get("condition"))


def _saved_conditions(stage: Stage) -> Products | None:
    """Return the encoded prompt and pictures of a job that goes on; None: they are still to be
    made."""

    def restore() -> Conditions | None:
        with stage.restoring():
            return stage.keeper.conditions()

    kept = stage.attempt(CONTEXT, restore)
    return None if kept is None else {"texts": kept.texts, "condition": kept.condition}


def _saved_latents(stage: Stage) -> Products | None:
    latents = stage.keeper.latents()
    return None if latents is None else {"latents": latents}


def denoise(stage: Stage, conditions: Conditions, sampling: PackedSampling) -> Tensor:
    """From the point that ``sampling`` has reached to the end; gives packed latents, (1, n), fp32,
    on the CPU."""
    steps = sampling.evaluations
    if sampling.steps_done < steps:
        _steps(stage, conditions, sampling, steps)
    return sampling.latents.cpu()


def _steps(stage: Stage, conditions: Conditions, sampling: PackedSampling, steps: int) -> None:
    component, name = model_of(stage).transformer, DENOISE
    asked = stage.job.request.steps
    stage.monitor.notice(f"{asked} steps are {steps} forward passes: the last has no noise left")
    caching = Caching.of(stage.plan.step_cache)
    sampler, cache = sampling.resume_paired(range(steps), caching)
    with closing(sampler):
        start, latents = sampler.next_step, sampling.latents
        sure, most = stage.forwards_left = cache.left(start)
        layout = layout_of(stage, conditions)
        times = sampler.times(pictures=bool(layout.anchors))[start:]
        text, tables = prepare(stage, conditions, times)
        with (
            stage.rest(component) as model,
            stage.phase(name, steps, "step", done=start) as (plan, phase),
            stage.stream(component.blocks, plan.stream, phase, most, sure) as stream,
        ):
            turns = angles(model, layout.positions(), stage.device, component.dtype)
            attending = self_attention_by_step(stage.plan.attention, steps)
            predict = Predict(
                model, component, stream, phase, layout, text, _given(stage, conditions), turns,
                plan.chunk_tokens,
            )  # fmt: skip
            forwards = 0
            for step in range(start, steps):
                if step == steps - 1:
                    stage.prefetch_after(name)
                if cache.wants(step):
                    forwards += 1
                    stream.expect(forwards + cache.left(step + 1)[0])
                    prediction = predict(latents, tables[step - start], attending(step))
                    component.checkpoint.check_unchanged()
                    cache.computed(step, prediction, latents)
                else:
                    prediction = cache.predicted(step)
                preview = preview_of(stage, sampler, prediction, latents, layout.latents)
                latents = sampling.step(sampler, cache, prediction, latents)
                phase.advance(preview)
        stage.computed_steps = tuple(cache.computed_steps)
        keep_record(stage, cache, sampler)
        stage.keeper.settle()


def layout_of(stage: Stage, conditions: Conditions) -> Layout:
    """Return the layout of the job's sequence."""
    _, tags = conditions.texts
    return Layout(sizes_of(stage), tuple(tags.tolist()), anchors(stage.job.request))


def _given(stage: Stage, conditions: Conditions) -> Tensor | None:
    """Return the rows of the given pictures on the device; None: there are none."""
    seed = stage.job.request.seed
    assert seed is not None
    if conditions.condition is None:
        return None
    return given_rows(conditions.condition, sizes_of(stage), seed).to(stage.device)


def prepare(
    stage: Stage, conditions: Conditions, times: list[StepTimes]
) -> tuple[Tensor, list[StepTables]]:
    """Return what is made once a job: the text's rows on the device, and the tables of the steps
    that are left, in host memory."""
    model = model_of(stage)
    component, once = model.transformer, model.once
    states, _ = conditions.texts
    with stage.phase(CONTEXT, len(component.cross), "block") as (plan, phase):
        with stage.rest(once) as module:
            text = refine(module, states.to(stage.device, component.dtype))
            work = TablesInWork(module, times, len(component.cross), component.dtype, stage.device)
        with stage.stream(component.cross, plan.stream, phase, 1) as stream:
            for index, block in visits(stream, component, phase):
                work.add(index, block)
                phase.advance()
        return text, work.done()


@dataclass(frozen=True)
class Predict:
    """The streamed transformer: each call is one pass over all blocks.

    Attributes:
        text: its rows, refined.
        given: rows of given pictures; None: there are none.
        turns: rotary tables.
        chunk_rows: rows of a chunk.
    """

    model: object
    component: Component
    stream: BlockStream
    phase: PhaseMonitor
    layout: Layout
    text: Tensor
    given: Tensor | None
    turns: Angles
    chunk_rows: int

    def __call__(
        self, latents: Tensor, tables: StepTables, attend: Attention = attention
    ) -> Tensor:
        """Return what leads to noise, packed as ``latents`` are: (1, n), fp32.

        Args:
            attend: the attention.
        """
        sizes = self.layout.latents
        video, sound = as_rows(latents, sizes)
        if self.given is not None:
            video = torch.cat([self.given, video])
        found = packed_forward(
            self.model,
            visits(self.stream, self.component, self.phase),
            self.layout,
            self.text,
            video,
            sound,
            tables.to(latents.device),
            self.turns,
            self.chunk_rows,
            attend,
        )
        del video, sound
        return velocity(*found, sizes)


def drawn(stage: Stage) -> Products:
    """Return what the encoders would have given, drawn instead: the transformer's work is the
    same."""
    model, draw = model_of(stage), torch.Generator().manual_seed(0)
    width, dtype = model.manifest.transformer.text_dim, model.transformer.dtype
    states = torch.randn(1, TEXT_TOKENS, width, generator=draw).to(dtype)
    texts = states, torch.ones(TEXT_TOKENS, dtype=torch.long)
    pictures, sizes = len(stage.job.request.pictures), sizes_of(stage)
    shape = (pictures, sizes.channels, 1, sizes.height, sizes.width)
    condition = torch.randn(shape, generator=draw) if pictures else None
    return {"texts": texts, "condition": condition}


WORK = Work(
    phases={
        "text": _text,
        "encode": _encode,
        DENOISE: _denoise,
        "decode": _decode,
        "sound": _sound,
    },
    saves=(
        SavePoint(
            DENOISE,
            _saved_conditions,
            lambda stage, found: stage.keeper.save_conditions(_conditions(found)),
        ),
        SavePoint(
            "decode",
            _saved_latents,
            lambda stage, found: stage.keeper.save_latents(found["latents"]),
        ),
    ),
    drawn=drawn,
)
