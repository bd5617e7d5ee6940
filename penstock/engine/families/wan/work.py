"""The phases of a job with Wan as they run: a prompt and a picture become a video.

Each phase loads what it needs, computes, and gives everything back; only small results (prompt
states, image states, condition, latents) pass from one to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.engine.attention.kernels import Attention, attention, self_attention_by_step
from penstock.engine.families.wan import clip as pictures
from penstock.engine.families.wan import forward as dit
from penstock.engine.families.wan import umt5 as prompts
from penstock.engine.families.wan.cost.transformer import TEXT_TOKENS
from penstock.engine.families.wan.cross import CrossStore
from penstock.engine.families.wan.defaults import negative_prompt
from penstock.engine.families.wan.denoise_plan import named
from penstock.engine.families.wan.film import Film
from penstock.engine.families.wan.model import model_of
from penstock.engine.families.wan.preview import prepare_previews, preview_of
from penstock.engine.families.wan.stretches import (
    Stretch,
    passes_left,
    shared_caching,
    stretches_of,
)
from penstock.engine.families.wan.terms import clip_changes
from penstock.engine.families.wan.vae_decode import raw_latents
from penstock.engine.families.wan.vae_encode import (
    encode_tiled,
    first_frame_then_zeros,
    normalised_latents,
)
from penstock.engine.families.wan.windowed import Cut, seen
from penstock.engine.media.fit import fitting
from penstock.engine.media.picture import open_image
from penstock.engine.model.component import Component
from penstock.engine.request.generation import workload_of
from penstock.engine.run.events import PhaseMonitor
from penstock.engine.run.keeper import Conditions
from penstock.engine.run.pipeline import Products, SavePoint, Work
from penstock.engine.run.sampler import guide
from penstock.engine.run.sampling import Sampling
from penstock.engine.run.stage import Stage, visits
from penstock.engine.run.steprecord import keep_record
from penstock.offload.streamer import BlockStream
from penstock.profiles.caching import Caching
from penstock.profiles.plan import PhasePlan
from penstock.profiles.tiling import TileGrid


def _text(stage: Stage, found: Products) -> None:
    found["texts"] = stage.attempt("text", lambda: encode_prompts(stage))


def _image(stage: Stage, found: Products) -> None:
    found["image"], found["frames"] = stage.attempt("image", lambda: encode_pictures(stage))


def _encode(stage: Stage, found: Products) -> None:
    frames = found.get("frames")
    found["condition"] = stage.attempt("encode", lambda: encode_condition(stage, frames))


def _denoise(stage: Stage, found: Products) -> None:
    found.pop("frames", None)
    if stage.job.hooks.preview_every and not stage.job.previewer.is_ready:
        stage.attempt("decode", lambda: prepare_previews(stage))
    found["sampling"] = stage.attempt("denoise", lambda: Sampling(stage))
    _go_on(stage, found, expert_of(stage, second=False))


def _denoise_second(stage: Stage, found: Products) -> None:
    _go_on(stage, found, expert_of(stage, second=True))


def _go_on(stage: Stage, found: Products, expert: Expert) -> None:
    conditions, sampling = _conditions(found), found["sampling"]
    name = expert.phase("denoise")
    latents = stage.attempt(name, lambda: denoise(stage, conditions, sampling, expert))
    if latents is not None:
        del found["sampling"]
        first = conditions.condition if model_of(stage).manifest.tokenwise else None
        found["latents"] = latents if first is None else with_first(latents.clone(), first)


def _decode(stage: Stage, found: Products) -> None:
    found["video"] = stage.attempt("decode", lambda: decode(stage, found["latents"]))


@dataclass(frozen=True)
class Expert:
    """A transformer, and the steps that are its own.

    Attributes:
        component: the network.
        stretches: its own steps, of the job's, as they are computed alike.
        guidance: of its steps.
        second: it is that for little noise, where there are two.
    """

    component: Component
    stretches: tuple[Stretch, ...]
    guidance: float
    second: bool

    @property
    def until(self) -> int:
        """The first step that is no longer its own."""
        return self.stretches[-1].steps.stop

    def phase(self, name: str) -> str:
        """Return the name of its own phase of that kind."""
        return named(name, self.second)

    @property
    def branches(self) -> int:
        """Forward passes a step, at most."""
        return max(each.branches for each in self.stretches)


def expert_of(stage: Stage, *, second: bool) -> Expert:
    """Return the only transformer of the job, or one of two."""
    model, request = model_of(stage), stage.job.request
    work, (high, low) = workload_of(request), request.guidance_scales
    caching = Caching.of(stage.plan.step_cache)
    if model.second is None:
        component, steps, scale = model.transformer, range(request.steps), low
    else:
        first, _ = model.manifest.split(work)
        ranges = range(first), range(first, request.steps)
        caching = shared_caching(model.manifest, work, caching, ranges)[second]
        component = model.second if second else model.transformer
        steps = ranges[second]
        scale = low if second else high
    stretches = stretches_of(model.manifest, work, steps, caching, guided=scale > 1)
    return Expert(component, stretches, scale, second)


def _conditions(found: Products) -> Conditions:
    return Conditions(tuple(found["texts"]), found.get("image"), found.get("condition"))


def _saved_conditions(stage: Stage) -> Products | None:
    """Return the encoded prompt and picture of a job that goes on; None: they are still to be
    made."""

    def restore() -> Conditions | None:
        with stage.restoring():
            return stage.keeper.conditions()

    kept = stage.attempt("context", restore)
    if kept is None:
        return None
    return {"texts": kept.texts, "image": kept.image, "condition": kept.condition}


def _saved_latents(stage: Stage) -> Products | None:
    latents = stage.keeper.latents()
    return None if latents is None else {"latents": latents}


def encode_prompts(stage: Stage) -> list[Tensor]:
    """Return the text states (1, 512, d) of the prompt and, with guidance, of the negative prompt,
    on CPU."""
    component, request = model_of(stage).text, stage.job.request
    texts = [request.prompt]
    if workload_of(request).texts == 2:
        texts.append(negative_prompt(request))
    cleaned = [prompts.clean_prompt(text) for text in texts]
    tokenised = model_of(stage).tokenizer.tokenise(cleaned)
    for which, prompt in zip(("prompt", "negative prompt"), tokenised, strict=False):
        if prompt.cut:
            told = f"the {which} is too long; this is cut: {prompt.cut!r}"
            stage.monitor.notice(told, logging.DEBUG)
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


def see_pictures(stage: Stage) -> tuple[list[Tensor], list[Tensor]]:
    """Return the pictures that the video starts from and ends with, as `see_picture` gives them:
    what the image encoder sees, which is nothing without one, and their frames."""
    request = stage.job.request
    pairs = [see_picture(stage, path) for path in request.pictures]
    return [seen for seen, _ in pairs if seen is not None], [frame for _, frame in pairs]


def see_picture(stage: Stage, path: Path) -> tuple[Tensor | None, Tensor]:
    """Return a picture as the image encoder sees it (None without one), whole, and at the video's
    size, as the request wants it to fit. In the phase that plans for it: the decoded picture may be
    many times as large as both."""
    request, model = stage.job.request, model_of(stage)
    picture = open_image(path)
    seen = None
    if model.image is not None:
        config, side = model.source.image_processor, model.image.config["image_size"]
        squash = request.clip_crop == "squash"
        see = pictures.squashed_values if squash else pictures.pixel_values
        seen = see(config, picture, side)
    size = request.width, request.height
    fit = fitting(picture.size, size, request.fit, request.grid.side)
    if fit.told:
        stage.monitor.notice(fit.told)
    return seen, pictures.preprocess(picture, *size, fit)


def encode_pictures(stage: Stage) -> tuple[Tensor, list[Tensor]]:
    """Return the image states (1, tokens, image_dim) of the pictures, one after another, and the
    pictures at the video's size, on the CPU."""
    component = model_of(stage).image
    assert component is not None
    with stage.phase("image", len(component.blocks), "layer") as (plan, phase):
        seen, frames = see_pictures(stage)
        with stage.rest(component) as module:
            hidden = [
                pictures.embed_pixels(
                    module.embeddings, module.pre_layrnorm, pixels.to(stage.device)
                )
                for pixels in seen
            ]
        with stage.stream(component.blocks, plan.stream, phase, 1) as stream:
            layers = _counted(visits(stream, component, phase), phase)
            states = pictures.encode_pictures(layers, hidden)
            return torch.cat([each.cpu() for each in states], dim=1), frames


