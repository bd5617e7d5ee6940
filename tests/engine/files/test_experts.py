"""The two transformers of Wan2.2 in every layout that users have; one without the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.experts import PARTS, expert_named, expert_of_lora, partner_of
from penstock.engine.files.locate import Files, ModelSource, locate
from penstock.engine.inspect import inspect
from penstock.engine.lora.file import Lora
from penstock.engine.model.files import ModelFiles
from penstock.engine.model.opening import Opening
from penstock.errors import CheckpointError, UsageError
from tests.engine import golden

NAMES = {
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "high",
    "wan2.2_i2v_low_noise_14B_fp16.safetensors": "low",
    "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors": "high",
    "Wan2_2-I2V-A14B-LOW_bf16.safetensors": "low",
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": "high",
    "Wan2.2-I2V-A14B-LowNoise-Q8_0.gguf": "low",
    "wan2.1_t2v_14B_fp16.safetensors": None,
    "wan2.1_t2v_high_detail.safetensors": None,
    "wan2.2_ti2v_5B_fp16.safetensors": None,
    "wan2.2_t2v_highres.safetensors": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_which_it_is(name: str) -> None:
    assert expert_named(name) == NAMES[name]


@pytest.mark.parametrize("name", [name for name, expert in NAMES.items() if expert])
def test_and_what_the_other_one_is_called(name: str) -> None:
    other = partner_of(Path(name))
    assert other is not None
    assert expert_named(other.name) == {"high": "low", "low": "high"}[str(NAMES[name])]
    assert partner_of(other) == Path(name)


@pytest.fixture(scope="module", params=[False, True], ids=["t2v", "i2v"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("a14b"), image_to_video=request.param, experts=True,
        seed=5, vae={"base_dim": 8}, transformer={"num_layers": 2},
    )  # fmt: skip


def _tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def _original(folder: Path, part: str) -> dict[str, torch.Tensor]:
    tensors = _tensors(folder, part)
    kind = "transformer" if part.startswith("transformer") else part
    names = golden.original_names(kind, list(tensors))
    return {names[name]: tensor for name, tensor in tensors.items()}


def _rest(folder: Path) -> Files:
    return Files(
        text_encoder=folder / "text_encoder", vae=folder / "vae", tokenizer=folder / "tokenizer"
    )


def _same(source: ModelSource, folder: Path) -> None:
    """The two are there, each in its place."""
    for part in ("transformer", "transformer_2"):
        found = source.parts[part]
        assert found.component == part
        entry = found.weights["blocks.0.attn1.to_q.weight"].tensors["weight"]
        with entry.file.open("rb") as file:
            file.seek(entry.offset)
            stored = file.read(entry.nbytes)
        expected = _tensors(folder, part)["blocks.0.attn1.to_q.weight"]
        assert stored == expected.numpy().tobytes()
    assert list(source.parts)[0] == "transformer"


def _files(folder: Path, place: Path, high: str, low: str) -> tuple[Path, Path]:
    place.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config))
    for name, part in ((high, "transformer"), (low, "transformer_2")):
        save_file(_original(folder, part), place / name)
    return place / high, place / low


def test_a_folder_of_diffusers(folder: Path) -> None:
    source = locate(folder)
    _same(source, folder)
    assert source.pipeline["boundary_ratio"] in (0.875, 0.9)
    described = inspect(folder)
    assert [part.component for part in described.components][:2] == [
        "transformer",
        "transformer_2",
    ]


def test_the_makers_repository(folder: Path, tmp_path: Path) -> None:
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        place = tmp_path / f"{expert}_noise_model"
        shutil.copytree(folder / part, place)
    source = locate(tmp_path, _rest(folder))
    _same(source, folder)
    with pytest.raises(CheckpointError, match="text encoder"):
        locate(tmp_path)


@pytest.mark.parametrize(
    "high, low",
    [
        ("wan2.2_high_noise_14B.safetensors", "wan2.2_low_noise_14B.safetensors"),
        ("Wan2_2-A14B_HIGH.safetensors", "Wan2_2-A14B_LOW.safetensors"),
    ],
)
def test_two_single_files(high: str, low: str, folder: Path, tmp_path: Path) -> None:
    first, second = _files(folder, tmp_path, high, low)
    rest = _rest(folder)
    given = Files(first, rest.text_encoder, rest.vae, None, rest.tokenizer, second)
    _same(locate(None, given), folder)
    beside = Files(first, rest.text_encoder, rest.vae, None, rest.tokenizer)
    _same(locate(None, beside), folder)  # the other one is found by its name
    swapped = Files(second, rest.text_encoder, rest.vae, None, rest.tokenizer, first)
    with pytest.raises(UsageError, match="not in their places"):
        locate(None, swapped)


def test_inspect_says_which_of_two_it_is(folder: Path, tmp_path: Path) -> None:
    for path in _files(folder, tmp_path, "wan2.2_HIGH.safetensors", "wan2.2_LOW.safetensors"):
        (found,) = inspect(path).components
        assert "one of two transformers" in found.family
        assert found.arguments == (
            "--transformer", str(tmp_path / "wan2.2_HIGH.safetensors"),
            "--transformer-2", str(tmp_path / "wan2.2_LOW.safetensors"),
        )  # fmt: skip


def test_a_root_of_comfyui(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "ComfyUI" / "models"
    models = root / "diffusion_models"
    high, low = "wan2.2_high_noise_14B.safetensors", "wan2.2_low_noise_14B.safetensors"
    _files(folder, models, high, low)
    _same(locate(tmp_path / "ComfyUI", _rest(folder)), folder)
    shutil.copy(models / high, models / "wan2.1_t2v.safetensors")
    with pytest.raises(CheckpointError, match="more than one transformer"):
        locate(tmp_path / "ComfyUI", _rest(folder))
    rest = _rest(folder)
    named = Files(Path(high), rest.text_encoder, rest.vae, None, rest.tokenizer)
    _same(locate(tmp_path / "ComfyUI", named), folder)


@pytest.mark.parametrize("which", [0, 1])
def test_one_alone_is_refused_and_names_the_other(which: int, folder: Path, tmp_path: Path) -> None:
    names = ("wan2.2_high_noise_14B.safetensors", "wan2.2_low_noise_14B.safetensors")
    both = _files(folder, tmp_path, *names)
    both[1 - which].unlink()
    rest = _rest(folder)
    alone = Files(both[which], rest.text_encoder, rest.vae, None, rest.tokenizer)
    with pytest.raises(CheckpointError, match=f"one of two.*{names[1 - which]}"):
        locate(None, alone)


def test_so_is_one_of_a_pipeline(folder: Path) -> None:
    rest = _rest(folder)
    for part in ("transformer", "transformer_2"):
        alone = Files(folder / part, rest.text_encoder, rest.vae, None, rest.tokenizer)
        with pytest.raises(CheckpointError, match="one of two transformers"):
            locate(None, alone)


def test_one_whose_shapes_tell_needs_no_name(folder: Path, tmp_path: Path) -> None:
    """36 channels and no image embedder are Wan2.2's alone; 16 are Wan2.1's T2V as well."""
    path = tmp_path / "x.safetensors"
    save_file(_original(folder, "transformer"), path)
    shutil.copy(folder / "transformer" / "config.json", tmp_path / "config.json")
    rest = _rest(folder)
    alone = Files(path, rest.text_encoder, rest.vae, None, rest.tokenizer)
    pictured = json.loads((folder / "transformer" / "config.json").read_text())["in_channels"] == 36
    if not pictured:
        assert "transformer_2" not in locate(None, alone).parts
        return
    with pytest.raises(CheckpointError, match="one of two transformers"):
        locate(None, alone)


def test_a_folder_that_lost_one_says_so(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "m")
    shutil.rmtree(copy / "transformer_2")
    with pytest.raises(CheckpointError, match=r"no transformer 2 \(transformer_2/\)"):
        locate(copy)


def test_two_of_two_models_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "m")
    other = write_tiny_model(
        tmp_path / "o", image_to_video=False, experts=True,
        vae={"base_dim": 8}, transformer={"num_layers": 2, "text_dim": 32},
    )  # fmt: skip
    shutil.rmtree(copy / "transformer_2")
    shutil.copytree(other / "transformer_2", copy / "transformer_2")
    with pytest.raises(CheckpointError, match="two transformers of .* are of two models"):
        locate(copy)


LORAS = {
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "high",
    "Wan22_style-LOW.safetensors": "low",
    "style_high.safetensors": "high",
    "style.safetensors": None,
    "thigh.safetensors": None,
}


@pytest.mark.parametrize("name", LORAS)
def test_a_loras_name_says_whose_it_is(name: str) -> None:
    assert expert_of_lora(name) == LORAS[name]


@pytest.mark.parametrize(
    "text, path, strength, high, low",
    [
        ("a.safetensors", "a.safetensors", 1.0, True, True),
        ("a.safetensors@high", "a.safetensors", 1.0, True, False),
        ("a.safetensors:0.5@low", "a.safetensors", 0.5, False, True),
        ("a_high_noise.safetensors", "a_high_noise.safetensors", 1.0, True, False),
        ("a_high_noise.safetensors:0.8@both", "a_high_noise.safetensors", 0.8, True, True),
        ("me@home.safetensors", "me@home.safetensors", 1.0, True, True),
        ("high_noise_model/x.safetensors", "high_noise_model/x.safetensors", 1.0, True, False),
    ],
)
def test_whose_a_lora_is(text: str, path: str, strength: float, high: bool, low: bool) -> None:
    lora = Lora.parse(text)
    assert (lora.path, lora.strength) == (Path(path), strength)
    assert (lora.is_for("high"), lora.is_for("low")) == (high, low)


def _lora(folder: Path, path: Path) -> Path:
    weight = _tensors(folder, "transformer")["blocks.0.attn1.to_q.weight"]
    draw = torch.Generator().manual_seed(1)
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(
                2, weight.shape[1], generator=draw
            ),
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(
                weight.shape[0], 2, generator=draw
            ),
        },
        path,
    )
    return path


def test_each_transformer_has_its_own_loras(folder: Path, tmp_path: Path) -> None:
    high = _lora(folder, tmp_path / "a_high_noise.safetensors")
    both = _lora(folder, tmp_path / "b.safetensors")
    given = [Lora(high), Lora(both, 0.5), Lora(both, 0.25, expert="low")]
    model = ModelFiles.open(folder, loras=given)
    first, second = model.loras.every
    assert [lora.strength for lora in first.given] == [1.0, 0.5]
    assert [lora.strength for lora in second.given] == [0.5, 0.25]
    assert model.opening.loras == tuple(given)
    again = Opening.from_values(model.opening.values())
    assert again.loras == tuple(given)
    assert len(model.files) == len(ModelFiles.open(folder).files) + 4
    told = [origin.value for origin in model.origins()]
    assert sum("for high noise" in line for line in told) == 2


def test_a_lora_for_one_of_two_needs_two(t2v_folder: Path, tmp_path: Path) -> None:
    lora = _lora(t2v_folder, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="Leave @high out"):
        ModelFiles.open(t2v_folder, loras=[Lora(lora, expert="high")])
    assert ModelFiles.open(t2v_folder, loras=[Lora(lora, expert="both")]).loras.given


@pytest.mark.parametrize("key", ["general.name", "general.basename", "general.finetune"])
def test_a_pair_of_gguf_files_may_say_it_inside(key: str, folder: Path, tmp_path: Path) -> None:
    """Of two that are called nothing, the one that says so is known, and its place is checked."""
    shutil.copy(folder / "transformer" / "config.json", tmp_path)
    paths = []
    for file, part, title in (
        ("a.gguf", "transformer", "Wan2.2-A14B-HighNoise"),
        ("b.gguf", "transformer_2", "Wan2.2-A14B-LowNoise"),
    ):
        tensors = _tensors(folder, part)
        names = golden.original_names("transformer", list(tensors))
        golden.write_gguf(tmp_path / file, tensors, names, "Q8_0", "wan", said={key: title})
        paths.append(tmp_path / file)
    rest = _rest(folder)
    given = Files(paths[0], rest.text_encoder, rest.vae, None, rest.tokenizer, paths[1])
    assert [locate(None, given).parts[part].component for part in PARTS] == list(PARTS)
    swapped = Files(paths[1], rest.text_encoder, rest.vae, None, rest.tokenizer, paths[0])
    with pytest.raises(UsageError, match="not in their places"):
        locate(None, swapped)
    alone = Files(paths[0], rest.text_encoder, rest.vae, None, rest.tokenizer)
    with pytest.raises(CheckpointError, match="one of two"):
        locate(None, alone)
