"""Tables of plans for the true 14B model: profiles against measured peaks, and known cards.

``peaks``: every profile and size, with 16 and with 64 GiB of system memory: the predicted peak of
each phase beside the live bytes of the real code on fake tensors (see
`tests/profiles/test_true_model.py`), and how much the one is over the other.
``models``: what `penstock plan --synthetic` knows, at its own size and steps on two cards.
``defaults``: what each of these models fills the gaps of a request with.
``parts``: what Wan2.1 I2V 14B consists of, its parameters counted on the meta device.
``videos``: the question of the README, "Will it run on my card?": cards, models and sizes.
``windows``: what a step of 241 frames moves over what one of 81 does, on cards under 12 GB.
``cards``: ten machines and three sizes: seconds a step, total, what bounds it; as penstock runs by
default, and with products and self-attention in 8 bits.

All print JSON, of which `benchmarks.render` makes the tables of README.md and
docs/:

    python -m benchmarks.plans peaks > benchmarks/results/plans_peaks.json
    python -m benchmarks.plans cards > benchmarks/results/plans_cards.json
    python -m benchmarks.plans models > benchmarks/results/plans_models.json
    python -m benchmarks.plans defaults > benchmarks/results/plans_defaults.json
    python -m benchmarks.plans parts > benchmarks/results/plans_parts.json
    python -m benchmarks.plans videos > benchmarks/results/plans_videos.json
    python -m benchmarks.plans windows > benchmarks/results/plans_windows.json
    python -m benchmarks.render
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from penstock.cli.plan_view import clock
from penstock.engine.family.protocol import builtin_names
from penstock.engine.prepared import Prepared, machine_of
from penstock.engine.request.generation import workload_of
from penstock.engine.request.settings import Settings, resolve
from penstock.errors import OverBudget
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.plan import Plan
from penstock.profiles.tiling import TileGrid
from penstock.units import GIB
from tests.engine.families.wan.fake_vae import FakeVae
from tests.profiles import test_true_model as true

CARDS = (
    ("RTX 2060 6GB", "6gb"), ("RTX 3050 Laptop 4GB", "4gb"), ("RTX 3060 12GB", "12gb"),
    ("RTX 3070 8GB", "8gb"), ("RTX 3090 24GB", "24gb"), ("RTX 4060 Ti 16GB", "16gb"),
    ("RTX 4070 Ti 12GB", "12gb"), ("RTX 4080 16GB", "16gb"), ("RTX 4090 24GB", "24gb"),
    ("RTX 5090 32GB", "max"),
)  # fmt: skip

WAYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"default": {}, "8 bits": {"format": "int8", "compute": "fast", "attention": "int8"}}
)
"""Flags of a plan, by the name of a table."""

WINDOW_CARDS = ("RTX 3060 12GB", "RTX 4070 Ti 12GB", "RTX 5090 32GB")
WINDOW_SIZES = ("832x480", "1280x720")
WINDOW_WAYS: tuple[Mapping[str, str], ...] = ({}, {"residual": "fp32"}, {"branches": "1"})


def peaks() -> list[dict[str, Any]]:
    """One row a plan: predicted peaks, and the least and the most they are over the measured."""
    vae = FakeVae.make(torch.bfloat16)
    known: dict[Any, int] = {}
    rows = []
    for size, name, ram in true.ALL:
        plan = true.made(size, name, ram)
        ratios = [part / measured for part, measured in measured_pairs(plan, size, vae, known)]
        denoise = plan["denoise"]
        assert denoise.stream is not None
        rows.append(
            {
                "size": size,
                "profile": name,
                "system_gib": ram,
                "format": plan.weight_format,
                "vram_gib": round(plan.peak_vram_bytes / GIB, 2),
                "limit_gib": round(plan.vram_limit_bytes / GIB, 2),
                "ram_gib": round(plan.peak_ram_bytes / GIB, 2),
                "chunk": denoise.chunk_tokens,
                "branches": denoise.branches,
                "residual": plan.residual,
                "in_vram": denoise.stream.device_resident,
                "in_ram": denoise.stream.host_resident,
                "from_disk": denoise.stream.disk_blocks,
                "decode_tiles": "x".join(map(str, plan["decode"].tiles)),
                "over": [round(100 * (ratio - 1), 2) for ratio in (min(ratios), max(ratios))],
            }
        )
    return rows


def measured_pairs(
    plan: Plan, size: str, vae: FakeVae, known: dict[Any, int]
) -> list[tuple[int, int]]:
    """Predicted and measured peaks of every phase that has any VRAM (muxing has none)."""
    step = plan["denoise"]
    found = true.denoise_peaks(
        size, step.chunk_tokens, step.branches, step.cross_kv_on_device, step.residual
    )
    pairs = [
        (part.vram_bytes, peak + true.weight_bytes(part) + true.decoding_bytes(plan))
        for part, peak in zip((plan["context"], step), found, strict=True)
    ]
    for name, measured in (("text", true.text_peak), ("image", true.image_peak)):
        part = plan[name]
        pairs.append((part.vram_bytes, measured(plan.weight_format) + true.weight_bytes(part)))
    latent = VideoShape(*true.SIZES[size]).latent(true.manifest_of("bf16").vae)
    for name, measure in (("encode", vae.encode_peak), ("decode", vae.decode_peak)):
        part = plan[name]
        key = (name, latent, part.tiles)
        if key not in known:
            known[key] = measure(latent, TileGrid(*part.tiles))
        pairs.append((part.vram_bytes, known[key] + true.weight_bytes(part)))
    return pairs


def cards(known: Sequence[tuple[str, str]] = CARDS) -> list[dict[str, Any]]:
    """One row a way, card and size, of cards and their profiles."""
    return [
        {"way": way, "card": card, "profile": profile, "size": size}
        | row(size, card, Options(profile=profile, ram="32GiB", **WAYS[way]))
        for way, (card, profile), size in itertools.product(WAYS, known, true.SIZES)
    ]


MODEL_CARDS = (("RTX 4070 Ti 12GB", "12gb"), ("RTX 4090 24GB", "24gb"))


def models(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row a built-in description and card."""
    return [
        {"model": name, "card": card, "profile": profile} | model_row(name, card, profile)
        for name in names or builtin_names()
        for card, profile in MODEL_CARDS
    ]