def encode_condition(stage: Stage, frames: list[Tensor] | None) -> Tensor:
    """Encode the pictures as the transformer sees them: mask and latents, (1, 20, t, h, w), on the
    CPU.

    Args:
        frames: the pictures at the video's size; None: they are still to be read.
    """
    component, request = model_of(stage).vae_encoder, stage.job.request
    frames_encoded = 1 if model_of(stage).manifest.tokenwise else request.frames
    size = (frames_encoded, request.height, request.width)
    tiles = TileGrid(*stage.plan["encode"].tiles)
    shape = replace(request.video_shape, frames=frames_encoded)
    latent_frames = shape.latent(model_of(stage).manifest.vae)[0]
    units = latent_frames * (tiles.rows * tiles.cols + 1)
    with stage.phase("encode", units, "frame") as (_, phase), stage.rest(component) as vae:
        given = see_pictures(stage)[1] if frames is None else frames
        first, *last = (frame[0].to(stage.device, component.dtype) for frame in given)
        source = first_frame_then_zeros(first, (request.frames - 1, last[0]) if last else None)
        changes = clip_changes(request.frames, len(given))
        encoded = encode_tiled(vae, source, size, tiles, changes=changes, should_stop=phase.advance)
        if model_of(stage).manifest.tokenwise:
            return normalised_latents(encoded.float(), vae.config).cpu()
        return pictures.conditioning(
            encoded.float(), vae.config.latents_mean, vae.config.latents_std, ends=bool(last)
        ).cpu()


