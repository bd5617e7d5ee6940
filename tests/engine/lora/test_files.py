"""LoRA files: what is read of them, what is refused, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.engine.families.wan.tiny import write_tiny_model
from penstock.engine.files.keys import ComponentSource
from penstock.engine.files.locate import locate
from penstock.engine.inspect import inspect
from penstock.engine.lora.file import Lora, as_loras, open_lora
from penstock.engine.lora.inspect import LoraInspection
from penstock.engine.lora.keys import parse_key
from penstock.engine.lora.place import PlacedLoras
from penstock.engine.model.files import ModelFiles
from penstock.errors import CheckpointError, PickleRefused, TensorMismatch, UsageError
from penstock.offload.checkpoint import Checkpoint
from penstock.quant.values.patch import apply
from tests.engine import lora_files as made
from tests.engine.lora import kinds

Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def source(i2v_folder: Path) -> ComponentSource:
    return locate(i2v_folder).streamed


def _write(path: Path, **tensors: Tensor) -> Path:
    save_file(dict(tensors), path)
    return path


def _pair(rank: int = 2, width: int = 96) -> dict[str, Tensor]:
    down, up = torch.randn(rank, width), torch.randn(width, rank)
    return {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir/a:-1", "dir/a", -1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.5", r"C:\loras\a.safetensors", 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
    ],
)
def test_a_strength_may_follow_the_file(text: str, path: str, strength: float) -> None:
    assert Lora.parse(text) == Lora(Path(path), strength)
    assert as_loras([text, Path(path), Lora(Path(path), strength)]) == (
        Lora(Path(path), strength), Lora(Path(path)), Lora(Path(path), strength)
    )  # fmt: skip


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_strength_is_finite(strength: str) -> None:
    with pytest.raises(UsageError, match="finite"):
        Lora.parse(f"a.safetensors:{strength}")


@pytest.mark.parametrize(
    ("key", "module", "role"),
    [
        ("transformer.blocks.7.attn1.to_out.0.lora_A.weight", "blocks.7.attn1.to_out.0", "down"),
        ("base_model.model.blocks.7.ffn.net.2.lora_B.weight", "blocks.7.ffn.net.2", "up"),
        ("base_model.model.blocks.7.ffn.net.2.lora_B.default.weight", "blocks.7.ffn.net.2", "up"),
        ("transformer.proj_out.lora_B.bias", "proj_out", "up_bias"),
        ("lora_unet_blocks_12_cross_attn_v_img.lora_down.weight", "blocks.12.attn2.add_v_proj",
         "down"),
        ("lora_unet_blocks_12_ffn_2.alpha", "blocks.12.ffn.net.2", "alpha"),
        ("lora_unet_time_projection_1.lora_up.weight", "condition_embedder.time_proj", "up"),
        ("lora_unet_blocks_3_attn1_to_out_0.lora_up.weight", "blocks.3.attn1.to_out.0", "up"),
        (f"{Q}.diff_b", "blocks.0.attn1.to_q", "diff_b"),
        ("diffusion_model.blocks.5.diff_m", "blocks.5.scale_shift_table", "diff_m"),
        ("diffusion_model.head.diff_m", "scale_shift_table", "diff_m"),
        ("diffusion_model.head.head.diff", "proj_out", "diff"),
        ("diffusion_model.blocks.5.norm3.diff", "blocks.5.norm2", "diff"),
        ("model.diffusion_model.img_emb.proj.4.diff_b",
         "condition_embedder.image_embedder.norm2", "diff_b"),
        ("blocks.0.self_attn.q.lora_down.weight", "blocks.0.attn1.to_q", "down"),
        ("lora_unet__blocks_0_cross_attn_k.lora_up.weight", "blocks.0.attn2.to_k", "up"),
        ("pipe.dit.blocks.0.ffn.0.lora_A.default.weight", "blocks.0.ffn.net.0.proj", "down"),
        ("base_model.model.diffusion_model.blocks.0.ffn.0.lora_A.weight",
         "blocks.0.ffn.net.0.proj", "down"),
        ("lycoris_blocks_0_attn1_to_q.lokr_w2_a", "blocks.0.attn1.to_q", "lokr w2_a"),
        ("lycoris_blocks_0_self_attn_q.hada_w1_b", "blocks.0.attn1.to_q", "loha w1_b"),
        ("diffusion_model.blocks.0.self_attn.q_lora.down.weight", "blocks.0.attn1.to_q", "down"),
        ("transformer.blocks.0.attn1.processor.to_q_lora.up.weight", "blocks.0.attn1.to_q", "up"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A", "blocks.0.attn1.to_q", "down"),
        ("diffusion_model.blocks.0.self_attn.q.lora_B", "blocks.0.attn1.to_q", "up"),
        (f"{Q}.dora_scale", "blocks.0.attn1.to_q", "magnitude"),
        ("transformer.blocks.0.attn1.to_q.lora_magnitude_vector", "blocks.0.attn1.to_q",
         "magnitude"),
        (f"{Q}.oft_blocks", "blocks.0.attn1.to_q", "oft blocks"),
        (f"{Q}.a1.weight", "blocks.0.attn1.to_q", "glora a1"),
        ("lycoris_blocks_0_norm2.b_norm", "blocks.0.norm2", "diff_b"),
        (f"{Q}.bias.set_weight", "blocks.0.attn1.to_q.bias", "set"),
        ("diffusion_model.blocks.0.modulation.diff", "blocks.0.scale_shift_table", "diff"),
        ("diffusion_model.patch_embedding.reshape_weight", "patch_embedding", "reshape"),
    ],
)  # fmt: skip
def test_a_key_tells_module_and_part(key: str, module: str, role: str) -> None:
    part = parse_key(key)
    assert part is not None
    assert (part.module, part.role) == (module, role)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.blocks.0.attn3.to_q.lora_A.weight",
        "diffusion_model.blocks.x.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_C.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_mid.bias",
        "lora_te_text_model_encoder_layers_0.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q",
        "",
    ],
)
def test_a_key_that_is_not_known_is_not_guessed(key: str) -> None:
    assert parse_key(key) is None


def test_every_linear_layer_has_a_key_in_every_style(
    source: ComponentSource, tmp_path: Path
) -> None:
    modules = made.linears(source, outside=False) + made.linears(source, outside=True)
    pairs = made.pairs(source, modules)
    written = [
        made.write_diffusers(tmp_path / "a.safetensors", pairs),
        made.write_comfy(tmp_path / "b.safetensors", pairs, alpha=2.0),
        made.write_kohya(tmp_path / "c.safetensors", pairs),
        made.write_lightx2v(tmp_path / "d.safetensors", pairs, made.biases(source, modules)),
    ]
    for path, style in zip(written, ("diffusers", "ComfyUI", "Kohya", "ComfyUI"), strict=True):
        file = open_lora(path)
        file.check(source)
        assert set(file.layers) == set(modules)
        assert file.styles == (style,)
        assert file.ranks == {3: len(modules)}
        with Checkpoint.open(path) as found:
            alphas = sum(e.nbytes for key, e in found.items() if key.endswith(".alpha"))
            assert file.nbytes == sum(e.nbytes for e in found.values()) - alphas


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(4), 2.0),
        (torch.tensor([4], dtype=torch.int32), 2.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.25),
        (torch.tensor(0.5, dtype=torch.float16), 0.25),
        (torch.tensor(3.0, dtype=torch.float64), 1.5),
    ],
)
def test_alpha_over_rank_scales(alpha: Tensor, scale: float, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.safetensors", **_pair(), **{f"{Q}.alpha": alpha})
    assert open_lora(path).layers["blocks.0.attn1.to_q"].scale == scale


def test_pefts_folder_needs_its_config(tmp_path: Path) -> None:
    start = "base_model.model.blocks.0.attn1.to_q"
    down, up = _pair().values()
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, path)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside it"):
        open_lora(path)
    config: dict[str, Any] = {"r": 2, "lora_alpha": 8, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for given in (path, tmp_path):
        assert open_lora(given).layers["blocks.0.attn1.to_q"].scale == 4.0
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        open_lora(path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"alpha_pattern": {"(a+)+$": 1}})
    )
    with pytest.raises(CheckpointError, match="alpha_pattern of module names"):
        open_lora(path)


_DAMAGED: dict[str, tuple[dict[str, Tensor], str]] = {
    "half a pair": ({f"{Q}.lora_A.weight": torch.zeros(2, 96)}, "both matrices"),
    "two ranks": (
        {f"{Q}.lora_A.weight": torch.zeros(2, 96), f"{Q}.lora_B.weight": torch.zeros(96, 3)},
        "share a rank"),
    "rank 0": (
        {f"{Q}.lora_A.weight": torch.zeros(0, 96), f"{Q}.lora_B.weight": torch.zeros(96, 0)},
        "share a rank"),
    "vectors": (
        {f"{Q}.lora_A.weight": torch.zeros(2), f"{Q}.lora_B.weight": torch.zeros(2)},
        "share a rank"),
    "integers": (
        {f"{Q}.lora_A.weight": torch.zeros(2, 96, dtype=torch.int8),
         f"{Q}.lora_B.weight": torch.zeros(96, 2)}, "found I8"),
    "alpha infinite": (_pair() | {f"{Q}.alpha": torch.tensor(float("inf"))}, "finite"),
    "three of loha's four": (
        {f"{Q}.hada_w1_a": torch.zeros(96, 2), f"{Q}.hada_w1_b": torch.zeros(2, 96),
         f"{Q}.hada_w2_a": torch.zeros(96, 2)}, "all matrices"),
    "half of glora": ({f"{Q}.a1.weight": torch.zeros(96, 2)}, "all four matrices"),
    "blocks that are not square": ({f"{Q}.oft_blocks": torch.zeros(4, 24, 12)}, "square blocks"),
    "a shape of fractions": (
        _pair() | {f"{Q}.reshape_weight": torch.ones(2)}, "as a weight's dimensions"),
    "alpha NaN": (_pair() | {f"{Q}.alpha": torch.tensor(float("nan"))}, "finite"),
    "alpha a vector": (_pair() | {f"{Q}.alpha": torch.ones(2)}, "as one number"),
    "alpha a truth": (_pair() | {f"{Q}.alpha": torch.tensor(True)}, "as one number"),
    "twice": (
        _pair() | {"diffusion_model.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 96)},
        "one down of"),
    "two biases": (
        _pair() | {f"{Q}.diff_b": torch.zeros(96), f"{Q}.lora_B.bias": torch.zeros(96)},
        "one change of the bias"),
}  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGED)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    tensors, message = _DAMAGED[damage]
    path = _write(tmp_path / "a.safetensors", **tensors)
    with pytest.raises(CheckpointError, match=message):
        open_lora(path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "another transformer"),
        ("diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight", "VACE"),
        ("diffusion_model.blocks.0.self_attn.q.lora_Z.weight", "unknown keys"),
    ],
)
def test_unknown_keys_are_named_with_their_count(
    key: str, kind: str, source: ComponentSource, tmp_path: Path
) -> None:
    path = _write(tmp_path / "a.safetensors", **_pair(), **{key: torch.zeros(2, 96)})
    with pytest.raises(CheckpointError, match="1 unknown keys beside 1 known layers") as caught:
        open_lora(path).check(source)
    assert key in str(caught.value)
    assert kind in str(caught.value)


def test_a_lora_of_another_size_or_task_says_what_it_is_for(
    source: ComponentSource, t2v_folder: Path, tmp_path: Path
) -> None:
    big = _write(tmp_path / "big.safetensors", **_pair(2, 5120))
    with pytest.raises(TensorMismatch, match=r"LoRA for Wan2\.1 14B \(5120 wide, 1 blocks\)"):
        open_lora(big).check(source)
    pictured = made.pairs(source, ["blocks.0.attn2.add_k_proj", "blocks.0.attn1.to_q"])
    path = made.write_comfy(tmp_path / "i2v.safetensors", pictured)
    open_lora(path).check(source)
    text_only = locate(t2v_folder).streamed
    with pytest.raises(TensorMismatch, match=r"Wan2\.1 I2V .*this model is Wan2\.1 T2V.*k_img"):
        open_lora(path).check(text_only)
    deep = {name.replace("blocks.0.", "blocks.77."): t for name, t in _pair().items()}
    with pytest.raises(TensorMismatch, match=r"78 blocks.*expected no diffusion_model\.blocks\.77"):
        open_lora(_write(tmp_path / "deep.safetensors", **deep)).check(source)


def test_pickles_and_models_are_no_loras(i2v_folder: Path, tmp_path: Path) -> None:
    torch.save(_pair(), tmp_path / "a.pt")
    with pytest.raises(PickleRefused):
        open_lora(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is not a LoRA"):
        open_lora(i2v_folder / "transformer")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_lora(tmp_path / "b.safetensors")


def test_opening_reads_no_matrix(
    source: ComponentSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = made.linears(source, outside=False)
    path = made.write_kohya(tmp_path / "a.safetensors", made.pairs(source, modules, 64))
    with Checkpoint.open(path) as found:
        largest = max(e.nbytes for key, e in found.items() if key.endswith("alpha"))
    read: list[int] = []
    from penstock.engine.lora import file as lora

    original = lora.read_bytes
    monkeypatch.setattr(lora, "read_bytes", lambda e: read.append(e.nbytes) or original(e))
    PlacedLoras.open(source, [Lora(path)])
    assert read == [largest] * len(modules)


def test_blocks_with_the_same_loras_share_a_module(
    i2v_folder: Path, source: ComponentSource, tmp_path: Path
) -> None:
    some = [m for m in made.linears(source, outside=False) if not m.startswith("blocks.2.")]
    path = made.write_comfy(tmp_path / "a.safetensors", made.pairs(source, some))
    templates = ModelFiles.open(i2v_folder, loras=[Lora(path)]).transformer.templates
    assert len({id(module) for module in templates}) == 2
    assert templates[2] is not templates[1] is templates[3]


def test_inspect_says_what_it_is(source: ComponentSource, tmp_path: Path) -> None:
    modules = made.linears(source, outside=False)
    low = made.pairs(source, modules, rank=4)
    path = made.write_kohya(tmp_path / "a.safetensors", low, alpha=2)
    found = inspect(path)
    assert isinstance(found, LoraInspection)
    assert found.ranks == {4: len(modules)}
    assert found.scales == (0.5,)
    assert found.styles == ("Kohya",)
    assert found.differences == 0
    assert found.arguments == ("--lora", str(path))
    text = "\n".join(found.lines())
    for part in ("LoRA for Wan2.1 I2V", "96 wide", "Kohya", "rank 4", "alpha / rank 0.5", "F32"):
        assert part in text
    stranger = {"lora_te_text_model_encoder.lora_down.weight": torch.ones(2, 96)}
    mixed = _write(tmp_path / "b.safetensors", **_pair(), **stranger)
    other = inspect(mixed)
    assert isinstance(other, LoraInspection)
    assert other.arguments == ("--lora", str(mixed))
    assert "1 unknown keys" in "\n".join(other.lines()) and other.kind == "a text encoder's LoRA"


def test_inspect_of_another_models_lora_promises_nothing(tmp_path: Path) -> None:
    key = "lora_unet_input_blocks_1_1_proj_in"
    pair = {f"{key}.lora_down.weight": torch.ones(2, 8), f"{key}.lora_up.weight": torch.ones(8, 2)}
    found = inspect(_write(tmp_path / "a.safetensors", **pair))
    assert isinstance(found, LoraInspection) and not found.arguments
    text = "\n".join(found.lines())
    assert f"a UNet's LoRA, not run: 2 keys, none of a known layer: {key}" in text
    assert "Wan" not in text and "left out" not in text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dora by outputs", "DoRA"), ("loha", "LoHa"), ("lokr", "LoKr"), ("glora", "GLoRA"),
        ("oft", "OFT"), ("boft", "BOFT"), ("whole weights", "whole weights"),
        ("differences", "differences"),
    ],
)  # fmt: skip
def test_inspect_names_the_kind(
    kind: str, said: str, source: ComponentSource, tmp_path: Path
) -> None:
    modules = kinds.some_modules(source.shapes)
    found = inspect(kinds.make(kind, source.shapes, modules).write(tmp_path / "a.safetensors"))
    assert isinstance(found, LoraInspection)
    assert f"{len(modules)} {said}" in "\n".join(found.lines())
    assert not found.unknown and found.arguments


def test_describing_a_lora_does_not_import_torch(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.safetensors", **_pair())
    code = (
        "import sys; from pathlib import Path; from penstock.engine.inspect import inspect;"
        f"inspect(Path({str(path)!r})); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_bfloat16_models_and_quantised_ones_take_them(tmp_path: Path) -> None:
    """Norms, tables and convolutions of another type than the network's are added as well."""
    folder = write_tiny_model(
        tmp_path / "m", dtype=torch.bfloat16, image_to_video=False, vae={"base_dim": 8}
    )
    source = locate(folder).streamed
    dim = source.shapes["scale_shift_table"][2]
    path = _write(
        tmp_path / "a.safetensors",
        **{
            "diffusion_model.patch_embedding.lora_down.weight": torch.randn(2, 16, 1, 2, 2),
            "diffusion_model.patch_embedding.lora_up.weight": torch.randn(dim, 2, 1, 1, 1),
            "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, dim),
            "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.randn(dim),
        },
    )
    files = ModelFiles.open(folder, loras=[Lora(path, 0.5)])
    given = made.inputs(files.transformer.module.config)
    halves = tuple(None if t is None else t.bfloat16() for t in given[:3])
    plain = made.ours(ModelFiles.open(folder), (*halves, given[3]), chunk=7)
    found = made.ours(files, (*halves, given[3]), chunk=7)
    assert found.dtype == torch.bfloat16
    assert (found - plain).abs().max() > 0.01


