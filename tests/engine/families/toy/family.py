"""The smallest family: a prompt's bytes and noise become a video, by blocks that stream.

It is what a new family has to bring, in one file: its networks as files hold them, what the planner
knows of them, its phases and how they run. The registry names it, nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.engine.family.layers import Embedding, Linear, RMSNorm
from penstock.engine.family.naming import Naming, ShapesOf
from penstock.engine.family.protocol import ComponentKind
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import ModelSource
from penstock.engine.lora.place import PlacedLoras
from penstock.engine.model.component import Component, component_of
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.grid import Grid
from penstock.engine.request.levels import noise_levels, timesteps
from penstock.engine.run.keeper import Conditions
from penstock.engine.run.pipeline import Products, SavePoint, Work
from penstock.engine.run.sampling import Sampling
from penstock.engine.run.stage import Stage, visits
from penstock.errors import CheckpointError, RequestError
from penstock.profiles.caching import STATE_TENSORS, Caching
from penstock.profiles.manifest import Heads, Pictures, Prefetch, Storage, VideoShape, Weights
from penstock.profiles.phases import (
    OBJECTS,
    RESTORED,
    Case,
    Group,
    Mux,
    Noise,
    Step,
    best_of,
    loading_s,
)
from penstock.profiles.plan import Items, PhasePlan
from penstock.profiles.policy import Limits
from penstock.profiles.streams import (
    Network,
    Pace,
    Stream,
    best_stream,
    least_streams,
    staging_bytes,
)
from penstock.quant.paths import Computing

NAME, PIPELINE = "toy", "ToyPipeline"
FACTOR, ITEM = 8, 4
GRID = Grid(side=FACTOR, temporal=1, rest=0, fewest=1, most=64, positions=256, coherent=64)
SCHEDULER: Mapping[str, Any] = MappingProxyType({
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
})  # fmt: skip
IMAGE_PROCESSOR: Mapping[str, Any] = MappingProxyType({})

# Its networks


def _transformer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, channels = config["width"], config["inner"], config["channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_in.weight": (width, channels), "patch_in.bias": (width,),
    }  # fmt: skip
    for index in range(config["layers"]):
        block = {
            "norm.weight": (width,),
            "up.weight": (inner, width),
            "down.weight": (width, inner),
        }
        shapes |= {f"loom.{index}.{name}": shape for name, shape in block.items()}
    return shapes | {"patch_out.weight": (channels, width), "patch_out.bias": (channels,)}


def _derived(shapes: ShapesOf) -> dict[str, Any]:
    width, channels = shapes.of("patch_in.weight", 2)
    inner = shapes.of("loom.0.up.weight", 2)[0]
    return {"width": width, "channels": channels, "inner": inner, "layers": shapes.count("loom.")}


TRANSFORMER = ComponentKind(
    name="transformer",
    made_by=("diffusers", "ToyLoomModel"),
    namings=(Naming("transformer", "toy", ("loom.0.up.", "patch_in.")),),
    derive=_derived,
    shapes=_transformer_shapes,
    title=lambda config: "Toy",
    defaults={},
    blocks="loom.",
    count=lambda config: int(config["layers"]),
    is_packed=True,
)
TEXT = ComponentKind(
    name="text_encoder",
    made_by=("transformers", "ToyWords"),
    namings=(Naming("text_encoder", "toy", ("words.",)),),
    derive=lambda shapes: {"width": shapes.of("words.weight", 2)[1]},
    shapes=lambda config: {"words.weight": (256, config["width"])},
    title=lambda config: "Toy's words",
    defaults={},
)
VAE = ComponentKind(
    name="vae",
    made_by=("diffusers", "ToyPixels"),
    namings=(Naming("vae", "toy", ("pixels.",)),),
    derive=lambda shapes: {"channels": shapes.of("pixels.weight", 2)[1]},
    shapes=lambda config: {
        "pixels.weight": (3 * FACTOR**2, config["channels"]), "pixels.bias": (3 * FACTOR**2,),
    },
    title=lambda config: "Toy's pixels",
    defaults={},
)  # fmt: skip
KINDS: Mapping[str, ComponentKind] = MappingProxyType(
    {kind.name: kind for kind in (TRANSFORMER, TEXT, VAE)}
)


class Block(nn.Module):
    """A feed-forward layer beside its input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.up, self.down = Linear(width, inner, bias=False), Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """(n, width) to the same."""
        update: Tensor = self.down(F.silu(self.up(self.norm(hidden + condition))))
        return hidden + update


