"""The true 14B model, without weights: each profile's plan against fake-tensor runs of its shapes.

What a plan predicts for a phase is the bytes of weights plus the bytes of everything else. The
first are compared with the classes of diffusers and transformers, the second with the live storages
of the real code on fake tensors, with the plan's own chunks, branches and tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_dit import I2V_14B, fake_inputs, fake_transformer
from penstock.engine.families.wan import forward
from penstock.engine.families.wan.manifest import WanManifest
from penstock.engine.families.wan.structure import is_cross_kv
from penstock.engine.family.protocol import builtin
from penstock.errors import OverBudget
from penstock.profiles import profile as profiles
from penstock.profiles.cards import described
from penstock.profiles.manifest import VideoShape
from penstock.profiles.options import Options
from penstock.profiles.phases import HOLES, LIBRARIES
from penstock.profiles.plan import PhasePlan, Plan
from penstock.profiles.planner import Workload, plan
from penstock.profiles.tiling import TileGrid
from penstock.units import GIB, align_up
from tests.engine.families.wan.cost.fake_encoders import measured_image_bytes, measured_text_bytes
from tests.engine.families.wan.fake_vae import FakeVae
from tests.meter import StorageMeter

MODEL = "wan2.1-i2v-14b"
SIZES = {"720x1280x81": (1280, 720, 81), "528x960x77": (960, 528, 77), "480x832x81": (832, 480, 81)}
PROFILES = ("4gb", "6gb", "8gb", "12gb", "16gb", "24gb")
SYSTEMS = (16, 64)
CARD = "RTX 5090 32GB"  # whose memory no profile passes


def manifest_of(weight_format: str) -> WanManifest:
    return builtin(MODEL, weight_format)


@functools.cache
def made(size: str, name: str, system_gib: int) -> Plan:
    """The plan of the first format of the profile that fits."""
    machine = described(CARD, f"{system_gib}GiB", None)
    assert machine.fused_norms
    chosen = profiles.choose(profiles.load(name), Options(), machine)
    workload = Workload(VideoShape(*SIZES[size]), steps=40, guided=True, saved=True)
    refused = []
    for weight_format in chosen.formats:
        try:
            return plan(
                manifest_of(weight_format),
                workload,
                chosen.hardware,
                chosen.policy,
                pinned_bytes=chosen.pinned_bytes,
            )
        except OverBudget as error:
            refused.append(error)
    raise refused[-1]


ALL = [(size, name, ram) for size in SIZES for name in PROFILES for ram in SYSTEMS]


def run_bytes(tensors: Iterable[Tensor], itemsize: int) -> int:
    """One aligned run of tensors in a compute dtype."""
    return align_up(sum(align_up(t.numel() * itemsize, 64) for t in tensors), 4096)


class TestBytesOfWeights:
    def test_of_the_transformer(self) -> None:
        with FakeTensorMode():
            weights = dict(fake_transformer(blocks=1).named_parameters())
        block = {n[len("blocks.0.") :]: t for n, t in weights.items() if n.startswith("blocks.")}
        spec = manifest_of("bf16").transformer
        rest = run_bytes((t for n, t in weights.items() if not n.startswith("blocks.")), 2)
        assert spec.weights.rest_bytes == rest
        cross = [t for n, t in block.items() if is_cross_kv(n)]
        assert spec.cross_block_bytes == (run_bytes(cross, 2),) * I2V_14B["num_layers"]
        streamed = [t for n, t in block.items() if not is_cross_kv(n)]
        assert spec.weights.block_bytes == (run_bytes(streamed, 2),) * I2V_14B["num_layers"]

    def test_of_the_vae(self) -> None:
        with init_empty_weights():
            weights = AutoencoderKLWan().state_dict()
        spec = manifest_of("bf16").vae
        encoder = [t for n, t in weights.items() if n.startswith(("encoder.", "quant_conv."))]
        decoder = [t for n, t in weights.items() if n.startswith(("decoder.", "post_quant_conv."))]
        assert len(encoder) + len(decoder) == len(weights)
        assert spec.encoder.rest_bytes == run_bytes(encoder, 2)
        assert spec.decoder.rest_bytes == run_bytes(decoder, 2)

    def test_of_the_text_encoder(self) -> None:
        from transformers import UMT5Config, UMT5EncoderModel

        spec = manifest_of("bf16").text
        config = UMT5Config(
            d_model=spec.d_model, d_kv=spec.d_kv, d_ff=spec.d_ff, num_heads=spec.num_heads,
            num_layers=1, vocab_size=8,
        )  # fmt: skip
        with init_empty_weights():
            encoder = UMT5EncoderModel(config).encoder
        block = run_bytes(encoder.block[0].state_dict().values(), 2)
        assert spec.weights.block_bytes == (block,) * spec.num_layers
        assert spec.weights.rest_bytes == run_bytes([encoder.final_layer_norm.weight], 2)

    def test_of_the_image_encoder(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        spec = manifest_of("bf16").image
        assert spec is not None
        config = CLIPVisionConfig(
            hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
            num_attention_heads=spec.num_attention_heads, image_size=spec.image_size,
            patch_size=spec.patch_size, num_hidden_layers=1,
        )  # fmt: skip
        with init_empty_weights():
            weights = CLIPVisionModel(config).state_dict()
        layer = [t for n, t in weights.items() if ".layers.0." in n]
        rest = [t for n, t in weights.items() if ".layers." not in n]
        assert spec.weights.block_bytes == (run_bytes(layer, 2),) * spec.num_hidden_layers
        assert spec.weights.rest_bytes == run_bytes(rest, 2)


@pytest.mark.parametrize(("size", "name", "ram"), ALL)
def test_there_is_a_plan_within_the_profile(size: str, name: str, ram: int) -> None:
    found, limit_bytes = made(size, name, ram), profiles.load(name).vram_bytes
    assert limit_bytes is not None
    assert found.peak_vram_bytes <= limit_bytes <= int(name[:-2]) * GIB
    assert found.peak_ram_bytes <= found.ram_limit_bytes < ram * GIB
    assert [phase.name for phase in found.phases] == [
        "text", "image", "encode", "context", "denoise", "decode", "mux",
    ]  # fmt: skip


def sweep(*few: tuple[str, str, int]) -> Any:
    """Each plan there is, but for a ``few`` in `make faults` alone; what two of them share is
    measured once."""
    rest = [pytest.param(*case, marks=pytest.mark.faults) for case in ALL if case not in few]
    return pytest.mark.parametrize(("size", "name", "ram"), [*few, *rest])


def hold(predicted: int, actual: int) -> None:
    assert actual <= predicted <= 1.05 * actual, (predicted, actual, predicted / actual)


def weight_bytes(part: PhasePlan) -> int:
    """Weights, and what a GPU's libraries and allocator take, which no fake tensor shows."""
    work = dict(part.work)
    return part.vram_bytes - part.work_bytes + work[LIBRARIES] + work.get(HOLES, 0)