def model_row(name: str, card: str, profile: str) -> dict[str, Any]:
    """What a plan says of a model at the size, frames and steps that it was released with."""
    options, machine = machine_of(Options(profile=profile, ram="32GiB"), card, None)
    prepared = Prepared.open(synthetic=name, options=options, machine=machine)
    request = resolve(Settings(prompt="a plan"), prepared.about)
    plan = prepared.plan(workload_of(request, saved=True))
    steps = [phase for phase in plan.phases if phase.name.startswith("denoise")]
    return {
        "size": f"{request.height}x{request.width}x{request.frames}",
        "steps": request.steps,
        "format": plan.weight_format,
        "seconds_a_step": round(sum(phase.seconds for phase in steps) / request.steps, 1),
        "total": clock(plan.seconds),
        "vram_gib": round(plan.peak_vram_bytes / GIB, 2),
        "ram_gib": round(plan.peak_ram_bytes / GIB, 2),
    }


def row(size: str, card: str, options: Options) -> dict[str, Any]:
    """What a plan says; for a video that does not fit, how much VRAM it takes at the least."""
    width, height, frames = true.SIZES[size]
    settings = Settings(prompt="a plan", size=f"{width}x{height}", frames=frames)
    options, machine = machine_of(options, card, None)
    prepared = Prepared.open(synthetic="wan2.1-i2v-14b", options=options, machine=machine)
    try:
        plan = prepared.plan(workload_of(resolve(settings, prepared.about), saved=True))
    except OverBudget as error:
        return {"needs_gib": round(error.need_bytes / GIB, 2)}
    denoise = plan["denoise"]
    return {
        "format": plan.weight_format,
        "seconds_a_step": round(denoise.seconds / 40, 1),
        "total": clock(plan.seconds),
        "bound": denoise.bound,
        "vram_gib": round(plan.peak_vram_bytes / GIB, 2),
    }


UMT5_XXL: Mapping[str, Any] = MappingProxyType(
    {"vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
     "num_heads": 64, "feed_forward_proj": "gated-gelu"}
)  # fmt: skip
VIT_H: Mapping[str, Any] = MappingProxyType(
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
     "num_attention_heads": 16, "image_size": 224, "patch_size": 14}
)  # fmt: skip
"""The encoders of Wan2.1, from the configs of its repository."""


VIDEO_CARDS = (
    ("RTX 3050 Laptop 4GB", "4gb", "16GiB"), ("RTX 2060 6GB", "6gb", "16GiB"),
    ("RTX 4060 8GB", "8gb", "16GiB"), ("RTX 3060 12GB", "12gb", "16GiB"),
    ("RTX 4070 12GB", "12gb", "32GiB"), ("RTX 4060 Ti 16GB", "16gb", "32GiB"),
    ("RTX 4090 24GB", "24gb", "64GiB"), ("RTX 5090 32GB", "max", "64GiB"),
)  # fmt: skip
"""Cards as people have them: name, profile, system RAM."""


VIDEOS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("wan2.1-i2v-14b", "480p, 4 steps", {"size": "832x480", "distilled": True}),
    ("wan2.1-i2v-14b", "480p, 40 steps", {"size": "832x480", "steps": 40}),
    ("wan2.1-i2v-14b", "720p, 40 steps", {"size": "1280x720", "steps": 40}),
    ("wan2.2-i2v-a14b", "480p, 4 steps", {"size": "832x480", "distilled": True}),
    ("wan2.2-i2v-a14b", "480p, 40 steps", {"size": "832x480", "steps": 40}),
    ("wan2.2-i2v-a14b", "720p, 40 steps", {"size": "1280x720", "steps": 40}),
    ("minimax-h3", "480p, 20 steps", {"size": "864x480", "steps": 20}),
    ("minimax-h3", "768p, 40 steps", {"size": "1344x768", "steps": 40}),
)
"""Models and videos of the README's table; five seconds each."""


