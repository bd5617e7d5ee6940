"""The audio VAE against diffusers', and what it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.families.minimax_h3.sound import config as configs
from penstock.engine.families.minimax_h3.sound import cost, kind, modules, tiny
from penstock.engine.families.minimax_h3.sound.decode import statistics
from penstock.engine.families.minimax_h3.sound.spec import true_audio
from penstock.engine.family.naming import ShapesOf
from penstock.engine.model.binding import bind, unbound
from penstock.errors import CheckpointError
from penstock.offload.checkpoint import TensorEntry
from tests.meter import StorageMeter


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(0)
    return tiny.audio_vae()


def config_of(original: Any) -> dict[str, Any]:
    return {k: v for k, v in original.config.items() if not k.startswith("_")}


def made(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    module, block = modules.build(config)
    wanted = kind.shapes(config)
    assert block is None and {k: tuple(weights[k].shape) for k in wanted} == wanted
    bind(module, {name: weights[name] for name in wanted})
    assert not unbound(module)
    return module


@pytest.mark.parametrize("folded", [False, True])
def test_sound_is_diffusers_bit_for_bit(original: Any, folded: bool) -> None:
    config, weights = config_of(original), dict(original.state_dict())
    kind.AUDIO.check("x", config)
    unread = set(weights) - set(kind.shapes(config))
    assert all(name.startswith(kind._NEVER) for name in unread)
    if folded:
        for name in [each for each in weights if each.endswith(".weight_g")]:
            path = name.removesuffix("_g")
            directions = weights.pop(f"{path}_v")
            weights[path] = torch._weight_norm(directions, weights.pop(name))
    ours = made(config | {"folded": folded}, weights)
    latents = torch.randn(2, 6, 53, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = original.decode(latents, return_dict=False)[0]
        found = ours.decoder(ours.dec_in_proj(latents))
    assert found.shape == (2, 1, 53 * configs.hop_of(config))
    assert torch.equal(found, wanted) and found.std() > 0


def test_what_shapes_tell(original: Any) -> None:
    true = dict(configs.AUDIO)
    for folded in (False, True):
        shapes = kind.shapes(true | {"folded": folded})
        told = kind.AUDIO.derive(ShapesOf("x", shapes))
        assert kind.shapes(told) == shapes
    for naming, folded in zip(kind.NAMINGS, (False, True), strict=True):
        names = list(kind.shapes(true | {"folded": folded}))
        assert all(any(name.startswith(mark) for name in names) for mark in naming.marks)
        assert not any(name.startswith(naming.ignored) for name in names)


def test_latents_are_normalised_as_the_files_say(tmp_path: Any, original: Any) -> None:
    config = config_of(original)
    source = SimpleNamespace(extras={}, raw=SimpleNamespace(path="x"))
    mean, deviation = statistics(SimpleNamespace(config=config, source=source))  # type: ignore[arg-type]
    assert mean.flatten().tolist() == pytest.approx(config["latents_mean"])
    assert deviation.shape == (1, 6, 1)
    silent = SimpleNamespace(config=config | {"latents_mean": None}, source=source)
    with pytest.raises(CheckpointError, match="how the sound's latents are normalised"):
        statistics(silent)  # type: ignore[arg-type]
    values = torch.arange(6, dtype=torch.float32)
    path = tmp_path / "x.bin"
    path.write_bytes(b"1234" + values.numpy().tobytes())
    entry = TensorEntry("latents_mean", path, 4, "F32", (6,), 24)
    source.extras["latents_mean"] = entry
    assert torch.equal(statistics(silent)[0].flatten(), values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "value", "told"),
    [
        ("decoder_rates", [5, 5], "2 decoder_kernel_sizes"),
        ("decoder_dim", 100, "halves at each rate"),
        ("latents_std", [1.0], "32 entries"),
        ("resblock_kernel_sizes", [3, 7, 10], "odd"),
        ("latents_std", [0.0] * 32, "latents_std"),
    ],
)
def test_another_config_is_refused(entry: str, value: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        kind.AUDIO.check("x", {**configs.AUDIO, entry: value})


def filled(module: nn.Module) -> list[torch.Tensor]:
    for owner in module.modules():
        for name, each in owner._parameters.items():
            if each is not None:
                owner._parameters[name] = nn.Parameter(torch.empty(each.shape), requires_grad=False)
        for name, each in owner._buffers.items():
            owner._buffers[name] = None if each is None else torch.empty(each.shape)
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("latents", [207, 575])
def test_what_it_takes_at_the_true_shape(latents: int) -> None:
    spec = true_audio()
    with FakeTensorMode(), torch.inference_mode():
        module, _ = modules.build({})
        weights = filled(module)
        with StorageMeter(weights) as meter:
            module.decoder(module.dec_in_proj(torch.empty(2, 32, latents)))
        stored = sum(each.nbytes for each in weights)
    planned = cost.sound_work_bytes(spec, latents)
    assert meter.peak <= planned <= 1.05 * meter.peak
    assert stored <= spec.weights.rest_bytes <= 1.01 * stored
    assert spec.hop == 800 and spec.rate == 32000