def _left_out(source: ComponentSource, path: Path) -> tuple[str, ...]:
    (placed,) = PlacedLoras.open(source, [Lora(path)]).files
    return tuple(name for miss in placed.left_out for name in miss.names)


_STRANGERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "another input layer": (
        {"diffusion_model.patch_embedding.diff": torch.zeros(96, 16, 1, 2, 2)}, "beside a weight"),
    "a layer that is not there": (
        {"diffusion_model.blocks.77.self_attn.q.diff_b": torch.zeros(96)}, "no such layer"),
    "a text encoder": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, "text encoder"),
    "a stray alpha": ({"diffusion_model.blocks.1.ffn.0.alpha": torch.tensor(1.0)}, "belongs to"),
    "a stray magnitude": (
        {"diffusion_model.blocks.1.ffn.0.dora_scale": torch.ones(96)}, "belongs to"),
    "a Tucker form": (
        {"diffusion_model.blocks.1.ffn.0.lora_mid.weight": torch.ones(2, 2, 1, 1)}, "Tucker"),
    "half a grown layer": (
        {"diffusion_model.patch_embedding.lora_down.weight": torch.zeros(2, 52, 1, 2, 2),
         "diffusion_model.patch_embedding.lora_up.weight": torch.zeros(96, 2, 1, 1, 1),
         "diffusion_model.patch_embedding.reshape_weight": torch.tensor([96, 20, 1, 2, 2])},
        "beside a weight"),
    "a magnitude of another layer": (
        {"diffusion_model.blocks.1.self_attn.q.lora_A.weight": torch.zeros(2, 96),
         "diffusion_model.blocks.1.self_attn.q.lora_B.weight": torch.zeros(96, 2),
         "diffusion_model.blocks.1.self_attn.q.dora_scale": torch.ones(95, 1)}, "beside a weight"),
}  # fmt: skip