def denoise(
    stage: Stage, conditions: Conditions, sampling: Sampling, expert: Expert
) -> Tensor | None:
    """From the point that ``sampling`` has reached to the last step of ``expert``; if that is the
    last of all, gives the latents (1, z, t, h, w), fp32, on the CPU."""
    if sampling.steps_done < expert.until:
        _steps(stage, conditions, sampling, expert)
    return sampling.latents.cpu() if expert.until == stage.job.request.steps else None


def _steps(stage: Stage, conditions: Conditions, sampling: Sampling, expert: Expert) -> None:
    component, steps = expert.component, expert.until
    stretch, *later = (each for each in expert.stretches if sampling.steps_done < each.steps.stop)
    sampler, cache = sampling.resume(stretch.steps, stretch.caching)
    with ExitStack() as stack, stage.rest(component) as model:
        stack.callback(lambda: sampler.close())  # the one that is then in use
        start, latents = sampler.next_step, sampling.latents
        stage.forwards_left = passes_left(cache.left(start), stretch, later)
        cross, modulation = prepare(stage, model, conditions, sampler.timesteps[:steps], expert)
        name = expert.phase("denoise")
        with stage.phase(name, steps, "step", done=start) as (plan, phase):
            passes = {each.branches: plan.passes(each.branches) for each in expert.stretches}
            visits_of = {branches: len(each) for branches, each in passes.items()}
            sure, most = passes_left(cache.left(start), stretch, later, visits_of)
            with stage.stream(component.blocks, plan.stream, phase, most, sure) as stream:
                attending = self_attention_by_step(stage.plan.attention, stage.job.request.steps)
                residual = residual_of(plan, component.dtype)
                forward = Forward(
                    model, component, stream, cross, plan.chunk_tokens, phase, residual=residual
                )
                cut = cut_of(stage, latents, expert.branches)
                grid = latents.shape[2:] if cut is None else cut.grid
                rope = dit.rope_tables(model, grid, stage.device)
                picture = _on_device(conditions.condition, stage.device)
                still = model_of(stage).manifest.tokenwise
                predict = Predict(forward, cut, picture, still, passes, rope)
                begun = 0
                for step in range(start, steps):
                    if step == steps - 1:
                        stage.prefetch_after(name)
                    if step == stretch.steps.stop:
                        keep_record(stage, cache, sampler)
                        sampler.close()
                        stretch = later.pop(0)
                        sampler, cache = sampling.resume(stretch.steps, stretch.caching)
                    if cache.wants(step):
                        begun += visits_of[stretch.branches]
                        left = passes_left(cache.left(step + 1), stretch, later, visits_of)
                        stream.expect(begun + left[0])
                        scale = expert.guidance if stretch.branches == 2 else None
                        attend = attending(step)
                        prediction = predict(latents, modulation[step], scale, attend)
                        component.checkpoint.check_unchanged()
                        cache.computed(step, prediction, latents)
                    else:
                        prediction = cache.predicted(step)
                    preview = preview_of(stage, sampler, prediction, latents)
                    latents = sampling.step(sampler, cache, prediction, latents)
                    phase.advance(preview)
            stage.computed_steps = tuple(cache.computed_steps)
            keep_record(stage, cache, sampler)
            stage.keeper.settle()