def fused_rms_norm(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """What CUDA's kernel makes since torch 2.9: the result. On fake tensors torch composes it."""
    return torch.empty_like(x)


def decoding_bytes(found: Plan) -> int:
    """Buffers for quantised matrices: allocated as such, not an activation."""
    stored = manifest_of(found.weight_format).transformer.storage
    return stored.scratch_bytes + stored.workspace_bytes


@functools.cache
def fake_vae() -> FakeVae:
    return FakeVae.make(torch.bfloat16)


@functools.cache
def vae_peak(size: str, phase: str, tiles: tuple[int, ...]) -> int:
    """Live bytes besides weights of encoding or decoding the whole video by such tiles."""
    latent = VideoShape(*SIZES[size]).latent(manifest_of("bf16").vae)
    run = {"encode": fake_vae().encode_peak, "decode": fake_vae().decode_peak}[phase]
    return run(latent, TileGrid(*tiles))


@functools.cache
def denoise_peaks(
    size: str, chunk: int, visit: int, on_device: bool, residual: str
) -> tuple[int, int]:
    """Live bytes besides weights of the context and of a step, one block standing for forty."""
    latent = VideoShape(*SIZES[size]).latent(manifest_of("bf16").vae)
    fused = mock.patch("torch.nn.functional.rms_norm", fused_rms_norm)
    with FakeTensorMode(), torch.no_grad(), fused:
        model = fake_transformer(blocks=1)
        given, text, image = fake_inputs(latent)
        with StorageMeter([*model.parameters(), *model.buffers()]) as meter:
            texts, picture = [text.clone(), text.clone()], image.clone()
            contexts = [forward.prepare_context(model, states, picture) for states in texts]
            kept = [_cross(model, contexts) for _ in range(40 if on_device else 1)]
            wide = torch.float32 if residual == "fp32" else torch.bfloat16
            steps = forward.step_modulation(model, torch.arange(40), torch.bfloat16, wide)
            context, meter.peak = meter.peak, 0
            del contexts, texts, picture
            if not on_device:
                one = [[_copied(pair) for pair in kept[0][:1]]]
                kept = one
                meter.peak = meter.live
            state = [torch.empty(1, 16, *latent) for _ in range(4)]
            condition = torch.empty(1, 20, *latent)
            rope = forward.rope_tables(model, latent, given.device)
            meter.peak = meter.live
            model_input = torch.cat([state[0], condition], dim=1).to(torch.bfloat16)
            results: list[Tensor] = []
            for first in range(0, 2, visit):
                crosses = [[kept[0][min(first + b, len(kept[0]) - 1)]] for b in range(visit)]
                results += forward.denoise_forward(
                    model, enumerate(model.blocks), model_input, crosses, steps[0], rope, chunk,
                    residual=wide,
                )  # fmt: skip
            return context, meter.peak


def _cross(model: Any, contexts: list[forward.Context]) -> list[forward.CrossKV]:
    first = forward.cross_kv(model.blocks[0].attn2, contexts[0])
    return [first, *(forward.cross_kv(model.blocks[0].attn2, c, first) for c in contexts[1:])]


def _copied(pair: forward.CrossKV) -> forward.CrossKV:
    assert pair.k_img is not None and pair.v_img is not None
    return forward.CrossKV(pair.k.clone(), pair.v.clone(), pair.k_img.clone(), pair.v_img.clone())


@pytest.mark.slow
@sweep(
    ("720x1280x81", "4gb", 16), ("720x1280x81", "12gb", 16), ("528x960x77", "8gb", 16),
    ("480x832x81", "24gb", 64),
)  # fmt: skip
def test_context_and_denoise(size: str, name: str, ram: int) -> None:
    found = made(size, name, ram)
    part = found["denoise"]
    context, step = denoise_peaks(
        size, part.chunk_tokens, part.branches, part.cross_kv_on_device, part.residual
    )
    hold(part.vram_bytes, step + weight_bytes(part) + decoding_bytes(found))
    before = found["context"]
    hold(before.vram_bytes, context + weight_bytes(before) + decoding_bytes(found))


@functools.cache
def text_peak(weight_format: str) -> int:
    """Of two prompts, a short and a full one: what is fewer tokens is padded to as many."""
    spec = manifest_of(weight_format).text
    lengths = (9, 512)
    return max(measured_text_bytes(spec, spec.weights.itemsize, 512, 2, n) for n in lengths)


@functools.cache
def image_peak(weight_format: str) -> int:
    spec = manifest_of(weight_format).image
    assert spec is not None
    return measured_image_bytes(spec, spec.weights.itemsize)


@pytest.mark.parametrize(("size", "name", "ram"), ALL)
def test_text_and_image(size: str, name: str, ram: int) -> None:
    found = made(size, name, ram)
    for phase, peak in (("text", text_peak), ("image", image_peak)):
        part = found[phase]
        hold(part.vram_bytes, peak(found.weight_format) + weight_bytes(part))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["encode", "decode"])
@sweep(("720x1280x81", "4gb", 16), ("480x832x81", "8gb", 16))
def test_the_vae(size: str, name: str, ram: int, phase: str) -> None:
    part = made(size, name, ram)[phase]
    hold(part.vram_bytes, vae_peak(size, phase, part.tiles) + weight_bytes(part))