def videos(
    cards: Sequence[tuple[str, str, str]] = VIDEO_CARDS,
    asked: Sequence[tuple[str, str, Mapping[str, Any]]] = VIDEOS,
) -> list[dict[str, Any]]:
    """One row a card, model and video."""
    return [
        {"card": card, "profile": profile, "ram": ram, "model": model, "video": video}
        | video_row(Options(profile=profile, ram=ram), card, model, settings)
        for card, profile, ram in cards
        for model, video, settings in asked
    ]


def video_row(
    options: Options, card: str, model: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a plan says of a video; where it does not fit, what it takes at the least."""
    options, machine = machine_of(options, card, None)
    prepared = Prepared.open(synthetic=model, options=options, machine=machine)
    request = resolve(Settings(prompt="a plan", **settings), prepared.about)
    try:
        plan = prepared.plan(workload_of(request, saved=True))
    except OverBudget as error:
        return {"needs": error.resource, "needs_gib": round(error.need_bytes / GIB, 1)}
    return {
        "format": plan.weight_format,
        "minutes": round(plan.seconds / 60, 1),
        "vram_gib": round(plan.peak_vram_bytes / GIB, 1),
        "ram_gib": round(plan.peak_ram_bytes / GIB, 1),
    }


def windows(cards: Sequence[str] = WINDOW_CARDS) -> list[dict[str, Any]]:
    """A row a card, size and way: one window alone, as many as 241 frames take, and these with the
    hidden states in fp32, or one branch of one window at a time."""
    return [
        {"card": card, "size": size, **window_row(card, size, frames, flags)}
        for card in cards
        for size in WINDOW_SIZES
        for frames, flags in ((81, {}), *((241, flags) for flags in WINDOW_WAYS))
    ]


def window_row(card: str, size: str, frames: int, flags: Mapping[str, str]) -> dict[str, Any]:
    """What a plan says of the denoising."""
    options, machine = machine_of(Options(profile="12gb", ram="64GiB", **flags), card, None)
    prepared = Prepared.open(synthetic="wan2.1-i2v-14b", options=options, machine=machine)
    settings = Settings(prompt="a plan", size=size, frames=frames, steps=40)
    found = prepared.plan(workload_of(resolve(settings, prepared.about), saved=True))
    denoise = found["denoise"]
    assert denoise.stream is not None
    return {
        "frames": frames,
        "flags": " ".join(f"--{name} {value}" for name, value in flags.items()),
        "format": found.weight_format,
        "residual": denoise.residual,
        "chunk": denoise.chunk_tokens,
        "branches": denoise.branches,
        "of_branches": 2 * denoise.windows,
        "in_vram": denoise.stream.device_resident,
        "gb_a_step": round(denoise.copied_bytes / 40 / 1e9, 3),
        "seconds_a_step": round(denoise.seconds / 40, 1),
    }


def defaults(names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row a built-in description: what a request that says nothing but its prompt becomes."""
    options, machine = machine_of(Options(profile="12gb", ram="32GiB"), MODEL_CARDS[0][0], None)
    return [
        {"model": name}
        | default_row(Prepared.open(synthetic=name, options=options, machine=machine))
        for name in names or builtin_names()
    ]


def default_row(prepared: Prepared) -> dict[str, Any]:
    """Size, frames, steps, guidance and shift of one, and what its sizes and frames may be."""
    about = prepared.about
    request, grid = resolve(Settings(prompt="a plan"), about), about.grid
    return {
        "width": request.width,
        "height": request.height,
        "side": grid.side,
        "frames": request.frames,
        "frames_at_most": grid.most,
        "frames_by": [grid.temporal, grid.rest],
        "fps": request.fps,
        "steps": request.steps,
        "guidance": sorted(set(request.guidance_scales)),
        "shift": request.shift,
        "shift_at_480p": about.official.flow_shift(832, 480, None),
    }


def parts() -> list[dict[str, Any]]:
    """One row a network of Wan2.1 I2V 14B, as its published configs say."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    from benchmarks.fake_dit import I2V_14B

    with torch.device("meta"):
        networks = {
            "transformer": WanTransformer3DModel(**I2V_14B),
            "text encoder (UMT5-XXL)": UMT5EncoderModel(UMT5Config(**UMT5_XXL)),
            "image encoder (CLIP ViT-H; I2V only)": CLIPVisionModel(CLIPVisionConfig(**VIT_H)),
            "VAE": AutoencoderKLWan(),
        }
    return [
        {"part": name, "parameters": sum(each.numel() for each in network.parameters())}
        for name, network in networks.items()
    ]


_MADE: Mapping[str, Callable[[], list[dict[str, Any]]]] = MappingProxyType(
    {
        "peaks": peaks,
        "cards": cards,
        "models": models,
        "defaults": defaults,
        "parts": parts,
        "videos": videos,
        "windows": windows,
    }
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("which", choices=list(_MADE))
    print(json.dumps(_MADE[arguments.parse_args().which]()))


if __name__ == "__main__":
    main()
