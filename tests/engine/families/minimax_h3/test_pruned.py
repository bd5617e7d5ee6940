"""A pruned MiniMax-H3, as ComfyUI publishes it: a curve in place of the time embedding's layers.

The twin is diffusers' module with the parts that see the timestep replaced by what ComfyUI's
``comfy/ldm/minimax/model.py`` computes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from torch import Tensor, nn

from penstock.engine.engine import Engine
from penstock.engine.families.minimax_h3 import modules
from penstock.engine.files.formats import compute_tag
from penstock.engine.files.locate import Files, open_component
from penstock.engine.files.reader import WeightReader
from penstock.engine.model.binding import bind
from penstock.errors import CheckpointError, NotRun
from tests.engine import golden
from tests.engine.families.minimax_h3 import makers, tiny
from tests.engine.families.minimax_h3.test_forward import (
    DTYPES,
    LAYOUTS,
    TIMES,
    _inputs,
    _ours,
    _theirs,
)
from tests.engine.families.minimax_h3.test_job import SIZE, Seen, _makers_names, _request

POINTS, WIDTH = 33, 5


class TwinCurve(nn.Module):
    """Timesteps to points on the curve."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.linear_1 = nn.Linear(1, 1)  # diffusers reads its dtype

    def forward(self, timesteps: Tensor) -> Tensor:
        place = timesteps.clamp(0.0, 1.0) * (len(self.table) - 1)
        low = place.floor().long().clamp(max=len(self.table) - 2)
        return torch.lerp(self.table[low], self.table[low + 1], (place - low).unsqueeze(1))


class TwinModulation(nn.Module):
    """Of a block: no activation, in fp32, rounded afterwards."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self._dtype = linear, dtype

    def forward(self, points: Tensor) -> Any:
        made = self.linear(points)
        return made.view(len(points) * 3, -1).to(self._dtype).chunk(6, dim=-1)


class TwinOut(nn.Module):
    """The last norm: its modulation stays in fp32."""

    def __init__(self, norm: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear

    def forward(self, hidden: Tensor, points: Tensor, rows: Tensor) -> Tensor:
        shift, scale = self.linear(points).chunk(2, dim=-1)
        return self.norm(hidden) * (1.0 + scale[rows]) + shift[rows]


def pruned(dtype: torch.dtype, **changed: Any) -> Any:
    """The twin."""
    model = makers.transformer(dtype, **changed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model.time_proj = nn.Identity()
        model.time_embedder = TwinCurve(torch.randn(POINTS, WIDTH))
        for block in model.transformer_blocks:
            width = block.adaln_proj.linear.out_features
            block.adaln_proj = TwinModulation(_narrow(width), dtype)
        model.norm_out = TwinOut(model.norm_out.norm, _narrow(model.norm_out.linear.out_features))
    return model.eval().requires_grad_(False)


def _narrow(width: int) -> nn.Linear:
    """Values that fp16 holds, as files do."""
    made = nn.Linear(WIDTH, width)
    for parameter in made.parameters():
        parameter.data = parameter.data.half().float()
    return made


def our_names(twin: Any) -> dict[str, Tensor]:
    """The twin's parameters as the module here names them."""
    state = {
        name.replace("adaln_proj.linear", "adaln_proj.curve").replace(
            "norm_out.linear", "norm_out.curve"
        ): each
        for name, each in twin.state_dict().items()
        if not name.startswith("time_embedder.")
    }
    return state | {"time_embedder.table": twin.time_embedder.table}


def their_names(twin: Any) -> dict[str, Tensor]:
    """As ComfyUI's file has them: the projections of the curve in fp16."""
    state = {n: each for n, each in twin.state_dict().items() if "time_embedder" not in n}
    found = {name: each.clone() for name, each in _makers_names(state).items()}
    for name in found:
        if "adaln_proj" in name:
            found[name] = found[name].half()
    return found | {"model.diffusion_model.adaln_t_table": twin.time_embedder.table.clone()}


