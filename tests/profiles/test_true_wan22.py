"""Wan2.2 at its true shapes, without weights: each profile's plan at 720p against fake-tensor runs,
as `tests.profiles.test_true_model` does it for Wan2.1. The whole sweep is in `make faults`.

Of the chunks of a forward, which may be thousands, those are left out that repeat the ones before
them: they are computed in place and leave nothing behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.families.wan import forward
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.families.wan.structure import is_cross_kv
from penstock.engine.family.protocol import builtin
from penstock.errors import OverBudget
from penstock.profiles import profile as profiles
from penstock.profiles.cards import described
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.plan import PhasePlan, Plan
from penstock.profiles.planner import Workload, plan
from penstock.profiles.tiling import TileGrid
from penstock.units import GIB
from tests.engine.families.wan.fake_vae import FakeVae
from tests.engine.families.wan.test_structure import VAE_48
from tests.meter import StorageMeter
from tests.profiles.test_true_model import (
    CARD,
    PROFILES,
    SYSTEMS,
    fused_rms_norm,
    hold,
    run_bytes,
    weight_bytes,
)

A14B = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128,
    "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "wan2.2-t2v-a14b": A14B,
    "wan2.2-i2v-a14b": A14B | {"in_channels": 36},
    "wan2.2-ti2v-5b": A14B
    | {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336},
}
SHAPES = {"wan2.2-ti2v-5b": (1280, 704, 121)}
"""Others are 1280 x 720, 81 frames."""


def manifest_of(name: str, weight_format: str = "bf16") -> WanManifest:
    return builtin(name, weight_format)


def shape_of(name: str) -> VideoShape:
    return VideoShape(*SHAPES.get(name, (1280, 720, 81)))


@functools.cache
def made(name: str, profile: str, system_gib: int) -> Plan | None:
    """The plan of the first format of the profile that fits; None: none does."""
    machine = described(CARD, f"{system_gib}GiB", None)
    chosen = profiles.choose(profiles.load(profile), Options(), machine)
    pictures = 0 if name == "wan2.2-t2v-a14b" else 1
    workload = Workload(shape_of(name), steps=40, guided=True, saved=True, pictures=pictures)
    for weight_format in chosen.formats:
        try:
            return plan(
                manifest_of(name, weight_format), workload, chosen.hardware, chosen.policy,
                pinned_bytes=chosen.pinned_bytes,
            )  # fmt: skip
        except OverBudget:
            continue
    return None


ALL = [(name, profile, ram) for name in CONFIGS for profile in PROFILES for ram in SYSTEMS]


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_weights_are_those_of_the_classes(name: str) -> None:
    config, spec = CONFIGS[name], manifest_of(name).transformer
    with init_empty_weights():
        weights = WanTransformer3DModel(**config, num_layers=1).state_dict()
    block = {n[len("blocks.0.") :]: t for n, t in weights.items() if n.startswith("blocks.")}
    rest = run_bytes((t for n, t in weights.items() if not n.startswith("blocks.")), 2)
    assert spec.weights.rest_bytes == rest
    streamed = run_bytes((t for n, t in block.items() if not is_cross_kv(n)), 2)
    assert spec.weights.block_bytes == (streamed,) * spec.num_layers
    cross = run_bytes((t for n, t in block.items() if is_cross_kv(n)), 2)
    assert spec.cross_block_bytes == (cross,) * spec.num_layers


def test_bytes_of_the_vae_are_those_of_the_class() -> None:
    with init_empty_weights():
        weights = AutoencoderKLWan(**VAE_48).state_dict()
    spec = manifest_of("wan2.2-ti2v-5b").vae
    encoder = [t for n, t in weights.items() if n.startswith(("encoder.", "quant_conv."))]
    decoder = [t for n, t in weights.items() if n.startswith(("decoder.", "post_quant_conv."))]
    assert len(encoder) + len(decoder) == len(weights)
    assert spec.encoder.rest_bytes == run_bytes(encoder, 2)
    assert spec.decoder.rest_bytes == run_bytes(decoder, 2)


@pytest.mark.parametrize(("name", "profile", "ram"), ALL)
def test_a_plan_is_within_its_profile(name: str, profile: str, ram: int) -> None:
    found, limit_bytes = made(name, profile, ram), profiles.load(profile).vram_bytes
    assert found is not None and limit_bytes is not None
    assert found.peak_vram_bytes <= limit_bytes <= int(profile[:-2]) * GIB
    assert found.peak_ram_bytes <= found.ram_limit_bytes < ram * GIB
    names = [phase.name for phase in found.phases]
    assert ("denoise 2" in names) == ("a14b" in name)


every_chunk = forward._chunks


def few_chunks(tokens: int, chunk_tokens: int, cut: int = 0) -> Iterator[slice]:
    """Of the chunks on each side of ``cut`` the first two and the last."""
    parts = list(every_chunk(tokens, chunk_tokens, cut))
    for side in ([p for p in parts if p.stop <= cut], [p for p in parts if p.start >= cut]):
        yield from (*side[:2], *side[2:][-1:])


@functools.cache
def denoise_peaks(
    name: str, chunk: int, visit: int, on_device: bool, second: bool, residual: str, steps: int,
    chunks: Callable[..., Iterator[slice]] = few_chunks,
) -> tuple[int, int]:  # fmt: skip
    """Live bytes besides weights of the context and of a step, one block standing for all."""
    config, spec = CONFIGS[name], manifest_of(name).transformer
    latent = shape_of(name).latent(manifest_of(name).vae)
    still = name == "wan2.2-ti2v-5b"
    wide = torch.float32 if residual == "fp32" else torch.bfloat16
    fused = mock.patch("torch.nn.functional.rms_norm", fused_rms_norm)
    cut = mock.patch.object(forward, "_chunks", chunks)
    with FakeTensorMode(), torch.no_grad(), fused, cut:
        model = WanTransformer3DModel(**config, num_layers=1).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        text = torch.empty(1, 512, config["text_dim"], dtype=torch.bfloat16)
        out = config["out_channels"]
        with StorageMeter([*model.parameters(), *model.buffers()]) as meter:
            held = [torch.empty(1, out, *latent) for _ in range(4)] if second else []
            extra = config["in_channels"] - out
            if second and extra:
                held.append(torch.empty(1, extra, *latent))
            texts = [text.clone(), text.clone()]
            contexts = [forward.prepare_context(model, states, None) for states in texts]
            kept = [
                [forward.cross_kv(model.blocks[0].attn2, each) for each in contexts]
                for _ in range(spec.num_layers if on_device else 1)
            ]
            rows = forward.step_modulation(model, torch.arange(steps + still), torch.bfloat16, wide)
            context, meter.peak = meter.peak, 0
            del contexts, texts, held
            if not on_device:
                pair = kept[0][0]
                kept = [[forward.CrossKV(pair.k.clone(), pair.v.clone())]]
                del pair
                meter.peak = meter.live
            state = [torch.empty(1, out, *latent) for _ in range(4)]
            rope = forward.rope_tables(model, latent, text.device)
            step, meter.peak = rows[0], meter.live
            if still:
                tokens = latent[1] * latent[2] // 4
                given = torch.empty(1, out, 1, *latent[1:])
                step = forward.StepModulation(step.temb, step.projection, rows[-1], tokens)
                model_input = state[0].to(torch.bfloat16, copy=True)
                model_input[:, :, :1] = given
            elif extra:
                condition = torch.empty(1, extra, *latent)
                model_input = torch.cat([state[0], condition], dim=1).to(torch.bfloat16)
            else:
                model_input = state[0].to(torch.bfloat16)
            results: list[Tensor] = []
            for _ in range(0, 2, visit):
                crosses = [[kept[0][min(b, len(kept[0]) - 1)]] for b in range(visit)]
                results += forward.denoise_forward(
                    model, enumerate(model.blocks), model_input, crosses, step, rope, chunk,
                    residual=wide,
                )  # fmt: skip
            return context, meter.peak


def _steps(name: str, second: bool) -> int:
    """Of 40 those of the one transformer."""
    if "a14b" not in name:
        return 40
    work = Workload(shape_of(name), steps=40, guided=True)
    return manifest_of(name).split(work)[second]


def _hold_denoise(name: str, part: PhasePlan, found: Plan) -> None:
    second = part.name.endswith("2")
    stored = manifest_of(name, found.weight_format).transformer.storage
    decoding = stored.scratch_bytes + stored.workspace_bytes
    context, step = denoise_peaks(
        name, part.chunk_tokens, part.branches, part.cross_kv_on_device, second, part.residual,
        _steps(name, second),
    )  # fmt: skip
    hold(part.vram_bytes, step + weight_bytes(part) + decoding)
    before = found["context 2" if second else "context"]
    actual = context + weight_bytes(before) + decoding
    assert before.vram_bytes <= 1.05 * actual


def test_one_plan_of_each_model_holds() -> None:
    for name in CONFIGS:
        found = made(name, "12gb", 16)
        assert found is not None
        _hold_denoise(name, found["denoise"], found)


def test_chunks_that_repeat_change_no_peak() -> None:
    case = ("wan2.2-ti2v-5b", 4096, 1, False, False, "fp32", 5)
    assert denoise_peaks(*case) == denoise_peaks(*case, chunks=every_chunk)


@pytest.mark.faults
@pytest.mark.parametrize(("name", "profile", "ram"), ALL)
def test_context_and_denoise(name: str, profile: str, ram: int) -> None:
    found = made(name, profile, ram)
    assert found is not None
    for part in found.phases:
        if part.name.startswith("denoise"):
            _hold_denoise(name, part, found)


@functools.cache
def fake_vae() -> FakeVae:
    return FakeVae.make(torch.bfloat16, **VAE_48)


@functools.cache
def vae_peak(name: str, phase: str, tiles: tuple[int, ...]) -> int:
    """Live bytes besides weights: of encoding a picture, or of decoding all."""
    latent = shape_of(name).latent(manifest_of(name).vae)
    if phase == "decode":
        return fake_vae().decode_peak(latent, TileGrid(*tiles))
    return fake_vae().encode_peak((1, *latent[1:]), TileGrid(*tiles))


def _hold_vae(name: str, part: PhasePlan) -> None:
    hold(part.vram_bytes, vae_peak(name, part.name, part.tiles) + weight_bytes(part))


def test_encoding_the_picture_of_5b_holds() -> None:
    found = made("wan2.2-ti2v-5b", "24gb", 16)
    assert found is not None
    _hold_vae("wan2.2-ti2v-5b", found["encode"])


@pytest.mark.faults
@pytest.mark.parametrize(("name", "profile", "ram"), [case for case in ALL if "5b" in case[0]])
def test_the_vae_of_5b(name: str, profile: str, ram: int) -> None:
    found = made(name, profile, ram)
    assert found is not None
    for phase in ("encode", "decode"):
        _hold_vae(name, found[phase])
