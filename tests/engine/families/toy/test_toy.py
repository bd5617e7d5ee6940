"""A family that the package has never heard of runs as the others do: only the registry names it.

What it needs outside its folder would have to be changed in the package for it; nothing is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from penstock.cli.main import app
from penstock.engine.engine import Engine
from penstock.engine.family import protocol
from penstock.engine.inspect import inspect
from penstock.engine.request.generation import GenerationRequest
from penstock.engine.request.levels import noise_levels
from penstock.errors import CheckpointError, OverBudget, RequestError
from tests.engine.families.toy import family

CONFIG = {"width": 256, "inner": 2048, "layers": 6, "channels": 8}
BLOCK = 4 * (2 * 256 * 2048 + 256)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The one line that a new family takes outside its folder."""
    with pytest.MonkeyPatch.context() as patch:
        name = "tests.engine.families.toy.family"
        patch.setattr(protocol, "_MODULES", (*protocol._MODULES, name))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("toy"), torch.Generator().manual_seed(4)
    index: dict[str, Any] = {"_class_name": family.PIPELINE}
    for kind in family.KINDS.values():
        place = root / kind.name
        place.mkdir()
        tensors = {
            name: torch.randn(shape, generator=draw) / 8
            for name, shape in kind.shapes(CONFIG).items()
        }
        save_file(tensors, place / "diffusion_pytorch_model.safetensors")
        told = CONFIG | {"_class_name": kind.made_by[1]}
        (place / "config.json").write_text(json.dumps(told))
        index[kind.name] = [*kind.made_by]
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")  # it reads bytes
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def request(**asked: Any) -> GenerationRequest:
    values = {"width": 64, "height": 32, "frames": 6, "steps": 4, "guidance_scale": 1.0}
    values |= {"sampler": "euler", "fps": 8, "seed": 2}
    return GenerationRequest("a mill", grid=family.GRID, **(values | asked))


def opened(folder: Path, vram: Any = "64MiB", ram: Any = "64MiB", **options: Any) -> Engine:
    return Engine.open(folder, device="cpu", vram=vram, ram=ram, **options)


@pytest.fixture(scope="module")
def latents(folder: Path) -> Tensor:
    """By a plain loop, from the files alone."""
    from safetensors.torch import load_file

    parts = {
        name: load_file(folder / name / "diffusion_pytorch_model.safetensors")
        for name in family.KINDS
    }
    weights = parts["transformer"]
    state = parts["text_encoder"]["words.weight"][list(b"a mill")].mean(0, keepdim=True)
    x = torch.randn((1, 8, 6, 4, 8), generator=torch.Generator().manual_seed(2))
    levels = noise_levels("euler", 4, 3.0)
    for level, after in zip(levels, [*levels[1:], 0.0], strict=True):
        rows = x[0].flatten(1).T
        hidden = rows @ weights["patch_in.weight"].T + weights["patch_in.bias"]
        for index in range(CONFIG["layers"]):
            start = f"loom.{index}"
            normed = torch.nn.functional.rms_norm(
                hidden + level * state, (256,), weights[f"{start}.norm.weight"]
            )
            inner = torch.nn.functional.silu(normed @ weights[f"{start}.up.weight"].T)
            hidden = hidden + inner @ weights[f"{start}.down.weight"].T
        velocity = hidden @ weights["patch_out.weight"].T + weights["patch_out.bias"]
        x = x + (after - level) * velocity.T.reshape(x.shape)
    return x


def test_a_job_makes_what_a_plain_loop_makes_and_keeps_to_its_plan(
    folder: Path, latents: Tensor, tmp_path: Path
) -> None:
    with opened(folder) as engine:
        result = engine.submit(request(), output=tmp_path / "mill.mp4").result()
    assert (result.latents - latents).norm() <= 1e-5 * latents.norm()
    assert result.video.shape == (6, 32, 64, 3) and (tmp_path / "mill.mp4").stat().st_size > 0
    assert [phase.name for phase in result.report.phases] == ["text", "denoise", "decode", "mux"]
    for phase in result.report.phases:
        assert phase.measured_vram_bytes <= phase.predicted_vram_bytes
        assert phase.measured_ram_bytes <= phase.predicted_ram_bytes


def test_streaming_changes_no_bit(folder: Path) -> None:
    """From the disk at every step, as no memory holds two thirds of the blocks, or read once."""
    read, latents = [], []
    for vram, ram, disk in (("10MiB", "18MiB", "spare"), ("64MiB", "64MiB", "never")):
        with opened(folder, vram, ram, disk=disk) as engine:
            result = engine.submit(request()).result()
        latents.append(result.latents)
        phases = {phase.name: phase for phase in result.report.phases}
        read.append(phases["denoise"].read_bytes)
    assert read[0] > 2 * read[1] and 6 * BLOCK <= read[1] < 7 * BLOCK
    assert torch.equal(*latents)


def test_a_stopped_job_goes_on_to_the_bit(folder: Path, tmp_path: Path) -> None:
    def stop(step: int, latents: Tensor) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with opened(folder) as engine:
        whole = engine.submit(request()).result()
        job = engine.submit(request(), on_step=stop, job_dir=tmp_path / "job")
        with pytest.raises(KeyboardInterrupt):
            job.result()
        assert torch.equal(engine.resume(tmp_path / "job").result().latents, whole.latents)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with opened(folder, vram="16KiB") as engine, pytest.raises(OverBudget, match="no plan fits"):
        engine.submit(request())
    with opened(folder) as engine, pytest.raises(RequestError, match="no guidance"):
        engine.submit(request(guidance_scale=5.0))


def test_a_pack_in_8_bits(folder: Path, latents: Tensor, tmp_path: Path) -> None:
    with opened(folder, format="int8", cache=tmp_path / "cache") as engine:
        found = engine.submit(request()).result().latents
    assert 0 < (found - latents).norm() <= 0.05 * latents.norm()


def test_a_step_cache_skips_its_passes(folder: Path, tmp_path: Path) -> None:
    with opened(folder, step_cache="plan:3", cache=tmp_path) as engine:
        result = engine.submit(request(steps=12)).result()
    assert len(result.report.computed_steps) == 3
    denoise = next(phase for phase in result.report.phases if phase.name == "denoise")
    assert denoise.read_bytes < 4 * 6 * BLOCK, "what is skipped is not read"


def test_it_is_inspected_and_planned_without_files(folder: Path) -> None:
    assert "Toy" in str(inspect(folder))
    asked = ("plan", "--card", "RTX 3060 12GB", "--size", "320x176", "--frames", "8", "--json")
    told = CliRunner().invoke(app, [*asked, "--synthetic", "toy-large", "--sampler", "euler"])
    assert told.exit_code == 0, told.output
    assert [each["name"] for each in json.loads(told.stdout)["phases"]] == [
        "text", "denoise", "decode", "mux",
    ]  # fmt: skip


def test_files_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "other")
    place = tmp_path / "other" / "vae"
    (place / "config.json").write_text(json.dumps({"channels": 4, "_class_name": "ToyPixels"}))
    save_file(
        {"pixels.weight": torch.zeros(192, 4), "pixels.bias": torch.zeros(192)},
        place / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="of another model"):
        opened(tmp_path / "other")