@pytest.fixture(scope="module")
def twins() -> dict[torch.dtype, Any]:
    return {dtype: pruned(dtype) for dtype in DTYPES}


def ours(twin: Any) -> Any:
    config = makers.TRANSFORMER | {"time_table_size": POINTS, "adaln_rank": WIDTH}
    model = modules.MiniMaxH3Transformer3DModel(**config)
    assert {name: each.shape for name, each in model.state_dict().items()} == {
        name: each.shape for name, each in our_names(twin).items()
    }
    bind(model, our_names(twin))
    return model


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_is_the_twins_bit_for_bit(
    twins: dict[torch.dtype, Any], dtype: torch.dtype, times: tuple[float, float]
) -> None:
    layout = LAYOUTS["both"]
    made = _inputs(layout, dtype)
    found = _ours(ours(twins[dtype]), layout, made, times, layout.rows)
    for part, wanted in zip(found, _theirs(twins[dtype], layout, made, times), strict=True):
        assert torch.equal(part, wanted)


def test_a_curve_is_lines_between_its_points(twins: dict[torch.dtype, Any]) -> None:
    model = ours(twins[torch.float32])
    told = torch.tensor([-0.5, 0.0, 0.001, 0.4999, 0.75, 0.9999, 1.0, 1.5])
    found = model.time_embedder(told)
    table, places = model.time_embedder.table.detach(), np.linspace(0, 1, POINTS)
    wanted = [np.interp(told.numpy(), places, table[:, axis].numpy()) for axis in range(WIDTH)]
    assert np.allclose(found.detach().numpy().T, wanted, atol=1e-5)


WIDER = {"hidden_size": 64, "attention_head_dim": 32, "ffn_dim": 64}
"""Rows that are whole blocks of Q8_0."""


@dataclass(frozen=True)
class Published:
    """A model whose transformer is pruned."""

    model: tiny.TinyH3
    twin: Any

    def files(self, folder: Path) -> Path:
        """A folder for a file of it. The tiny model's heads turn less than a file without a
        config is taken to; the rest shapes tell as well."""
        config = json.loads((self.model.folder / "transformer" / "config.json").read_text())
        config |= WIDER | {"time_table_size": POINTS, "adaln_rank": WIDTH}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def latents(self, file: Path, **options: Any) -> Tensor:
        """Of a job with the transformer of ``file``."""
        seen = Seen([])
        options = {"device": "cpu", "vram": "1GiB", "ram": "1GiB"} | options
        with Engine.open(self.model.folder, files=Files(transformer=file), **options) as engine:
            result = engine.submit(_request(engine, steps=3), on_step=seen).result()
            for phase in result.report.phases:
                assert phase.measured_vram_bytes <= phase.predicted_vram_bytes
        return seen.steps[-1]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    model = tiny.write(tmp_path_factory.mktemp("pruned"))
    return Published(model, pruned(torch.float32, **WIDER))