@pytest.mark.parametrize("stranger", _STRANGERS)
def test_what_has_no_place_is_left_out_and_named(
    stranger: str, source: ComponentSource, tmp_path: Path
) -> None:
    tensors, why = _STRANGERS[stranger]
    path = _write(tmp_path / "a.safetensors", **_pair(), **tensors)
    placed = PlacedLoras.open(source, [Lora(path)])
    (file,) = placed.files
    assert file.layers.keys() == {"blocks.0.attn1.to_q"}
    names = _left_out(source, path)
    assert {*names} <= {*tensors} and names
    (notice,) = placed.notices
    assert f"a.safetensors: {len(names)} of {2 + len(tensors)} tensors" in notice
    assert names[0] in notice and why in notice and "--lora-strict" in notice
    assert "left out" in placed.origins()[0].value
    with pytest.raises(CheckpointError):
        PlacedLoras.open(source, [Lora(path, strict=True)])
    whole = _write(tmp_path / "b.safetensors", **_pair())
    assert not PlacedLoras.open(source, [Lora(whole, strict=True)]).notices


def test_a_lora_of_which_nothing_fits_is_refused(source: ComponentSource, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.safetensors", **_pair(2, 5120))
    with pytest.raises(TensorMismatch, match="5120 wide"):
        PlacedLoras.open(source, [Lora(path)])
    stranger = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    other = _write(tmp_path / "b.safetensors", **{stranger: torch.zeros(2, 96)})
    with pytest.raises(CheckpointError, match="1 unknown keys"):
        PlacedLoras.open(source, [Lora(other)])


def test_a_lora_of_this_size_is_not_said_to_be_of_another(
    source: ComponentSource, tmp_path: Path
) -> None:
    wrong = {"diffusion_model.patch_embedding.diff": torch.zeros(96, 16, 1, 2, 2)}
    path = _write(tmp_path / "a.safetensors", **_pair(), **wrong)
    with pytest.raises(TensorMismatch) as caught:
        open_lora(path).check(source)
    assert "not wholly for this model" in str(caught.value)
    assert "another size" not in str(caught.value) and "1 tensors do not fit" in str(caught.value)


def test_names_without_a_config_are_as_trained(source: ComponentSource, tmp_path: Path) -> None:
    """PEFT's folder has a config; other writers of its prefix keep alphas, or have none."""
    start = "base_model.model.diffusion_model.blocks.0.self_attn.q"
    down, up = _pair().values()
    pair = {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    path = _write(tmp_path / "a.safetensors", **pair)
    assert open_lora(path).layers["blocks.0.attn1.to_q"].scale == 1.0
    start = "base_model.model.blocks.0.attn1.to_q"
    pair = {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    path = _write(tmp_path / "b.safetensors", **pair, **{f"{start}.alpha": torch.tensor(1.0)})
    assert open_lora(path).layers["blocks.0.attn1.to_q"].scale == 0.5


def test_an_alpha_of_the_config_is_finite(tmp_path: Path) -> None:
    start = "base_model.model.blocks.0.attn1.to_q"
    down, up = _pair().values()
    path = _write(tmp_path / "adapter_model.safetensors",
                  **{f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up})  # fmt: skip
    for value in ("NaN", "Infinity"):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 2, "lora_alpha": {value}}}')
        with pytest.raises(CheckpointError, match="lora_alpha' as a finite number"):
            open_lora(path)


def test_a_dora_of_pefts_is_that_of_peft(tmp_path: Path) -> None:
    """Its magnitudes by rows, its alpha from its config."""
    from peft import LoraConfig, get_peft_model

    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([
        torch.nn.ModuleDict({"attn1": torch.nn.ModuleDict({"to_q": torch.nn.Linear(96, 96)})})
    ])})  # fmt: skip
    weight = net["blocks"][0]["attn1"]["to_q"].weight.detach().clone()
    peft = get_peft_model(
        net, LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q"])
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter).abs())
    peft.save_pretrained(tmp_path)
    file = open_lora(tmp_path)
    (change,) = file.layers["blocks.0.attn1.to_q"].weights
    stored = {e.name: t for e in change.entries.values() for t in [_stored(tmp_path, e.name)]}
    merged = weight.clone()
    tensors = {role: stored[entry.name] for role, entry in change.entries.items()}
    apply(change.patch(0, 1.0, 96), merged, tensors)
    expected = peft.merge_and_unload()["blocks"][0]["attn1"]["to_q"].weight
    assert (expected - weight).abs().max() > 0.01
    assert (merged - expected).abs().max() <= 1e-5


def _stored(folder: Path, name: str) -> Tensor:
    with Checkpoint.open(folder) as found:
        return found.read(name)