def prepare(
    stage: Stage,
    model: Any,
    conditions: Conditions,
    timesteps: Tensor,
    expert: Expert,
) -> tuple[CrossStore, list[dit.StepModulation]]:
    """Return what does not change from step to step: cross-attention K/V, and the time
    embeddings."""
    component = expert.component
    with stage.phase(expert.phase("context"), len(component.cross), "block") as (plan, phase):
        nag = stage.job.request.nag_scale
        given = conditions.texts[: expert.branches if nag is None else 2]
        texts = [text.to(stage.device, component.dtype) for text in given]
        image = _on_device(conditions.image, stage.device, component.dtype)
        contexts = [dit.prepare_context(model, text, image) for text in texts]
        cross = CrossStore(stage.device, on_device=plan.cross_kv_on_device)
        with stage.stream(component.cross, plan.stream, phase, 1) as stream:
            for _, block in _counted(visits(stream, component, phase), phase):
                branches: list[dit.CrossKV] = []
                for context in contexts:
                    branches.append(dit.cross_kv(block.attn2, context, *branches[:1]))
                if nag is not None:
                    prompt, negative = branches
                    branches = [prompt.contrasted(negative, nag)]
                cross.add(branches)
        dtypes = component.dtype, residual_of(stage.plan[expert.phase("denoise")], component.dtype)
        return cross, _modulation(stage, model, conditions, timesteps, *dtypes)