@pytest.fixture(scope="module")
def safetensors(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = published.files(tmp_path_factory.mktemp("file") / "f")
    save_file(their_names(published.twin), folder / "minimax_h3_pruned.safetensors")
    return folder / "minimax_h3_pruned.safetensors"


@pytest.fixture(scope="module")
def latents(published: Published, safetensors: Path) -> Tensor:
    return published.latents(safetensors)


def test_a_published_file_is_recognised(published: Published, safetensors: Path) -> None:
    source = open_component(safetensors)
    assert (source.naming, source.kind.title(source.config)) == (
        "ComfyUI",
        "MiniMax-H3 (cut, pruned)",
    )
    source.check()
    wanted = our_names(published.twin)
    with WeightReader(source) as reader:
        found = {name: reader.read(name, torch.float32) for name in source.weights}
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        if name.endswith("net.0.proj.weight"):
            each = torch.cat(each.chunk(2)[::-1])
        assert torch.equal(found[name], each)


def test_a_job_follows_the_curve(published: Published, latents: Tensor) -> None:
    """The same job by diffusers' pipeline, whose transformer is the twin."""
    whole = published.model
    parts = whole.parts | {"transformer": published.twin}
    wanted = tiny.TinyH3(whole.folder, parts).theirs(
        prompt="a red fox", num_frames=124, num_inference_steps=3, output_type="pt",
        generator=torch.Generator().manual_seed(5), output=["latents", "audio_latents"], **SIZE,
    )  # fmt: skip
    assert torch.isfinite(latents).all()
    both = torch.cat([wanted[name].reshape(1, -1) for name in ("latents", "audio_latents")], dim=1)
    assert (latents - both).norm() <= 1e-5 * both.norm()


def write_gguf(path: Path, tensors: Mapping[str, Tensor], architecture: str | None) -> Path:
    """As its converters do: matrices of blocks in Q8_0, everything else as it is."""
    writer = GGUFWriter(path, architecture or "")
    if architecture is None:
        writer.kv_data = [{}]  # published files without a word of metadata exist
    for name, tensor in tensors.items():
        local, data = name.removeprefix("model.diffusion_model."), tensor.numpy()
        if tensor.ndim == 2 and local.startswith("blocks.") and data.shape[1] % 32 == 0:
            stored = quants.quantize(data.astype(np.float32), GGMLQuantizationType.Q8_0)
            writer.add_tensor(local, stored, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(local, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["minimax_h3", "wan", None])
def test_gguf_files_whatever_they_call_themselves(
    published: Published, latents: Tensor, tmp_path: Path, architecture: str | None
) -> None:
    folder = published.files(tmp_path / "gguf")
    file = write_gguf(folder / "h3-Q8_0.gguf", their_names(published.twin), architecture)
    source = open_component(file)
    assert (source.naming, source.component) == ("ComfyUI", "transformer")
    found = published.latents(file)
    assert (found - latents).norm() <= 0.02 * latents.norm()


def test_a_folder_in_diffusers_layout(
    published: Published, latents: Tensor, tmp_path: Path
) -> None:
    """With the config that its class writes, and what only adapters need."""
    twin, folder = published.twin, tmp_path / "transformer"
    state = {name: each.clone() for name, each in twin.state_dict().items()}
    state = {name: each for name, each in state.items() if "time_embedder" not in name}
    for name in [each for each in state if each.endswith("adaln_proj.linear.bias")]:
        state[name.replace("linear.bias", "folded_bias")] = state.pop(name)
    state["norm_out.folded_bias"] = state.pop("norm_out.linear.bias")
    state["time_embedder.table"] = twin.time_embedder.table.clone()
    state |= {"adaln_basis": torch.zeros(WIDTH, 20), "adaln_mean": torch.zeros(20)}
    config = json.loads((published.files(folder) / "config.json").read_text())
    config["_class_name"] = "MiniMaxH3PrunedTransformer3DModel"
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(state, file)
    source = open_component(file)
    assert (source.naming, source.component, source.unknown) == ("diffusers", "transformer", ())
    # The gate's rows lie elsewhere than in the other file; their products are summed alike.
    assert (published.latents(file) - latents).norm() <= 1e-6 * latents.norm()


@pytest.mark.parametrize(
    "changed", [{"time_table_size": 1}, {"adaln_rank": 0}, {"adaln_rank": "8"}]
)
def test_a_config_that_cannot_be_is_refused(
    published: Published, safetensors: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = published.files(tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(safetensors, folder)
    with pytest.raises(CheckpointError, match=next(iter(changed))):
        open_component(folder / safetensors.name)


def test_int8_packs_are_made_of_it(
    published: Published, safetensors: Path, latents: Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    found = published.latents(safetensors, format="int8")
    assert 0 < (found - latents).norm() <= 0.05 * latents.norm()
    again = published.latents(safetensors, format="int8")
    assert torch.equal(found, again)


def test_the_makers_own_shards_are_refused(published: Published, tmp_path: Path) -> None:
    """Their rows of q, k and v take turns head by head; read as a single file's, attention is
    noise, and nothing in the tensors tells."""
    folder = published.files(tmp_path / "shards")
    tensors = list(their_names(published.twin).items())
    parts = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {name: file for file, part in parts.items() for name in part}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    with pytest.raises(NotRun, match="own shards, where queries, keys and values take turns"):
        open_component(path)


@pytest.mark.parametrize("spelling", ["comfy convrot 64", "comfy new"])
def test_quantised_files_are_what_their_values_are(
    published: Published, tmp_path: Path, spelling: str
) -> None:
    """As ComfyUI's own int8 and fp8 files: the matrices of blocks, and nothing else. What the curve
    has in fp16 does not make it a model of fp16."""
    stored: dict[str, Tensor] = {}
    values = their_names(published.twin)
    for name, tensor in list(values.items()):
        local = name.removeprefix("model.diffusion_model.")
        matrix = local.startswith("blocks.") and "adaln" not in local and tensor.ndim == 2
        if matrix and tensor.shape[1] % 64 == 0:
            made, values[name] = golden._store(tensor, spelling, name.removesuffix(".weight"))
            stored |= {key: each.contiguous() for key, each in made.items()}
        else:
            stored[name] = tensor
    assert len(stored) > len(values)
    paths, read = [], []
    for kind, tensors in (("stored", stored), ("values", values)):
        paths.append(published.files(tmp_path / kind) / "h3.safetensors")
        save_file(tensors, paths[-1])
        source = open_component(paths[-1])
        with WeightReader(source) as reader:
            read.append({name: reader.read(name, torch.float32) for name in source.weights})
    for name, value in read[1].items():
        assert (read[0][name] - value).abs().max() <= 1e-6
    assert compute_tag(open_component(paths[0])) == "BF16"
    found, wanted = map(published.latents, paths)
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


def test_three_matrices_in_one_are_not_taken_apart_within_a_tile_of_scales(
    published: Published, tmp_path: Path
) -> None:
    tensors = their_names(published.twin)
    name = "model.diffusion_model.blocks.0.attn.qkv_proj.weight"
    made, _ = golden._store(tensors.pop(name), "comfy nvfp4", name.removesuffix(".weight"))
    file = published.files(tmp_path / "tiles") / "h3.safetensors"
    save_file(tensors | {key: each.contiguous() for key, each in made.items()}, file)
    with pytest.raises(CheckpointError, match="each of 128 rows, found .* with 96 rows"):
        open_component(file)


def test_what_a_lora_of_the_whole_model_has_for_the_curve_is_left_out(
    published: Published, safetensors: Path, latents: Tensor, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(2)
    shapes = {"blocks.1.attn.qkv_proj": (288, 64), "blocks.1.adaln_proj.linear": (1152, 20)}
    lora = {}
    for module, (rows, columns) in shapes.items():
        start = f"diffusion_model.{module}"
        lora[f"{start}.lora_A.weight"] = torch.randn(2, columns, generator=draw)
        lora[f"{start}.lora_B.weight"] = torch.randn(rows, 2, generator=draw)
    save_file(lora, tmp_path / "turbo.safetensors")
    notes: list[str] = []
    files = Files(transformer=safetensors)
    with Engine.open(
        published.model.folder, files=files, device="cpu", vram="1GiB", ram="1GiB",
        loras=[tmp_path / "turbo.safetensors"],
    ) as engine:  # fmt: skip
        notes += engine.model.notices
        seen = Seen([])
        engine.submit(_request(engine, steps=3), on_step=seen).result()
    assert any("adaln_proj" in note for note in notes)
    assert (seen.steps[-1] - latents).norm() > 1e-3 * latents.norm()