class ToyNetwork(nn.Module):
    """Any of the three, with one block at most."""

    def __init__(self, component: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        if component == "text_encoder":
            self.words = Embedding(256, config["width"])
        elif component == "vae":
            self.pixels = Linear(config["channels"], 3 * FACTOR**2)
        else:
            self.patch_in = Linear(config["channels"], config["width"])
            self.loom = nn.ModuleList([Block(config["width"], config["inner"])])
            self.patch_out = Linear(config["width"], config["channels"])


def build(component: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """As `penstock.engine.family.protocol.Family.build`."""
    module = ToyNetwork(component, config).eval().requires_grad_(False)
    return module, module.loom[0] if component == "transformer" else None


# What the planner knows


@dataclass(frozen=True)
class ToyManifest:
    """A model in the planner's terms."""

    transformer: Weights
    stored: Storage
    words_bytes: int
    vae_bytes: int
    width: int
    inner: int
    channels: int

    @property
    def storage(self) -> Storage:
        """Of the blocks."""
        return self.stored

    image_to_video = False
    pictures = Pictures("none")
    grid = GRID
    prefetch = Prefetch("denoise", "transformer", "", "")

    @property
    def heads(self) -> Heads:
        """It attends to nothing."""
        return Heads(1, self.width, ITEM)

    @property
    def request_defaults(self) -> Mapping[str, Any]:
        """As `penstock.engine.model.official.Official`."""
        return {
            "width": 64, "height": 32, "frames": 6, "steps": 4, "guidance_scale": 1.0,
            "sampler": "euler", "fps": 8,
        }  # fmt: skip

    def flow_shift(self, width: int, height: int, asked: float | None) -> float:
        """As `penstock.engine.model.official.Official`."""
        return float(SCHEDULER["shift"]) if asked is None else asked

    def timesteps(self, shape: VideoShape, steps: int, noise: Noise) -> tuple[float, ...]:
        """As `penstock.engine.model.official.Official`."""
        shift = self.flow_shift(shape.width, shape.height, noise.shift)
        return timesteps(noise_levels(noise.sampler, steps, shift), noise.sampler)

    def smaller_shapes(self, shape: VideoShape) -> Iterator[VideoShape]:
        """Half the frames, and so on."""
        frames = shape.frames // 2
        while frames:
            yield replace(shape, frames=frames)
            frames //= 2

    def undecided(self) -> ToyManifest:
        """As `penstock.profiles.phases.Manifest`."""
        return replace(self, stored=replace(self.stored, path=None))

    def steps(self, case: Case[ToyManifest]) -> Iterator[Step]:
        """Text, denoising, decoding, the file.

        Raises:
            RequestError: guidance was asked for.
        """
        if case.workload.guided:
            raise RequestError("Toy has no guidance", expected="1", found="more",
                               remedy="Leave --cfg out")  # fmt: skip
        shape = case.workload.shape
        latents = ("latents", latents_bytes(self, shape))
        kept = (("text states", self.width * ITEM), latents, OBJECTS)
        yield Whole("text", case, self.words_bytes, (("states", 512 * self.width * ITEM),), kept)
        yield Denoise(case, kept)
        frames = ("video frames", 3 * shape.frames * shape.width * shape.height)
        # The frames as pixels of the VAE, in another order, rounded
        pixels = (("pixels", 4 * ITEM * frames[1]), latents)
        yield Whole("decode", case, self.vae_bytes, pixels, (*kept, frames))
        yield Mux(case, shape, (latents,))


def rows_of(shape: VideoShape) -> int:
    """Latents of a channel."""
    return shape.frames * (shape.height // FACTOR) * (shape.width // FACTOR)


def latents_bytes(manifest: ToyManifest, shape: VideoShape) -> int:
    """Of a whole video, fp32."""
    return rows_of(shape) * manifest.channels * ITEM


@dataclass(frozen=True)
class Whole:
    """A phase that loads a network without blocks and uses it once."""

    name: str
    case: Case[ToyManifest]
    weights_bytes: int
    work: Items
    ram_work: Items

    @property
    def phases(self) -> tuple[str, ...]:
        """As `Step`."""
        return (self.name,)

    def best(self, limits: Limits) -> Group | None:
        """As `Step`."""
        return best_of(self.all_small(limits), limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`: there is one way."""
        room = limits.ram_bytes - sum(count for _, count in self.ram_work)
        yield (
            PhasePlan(
                self.name,
                weights=(("weights", self.weights_bytes),),
                work=self.work,
                ram_weights=(("staging", staging_bytes(self.weights_bytes, room)),),
                ram_work=self.ram_work,
                read_bytes=self.weights_bytes,
                copied_bytes=self.weights_bytes,
                seconds=loading_s(self.weights_bytes, self.case.rates),
            ),
        )


@dataclass(frozen=True)
class Denoise:
    """The steps over streamed blocks, all rows at once."""

    case: Case[ToyManifest]
    kept: Items

    @property
    def phases(self) -> tuple[str, ...]:
        """As `Step`."""
        return ("denoise",)

    @property
    def network(self) -> Network:
        """The blocks."""
        return Network.of(self.case.manifest.transformer.block_bytes)

    def best(self, limits: Limits) -> Group | None:
        """As `Step`."""
        held = sum(count for _, count in self.work)
        held += self.case.manifest.transformer.rest_bytes
        ram = sum(count for _, count in self.ram_work)
        room = limits.beside(held, ram, pins=self.case.pins)
        from_disk = self.case.policy.disk != "never"
        stream = best_stream(self.network, self.pace, self.case.rates, room, from_disk=from_disk)
        return None if stream is None else self.group(stream, limits)

    def all_small(self, limits: Limits) -> Iterator[Group]:
        """As `Step`."""
        for stream in least_streams(self.network, from_disk=self.case.policy.disk != "never"):
            yield self.group(stream, limits)

    @property
    def forwards(self) -> tuple[int, int]:
        """Passes of the job, at least and at most."""
        return self.case.policy.caching.forwards(self.case.workload.steps)

    @property
    def pace(self) -> Pace:
        """Of a pass."""
        manifest, rows = self.case.manifest, rows_of(self.case.workload.shape)
        flops = 4 * rows * manifest.width * manifest.inner * self.network.n_blocks
        return Pace(flops / self.case.rates.flops, self.forwards[1])

    @property
    def work(self) -> Items:
        """Latents and predictions, those of a step cache; hidden states and what a block makes."""
        manifest, rows = self.case.manifest, rows_of(self.case.workload.shape)
        states = STATE_TENSORS if self.case.policy.caching.kind != "off" else 0
        latents = latents_bytes(manifest, self.case.workload.shape)
        hidden = rows * (4 * manifest.width + 2 * manifest.inner) * ITEM
        return (
            ("latents", (4 + states) * latents), ("hidden states", hidden),
            *manifest.stored.items,
        )  # fmt: skip

    @property
    def ram_work(self) -> Items:
        """What lasts; of a kept job what is saved while it runs, and what is read before."""
        latents = latents_bytes(self.case.manifest, self.case.workload.shape)
        if not self.case.workload.saved:
            return self.kept
        return (*self.kept, ("saved state", 4 * latents), (RESTORED, 12 * latents + 4096))

    def group(self, stream: Stream, limits: Limits) -> Group:
        """The phase with that stream."""
        manifest, place, passes = self.case.manifest, stream.placement, self.forwards[1]
        room = limits.ram_bytes - sum(count for _, count in self.ram_work)
        rest = manifest.transformer.rest_bytes
        return (
            PhasePlan(
                "denoise",
                weights=(("non-block weights", rest), *stream.device_items),
                work=self.work,
                ram_weights=stream.host_items(room),
                ram_work=self.ram_work,
                stream=stream.plan,
                chunk_tokens=rows_of(self.case.workload.shape),
                branches=1,
                residual="fp32",
                forwards=self.forwards,
                pinned_bytes=stream.pinned_bytes if self.case.pins else 0,
                read_bytes=place.device_bytes + place.host_bytes + passes * place.read_bytes,
                copied_bytes=place.device_bytes + passes * place.copied_bytes,
                seconds=stream.timing.seconds + loading_s(rest, self.case.rates),
                bound=stream.timing.bound,
            ),
        )


# A model


class ToyModel(ModelFiles):
    """A model of this family."""

    manifest: ToyManifest

    @property
    def grid(self) -> Grid:
        """As `ModelFiles`."""
        return GRID

    def latent_shape(self, shape: VideoShape) -> tuple[int, ...]:
        """As `ModelFiles`."""
        size = (shape.height // FACTOR, shape.width // FACTOR)
        return (1, self.manifest.channels, shape.frames, *size)

    def kept_bytes(self, shape: VideoShape) -> int:
        """As `ModelFiles`: the prompt."""
        return self.manifest.width * ITEM


MODEL = ToyModel


def components(source: ModelSource, loras: PlacedLoras) -> dict[str, Component]:
    """As `penstock.engine.model.files.ModelFamily`."""
    others = {name: component_of(source.parts[name]) for name in ("text_encoder", "vae")}
    return {"transformer": streamed(source.streamed, loras), **others}


def streamed(source: ComponentSource, loras: PlacedLoras) -> Component:
    """As `penstock.engine.model.files.ModelFamily`."""
    return component_of(source, loras=loras)


def manifest(
    parts: Mapping[str, Component],
    computing: Computing,
    pipeline: Mapping[str, Any] = MappingProxyType({}),
) -> ToyManifest:
    """As `penstock.engine.model.files.ModelFamily`."""
    device, config = computing.scratch.device_type, parts["transformer"].config
    return ToyManifest(
        parts["transformer"].weights(device),
        parts["transformer"].storage(computing),
        parts["text_encoder"].weights(device).rest_bytes,
        parts["vae"].weights(device).rest_bytes,
        config["width"],
        config["inner"],
        config["channels"],
    )


# How it runs


def _text(stage: Stage, found: Products) -> None:
    def encode() -> tuple[Tensor, ...]:
        component = stage.model.parts["text_encoder"]
        with stage.phase("text", 1, "prompt") as (_, phase), stage.rest(component) as module:
            told = torch.tensor(list(stage.job.request.prompt.encode()[:512]), device=stage.device)
            state = module.words(told).mean(0, keepdim=True).cpu()
            phase.advance()
        return (state,)

    found["texts"] = stage.attempt("text", encode)


def _denoise(stage: Stage, found: Products) -> None:
    sampling = stage.attempt("denoise", lambda: Sampling(stage))
    found["latents"] = stage.attempt("denoise", lambda: _steps(stage, found["texts"], sampling))


def _steps(stage: Stage, texts: tuple[Tensor, ...], sampling: Sampling) -> Tensor:
    steps, component = stage.job.request.steps, stage.model.streamed
    if sampling.steps_done == steps:
        return sampling.latents.cpu()
    sampler, cache = sampling.resume(range(steps), Caching.of(stage.plan.step_cache))
    with closing(sampler):
        start, latents = sampler.next_step, sampling.latents
        sure, most = stage.forwards_left = cache.left(start)
        with (
            stage.rest(component) as model,
            stage.phase("denoise", steps, "step", done=start) as (plan, phase),
            stage.stream(component.blocks, plan.stream, phase, most, sure) as stream,
        ):
            forwards = 0
            for step in range(start, steps):
                if cache.wants(step):
                    forwards += 1
                    stream.expect(forwards + cache.left(step + 1)[0])
                    condition = texts[0].to(stage.device) * sampler.sigma(step)
                    hidden = model.patch_in(latents[0].flatten(1).T)
                    for _, block in visits(stream, component, phase):
                        hidden = block(hidden, condition)
                    prediction = model.patch_out(hidden).T.reshape(latents.shape)
                    component.checkpoint.check_unchanged()
                    cache.computed(step, prediction, latents)
                else:
                    prediction = cache.predicted(step)
                latents = sampling.step(sampler, cache, prediction, latents)
                phase.advance(None)
        stage.computed_steps = tuple(cache.computed_steps)
        stage.keeper.settle()
    return latents.cpu()


def _decode(stage: Stage, found: Products) -> None:
    def decode() -> Tensor:
        component, latents = stage.model.parts["vae"], found["latents"].to(stage.device)
        _, _, frames, height, width = latents.shape
        with stage.phase("decode", 1, "video") as (_, phase), stage.rest(component) as module:
            pixels = module.pixels(latents[0].flatten(1).T).sigmoid_().mul_(255)
            video = pixels.view(frames, height, width, FACTOR, FACTOR, 3).permute(0, 1, 3, 2, 4, 5)
            phase.advance()
            size = (frames, height * FACTOR, width * FACTOR, 3)
            return video.reshape(size).round_().to(torch.uint8).cpu()

    found["video"] = stage.attempt("decode", decode)


def _kept(stage: Stage) -> Products | None:
    kept = stage.keeper.conditions()
    return None if kept is None else {"texts": kept.texts}


def _finished(stage: Stage) -> Products | None:
    latents = stage.keeper.latents()
    return None if latents is None else {"latents": latents}


WORK = Work(
    phases={"text": _text, "denoise": _denoise, "decode": _decode},
    saves=(
        SavePoint(
            "denoise",
            _kept,
            lambda stage, found: stage.keeper.save_conditions(Conditions(found["texts"])),
        ),
        SavePoint(
            "decode", _finished, lambda stage, found: stage.keeper.save_latents(found["latents"])
        ),
    ),
    drawn=lambda stage: {"texts": (torch.zeros(1, stage.model.manifest.width),)},
)


def work() -> Work:
    """As `penstock.engine.run.pipeline.WorkFamily`."""
    return WORK


# The rest of the protocol


def check_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    """As `penstock.engine.family.protocol.Family`."""
    if index.get("_class_name") != PIPELINE:
        raise CheckpointError(f"{folder} is of another kind", expected=PIPELINE)


def check_together(origin: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """As `penstock.engine.family.protocol.Family`."""
    streams = configs["transformer"]
    pairs = (("text_encoder", "width"), ("vae", "channels"))
    for name, entry in pairs:
        if configs[name][entry] != streams[entry]:
            raise CheckpointError(f"the {name} of {origin} is of another model", expected=entry)


def stranger(entries: Mapping[str, Any]) -> str | None:
    """As `penstock.engine.family.protocol.Family`: there is none."""
    return None


def needed(config: Mapping[str, Any]) -> Iterator[str]:
    """As `penstock.engine.family.protocol.Family`."""
    yield from ("text_encoder", "vae")


def pipeline(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """As `penstock.engine.family.protocol.Family`."""
    return PIPELINE


def adapted_title(width: int | None, blocks: int, pictured: bool) -> str:
    """As `penstock.engine.family.protocol.Family`."""
    return "Toy"


def claims(pipe: Any) -> bool:
    """No pipeline of diffusers is one."""
    return False


def has_parts_for(model: ToyModel) -> bool:
    """It has no pipeline of diffusers."""
    return False


def samples() -> Any:
    """Nothing of its own is measured."""
    return None


def synthetics() -> Mapping[str, Any]:
    """None is made on the spot."""
    return {}


def builtins() -> Mapping[str, Callable[[str], ToyManifest]]:
    """A large one, without files."""

    def large(weight_format: str) -> ToyManifest:
        block = 2 * 4096 * 16384 * ITEM + 4096 * ITEM
        return ToyManifest(
            Weights(1 << 20, (block,) * 40, ITEM),
            Storage("fp32"),
            1 << 22,
            1 << 20,
            4096,
            16384,
            16,
        )

    return {"toy-large": large}