def _modulation(
    stage: Stage,
    model: Any,
    conditions: Conditions,
    timesteps: Tensor,
    dtype: torch.dtype,
    residual: torch.dtype,
) -> list[dit.StepModulation]:
    """Return the time embeddings; of a model whose first latent frame is given, that frame's is
    that of no noise at every step."""
    made = dit.step_modulation(model, timesteps, dtype, residual)
    if conditions.condition is None or not model_of(stage).manifest.tokenwise:
        return made
    (still,) = dit.step_modulation(model, torch.zeros_like(timesteps[:1]), dtype, residual)
    spec = model_of(stage).manifest
    _, height, width = stage.job.request.video_shape.latent(spec.vae)
    _, rows, columns = spec.transformer.patch_size
    tokens = (height // rows) * (width // columns)
    return [replace(step, still=still, still_tokens=tokens) for step in made]


def cut_of(stage: Stage, latents: Tensor, branches: int) -> Cut | None:
    """Return the windows that ``latents`` are denoised in; None: all of them at once."""
    request = stage.job.request
    if request.windows is None:
        return None
    return Cut.of(request.windows.latent(request.grid.temporal), latents, branches)


def residual_of(plan: PhasePlan, dtype: torch.dtype) -> torch.dtype:
    """Return what the hidden states are in, as the plan of the denoising says, where ``dtype`` is
    computed in."""
    return torch.float32 if plan.residual == "fp32" else dtype


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
    residual: torch.dtype | None = None

    def __call__(
        self, model_input: Tensor, branches: range, modulation: dit.StepModulation, rope: dit.Rope
    ) -> list[Tensor]:
        """Return the predictions (1, out_channels, t, h, w), one a branch."""
        return dit.denoise_forward(
            self.model,
            visits(self.stream, self.component, self.phase),
            model_input,
            [self.cross.branch(branch) for branch in branches],
            modulation,
            rope,
            self.chunk_tokens,
            self.attend,
            self.residual,
        )

    def windows(
        self,
        inputs: Iterator[tuple[Tensor, Sequence[int]]],
        modulation: dit.StepModulation,
        rope: dit.Rope,
    ) -> Iterator[Tensor]:
        """Yield the predictions of several model inputs that share the pass, for some branches of
        each, one after another (`penstock.engine.families.wan.windowed.Visit`)."""
        hidden, branches, dtype = list[Tensor](), list[int](), self.component.dtype
        latent: Sequence[int] = ()
        for model_input, wanted in inputs:
            latent = model_input.shape[2:]
            hidden += dit.embed_branches(self.model, model_input, len(wanted), self.residual)
            branches += wanted
            del model_input
        crosses = {branch: self.cross.branch(branch) for branch in branches}
        yield from dit.through_blocks(
            self.model,
            visits(self.stream, self.component, self.phase),
            hidden,
            latent,
            [crosses[branch] for branch in branches],
            modulation,
            rope,
            self.chunk_tokens,
            self.attend,
            dtype,
        )


@dataclass(frozen=True)
class Predict:
    """The guided prediction of a step: of all latents at once, or of their windows together.

    Attributes:
        forward: the transformer.
        cut: the windows; None: all latents at once.
        picture: mask and latents of the pictures, or the first latent frame where ``still``.
        passes: the branches of a step, window by window, divided into visits; by how many a window
            has.
        rope: of the latent grid, or of a window's.
    """

    forward: Forward
    cut: Cut | None
    picture: Tensor | None
    still: bool
    passes: Mapping[int, list[range]]
    rope: dit.Rope

    def __call__(
        self,
        latents: Tensor,
        modulation: dit.StepModulation,
        guidance: float | None,
        attend: Attention = attention,
    ) -> Tensor:
        """Return (1, z, t, h, w), of latents of that shape; without ``guidance`` the prompt's
        branch.

        Args:
            attend: of the self-attention.
        """
        forward = replace(self.forward, attend=attend)
        dtype, branches = forward.component.dtype, 1 if guidance is None else 2
        guided = partial(_guided, scale=guidance)
        if self.cut is not None:
            see = partial(_window_input, latents, self.picture, dtype, self.still)
            visit = partial(forward.windows, modulation=modulation, rope=self.rope)
            cut = replace(self.cut, branches=branches)
            return cut.predict(latents, see, self.passes[branches], visit, guided)
        model_input = _model_input(latents, self.picture, dtype, self.still)
        predictions = [
            prediction
            for visited in self.passes[branches]
            for prediction in forward(model_input, visited, modulation, self.rope)
        ]
        del model_input
        return guided(predictions)


def _on_device(
    tensor: Tensor | None, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor | None:
    return None if tensor is None else tensor.to(device, dtype)


def _model_input(
    latents: Tensor, condition: Tensor | None, dtype: torch.dtype, still: bool
) -> Tensor:
    """Return the model's input. ``still``: the condition is the first latent frame; else it comes
    in beside the latents."""
    if condition is None:
        return latents.to(dtype)
    if still:
        return with_first(latents.to(dtype, copy=True), condition)
    return torch.cat([latents, condition], dim=1).to(dtype)


def _window_input(
    latents: Tensor, condition: Tensor | None, dtype: torch.dtype, still: bool, part: slice
) -> Tensor:
    """Return `_model_input` of a window: every one sees the picture as its first frame."""
    known = condition if condition is None or still else seen(condition, part)
    return _model_input(latents[:, :, part], known, dtype, still)


def with_first(latents: Tensor, first: Tensor) -> Tensor:
    """Return ``latents`` with the first frame replaced, in place."""
    latents[:, :, :1] = first
    return latents


def _guided(predictions: list[Tensor], scale: float | None) -> Tensor:
    if scale is None:
        return predictions[0]
    conditional, unconditional = predictions
    return guide(conditional, unconditional, scale)


def decode(stage: Stage, latents: Tensor) -> Tensor:
    """Decode the latents to the video, uint8 (frames, h, w, 3) in RAM."""
    component, request = model_of(stage).vae_decoder, stage.job.request
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


def drawn(stage: Stage) -> Products:
    """Return what the encoders would have given, drawn instead: the transformer's work is the
    same."""
    spec, request = model_of(stage).manifest, stage.job.request
    draw = torch.Generator().manual_seed(0)
    shape = request.video_shape.latent(spec.vae)
    dtype = model_of(stage).transformer.dtype

    def states(tokens: int, width: int) -> Tensor:
        return torch.randn(1, tokens, width, generator=draw).to(dtype)

    texts = [
        states(TEXT_TOKENS, spec.transformer.text_dim) for _ in range(workload_of(request).texts)
    ]
    channels = spec.transformer.in_channels - spec.transformer.out_channels
    if spec.tokenwise and request.pictures:
        channels, shape = spec.vae.z_dim, (1, *shape[1:])
    return {
        "texts": texts,
        "image": None if spec.image is None else states(spec.image_tokens, spec.image.hidden_size),
        "condition": torch.randn(1, channels, *shape, generator=draw) if channels else None,
    }


WORK = Work(
    phases={
        "text": _text,
        "image": _image,
        "encode": _encode,
        "denoise": _denoise,
        "denoise 2": _denoise_second,
        "decode": _decode,
    },
    saves=(
        SavePoint(
            "denoise",
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
