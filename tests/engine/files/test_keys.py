"""Every project's layout of the same model loads to the same tensors; foreign files are refused."""

import base64
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.dequantise import gguf_blocks
from penstock.engine.files.formats import compute_tag, linear_formats
from penstock.engine.files.keys import recognise
from penstock.engine.files.locate import open_component
from penstock.engine.files.reader import WeightReader
from penstock.engine.files.source import open_raw
from penstock.errors import CheckpointError, HeaderError, PickleRefused, TensorMismatch
from penstock.formats.gguf import GGUF_FORMATS
from tests.engine import golden


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden.write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def parts(model):
    return {part: golden.load(model, part) for part in golden.PARTS}


def values_of(path, component, config=None):
    """All parameters of a file in fp32, after every check."""
    source = recognise(open_raw(path), config)
    source.check()
    assert source.component == component
    with WeightReader(source) as reader:
        return source, {name: reader.read(name, torch.float32) for name in source.weights}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor.float()), name


@pytest.mark.parametrize("part", golden.PARTS)
def test_diffusers_folder(model, parts, part):
    config = json.loads((model / part / "config.json").read_text())
    source, values = values_of(model / part, part, config)
    assert_equal(values, parts[part])
    assert source.label() == "bf16"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", ["bf16", "fp16", "fp32"])
def test_original_transformer(tmp_path, model, parts, prefix, spelling):
    tensors = parts["transformer"]
    names = golden.original_names("transformer", list(tensors))
    made = golden.make(tensors, names, spelling, prefix)
    source, values = values_of(made.save(tmp_path / "x.safetensors"), "transformer")
    assert_equal(values, made.values)
    assert (source.naming, source.label()) == ("Wan", spelling)
    theirs = json.loads((model / "transformer" / "config.json").read_text())
    assert {k: source.config[k] for k in source.config} == {k: theirs[k] for k in source.config}


SPELLINGS = {
    "raw fp8": ("fp8 raw", "fp8", "fp8"),
    "everything fp8": ("fp8 raw", "fp8", "fp8"),
    "raw e5m2": ("fp8-e5m2 raw", "fp8-e5m2", None),
    "comfy old e5m2": ("fp8-e5m2 per tensor", "fp8-e5m2", None),
    "comfy new e5m2": ("fp8-e5m2 per tensor", "fp8-e5m2", None),
    "comfy old": ("fp8 per tensor", "fp8", "fp8"),
    "comfy old exact": ("fp8 per tensor", "fp8", None),
    "comfy new": ("fp8 per tensor", "fp8", "fp8"),
    "comfy metadata": ("fp8 per tensor", "fp8", "fp8"),
    "comfy int8": ("int8 per tensor", "int8", "int8"),
    "comfy int8 rows": ("int8 per row", "int8", "int8"),
    "comfy convrot 64": ("int8-convrot per row", "int8-convrot", "int8"),
    "comfy convrot 16": ("int8-convrot per row", "int8-convrot", "int8"),
    "comfy nvfp4": ("nvfp4", "nvfp4", "nvfp4"),
    "comfy mxfp8": ("mxfp8", "mxfp8", "mxfp8"),
    "torchao int8": ("int8 per row", "int8", "int8"),
    "torchao fp8": ("fp8 per row", "fp8", "fp8"),
    "bitsandbytes nf4": ("nf4", "nf4", None),
    "bitsandbytes nf4 nested": ("nf4 nested", "nf4", None),
    "lightx2v int8": ("int8 per row", "int8", "int8"),
    "lightx2v fp8": ("fp8 per row", "fp8", "fp8"),
    "quanto int8": ("quanto-int8", "quanto-int8", "int8"),
    "quanto fp8": ("quanto-fp8", "quanto-fp8", "fp8"),
    "quanto int4": ("quanto-int4", "quanto-int4", None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("part, prefix", [("transformer", ""), ("transformer", "model."),
                                          ("text_encoder", "")])  # fmt: skip
def test_quantised_safetensors(tmp_path, model, parts, part, prefix, spelling):
    tensors = parts[part]
    made = golden.make(tensors, golden.original_names(part, list(tensors)), spelling, prefix)
    config = None
    if spelling == "quanto int4":
        config = json.loads((model / part / "config.json").read_text())
    source, values = values_of(made.save(tmp_path / "x.safetensors"), part, config)
    assert_equal(values, made.values)
    label, name, gemm = SPELLINGS[spelling]
    assert source.label() == label
    formats = linear_formats(source)
    quantised = {n for n, t in tensors.items() if golden.is_block_matrix(n, t)}
    assert {f"{n}.weight" for n in formats} >= quantised
    assert {(f.name, getattr(f, "gemm", None)) for f in formats.values()} == {(name, gemm)}


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "F16"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_gguf(tmp_path, parts, part, kind):
    tensors, path = parts[part], tmp_path / "x.gguf"
    names = golden.original_names(part, list(tensors))
    if part == "text_encoder":
        names = golden.llama_names(list(tensors))
    values = golden.write_gguf(path, tensors, names, kind, "wan")
    source, found = values_of(path, part)
    assert_equal(found, values)
    assert source.label() == ("fp16" if kind == "F16" else f"gguf-{kind.lower()}")
    assert compute_tag(source) == ("F16" if kind == "F16" else "BF16")


def test_a_file_in_fp64(tmp_path, parts):
    tensors = parts["transformer"]
    names = golden.original_names("transformer", list(tensors))
    path = tmp_path / "x.safetensors"
    save_file({names[name]: tensor.double() for name, tensor in tensors.items()}, path)
    source, values = values_of(path, "transformer")
    assert_equal(values, tensors)
    assert source.label() == "fp64" and compute_tag(source) == "F32"


def test_mmgp_files_carry_their_config(tmp_path, model, parts):
    """Keys are optimum-quanto's; 4-bit groups tell no shapes, the config in the header does."""
    tensors, path = parts["transformer"], tmp_path / "x.safetensors"
    made = golden.make(tensors, {name: name for name in tensors}, "quanto int4")
    made.save(path)
    with pytest.raises(TensorMismatch, match=r"does not determine its shapes.*config\.json"):
        open_component(path)
    config = (model / "transformer" / "config.json").read_bytes()
    text = base64.b64encode(config).decode()
    made.metadata |= {"quantization_format": "quanto", "config_base64": text}
    source = open_component(made.save(path))
    source.check()
    with WeightReader(source) as reader:
        assert_equal({n: reader.read(n, torch.float32) for n in source.weights}, made.values)
    made.metadata["config_base64"] = "{"
    with pytest.raises(CheckpointError, match="config_base64 in the header"):
        open_component(made.save(path))


def test_zero_points_that_move_the_weights_are_refused(tmp_path, parts):
    tensors = parts["transformer"]
    made = golden.make(tensors, golden.original_names("transformer", list(tensors)), "torchao int8")
    name = next(key for key in made.file if key.endswith("_weight_zero_point"))
    made.file[name][3] = 1
    with pytest.raises(CheckpointError, match=r"_weight_zero_point moves .*symmetric"):
        recognise(open_raw(made.save(tmp_path / "x.safetensors")))


@pytest.mark.parametrize("change", [{"quant_type": "fp4"}, {"shape": [3, 5]}, {"blocksize": None}])
def test_what_bitsandbytes_says_is_checked(tmp_path, parts, change):
    tensors = parts["transformer"]
    names = golden.original_names("transformer", list(tensors))
    made = golden.make(tensors, names, "bitsandbytes nf4")
    name = next(key for key in made.file if "quant_state" in key)
    said = json.loads(bytes(made.file[name].tolist())) | change
    made.file[name] = golden._json_tensor(said)
    with pytest.raises(CheckpointError, match="quantised by bitsandbytes in a way"):
        recognise(open_raw(made.save(tmp_path / "x.safetensors")))


@pytest.mark.parametrize("fmt", GGUF_FORMATS, ids=lambda fmt: fmt.name)
def test_every_ggml_type_is_read_from_a_file(tmp_path, parts, fmt):
    tensors, path = parts["transformer"], tmp_path / "x.gguf"
    names = golden.original_names("transformer", list(tensors))

    def blocks(data, ggml):
        return gguf_blocks(fmt, *data.shape).numpy()

    values = golden.write_gguf(path, tensors, names, fmt.ggml_type, "wan", blocks)
    source, found = values_of(path, "transformer")
    assert_equal(found, values)
    assert source.label() == fmt.name
    assert set(linear_formats(source).values()) == {fmt}


def test_a_known_type_that_is_not_read_is_named(tmp_path, parts, monkeypatch):
    tensors, path = parts["transformer"], tmp_path / "x.gguf"
    names = golden.original_names("transformer", list(tensors))

    def blocks(data, ggml):
        return np.zeros((len(data), data.shape[1] // 128 * 18), np.uint8)

    monkeypatch.setattr(golden.quants, "dequantize", lambda stored, ggml: stored)
    golden.write_gguf(path, tensors, names, "Q1_0", "wan", blocks)
    with pytest.raises(CheckpointError, match="gguf-q1_0.*Q8_0") as refused:
        recognise(open_raw(path))
    assert "damaged" not in str(refused.value)


def test_sharded_files_of_the_original_repository(tmp_path, parts):
    tensors = parts["transformer"]
    names = golden.original_names("transformer", list(tensors))
    keys = sorted(names.values())
    files = {key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors"
             for i, key in enumerate(keys)}  # fmt: skip
    by_key = {names[name]: tensor for name, tensor in tensors.items()}
    for file in set(files.values()):
        save_file({k: by_key[k] for k in keys if files[k] == file}, tmp_path / file)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in (index, tmp_path):
        _, values = values_of(path, "transformer")
        assert_equal(values, tensors)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_original_vae(tmp_path, parts, prefix):
    tensors = parts["vae"]
    made = golden.make(tensors, golden.original_names("vae", list(tensors)), "fp32", prefix)
    source, values = values_of(made.save(tmp_path / "x.safetensors"), "vae")
    assert_equal(values, tensors)
    assert source.title == "Wan VAE (8 wide)"


@pytest.mark.parametrize("names", ["original", "transformers"])
def test_umt5_single_files(tmp_path, parts, names):
    tensors = parts["text_encoder"]
    table = {name: name for name in tensors}
    if names == "original":
        table = golden.original_names("text_encoder", list(tensors))
    made = golden.make(tensors, table, "fp16")
    made.file["spiece_model"] = torch.arange(9, dtype=torch.uint8)
    source, values = values_of(made.save(tmp_path / "x.safetensors"), "text_encoder")
    assert_equal(values, made.values)
    assert source.extras["spiece_model"].nbytes == 9


def test_umt5_embedding_under_its_other_name(tmp_path, parts):
    tensors = dict(parts["text_encoder"])
    file = dict(tensors)
    file["encoder.embed_tokens.weight"] = file.pop("shared.weight")
    save_file(file, tmp_path / "one.safetensors")
    assert_equal(values_of(tmp_path / "one.safetensors", "text_encoder")[1], tensors)
    file["shared.weight"] = tensors["shared.weight"].clone()
    save_file(file, tmp_path / "both.safetensors")
    assert_equal(values_of(tmp_path / "both.safetensors", "text_encoder")[1], tensors)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_clip_of_transformers(tmp_path, parts, prefix):
    tensors = parts["image_encoder"]
    file = {prefix + name: tensor for name, tensor in tensors.items()}
    file["visual_projection.weight"] = torch.zeros(16, 80)
    file[prefix + "embeddings.position_ids"] = torch.arange(17)
    save_file(file, tmp_path / "x.safetensors")
    assert_equal(values_of(tmp_path / "x.safetensors", "image_encoder")[1], tensors)


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_clip_of_wan(tmp_path, parts, prefix):
    file = {prefix + key: value.contiguous() for key, value
            in golden.open_clip(parts["image_encoder"]).items()}  # fmt: skip
    file["log_scale"] = torch.zeros(())
    save_file(file, tmp_path / "x.safetensors")
    source, values = values_of(tmp_path / "x.safetensors", "image_encoder")
    assert_equal(values, parts["image_encoder"])
    first, second = (source.weights[f"encoder.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    assert first.tensors["weight"].offset + first.nbytes == second.tensors["weight"].offset


def damaged(parts, change):
    tensors = parts["transformer"]
    names = golden.original_names("transformer", list(tensors))
    made = golden.make(tensors, names, "bf16")
    change(made.file)
    return made


def _drop(*keys):
    def change(file):
        for key in keys:
            del file[key]

    return change


def _add(*keys, shape=(2,)):
    def change(file):
        for key in keys:
            file[key] = torch.zeros(shape)

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (
            _add("strange_blocks.0.x", "blocks.1.extra.weight"),
            ["2 unknown", "blocks.1.extra.weight"],
        ),
        (_add("blocks.2.self_attn.q.weight", shape=(256, 256)), ["missing", "blocks.2."]),
        (_add("img_emb.emb_pos"), ["embedder.pos_embed with 3 dimensions", "shape [2]"]),
        (_drop("blocks.1.ffn.2.bias", "blocks.1.norm3.bias"), ["2 missing", "blocks.1.norm2.bias"]),
        (_drop("head.head.weight"), ["proj_out.weight"]),
        (_add("blocks.1.ffn.2.bias", shape=(255,)), ["1 misshaped", "blocks.1.ffn.net.2.bias"]),
    ],
)
def test_half_known_files_are_refused(tmp_path, parts, change, words):
    path = damaged(parts, change).save(tmp_path / "x.safetensors")
    with pytest.raises(TensorMismatch) as caught:
        recognise(open_raw(path)).check()
    for word in words:
        assert word in str(caught.value)


def test_foreign_files_are_refused(tmp_path):
    save_file({f"layer.{i}": torch.zeros(1) for i in range(7)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"7 unknown tensors, the first is layer\.0"):
        recognise(open_raw(tmp_path / "x.safetensors"))
    name = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
    save_file({name: torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="a LoRA"):
        recognise(open_raw(tmp_path / "lora.safetensors"))
    (tmp_path / "x.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(PickleRefused, match=r"\.safetensors"):
        open_raw(tmp_path / "x.pth")
    (tmp_path / "y.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(HeaderError):
        open_raw(tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_raw(tmp_path / "none.safetensors")


def _fp8(file, key="blocks.0.ffn.0"):
    file[f"{key}.weight"] = file[f"{key}.weight"].to(torch.float8_e4m3fn)


def _rotated(file):
    _fp8(file)  # of 8-bit floats no rotation is known
    config = {"format": "int8_tensorwise", "convrot": True}
    file["blocks.0.ffn.0.comfy_quant"] = golden._json_tensor(config)
    file["blocks.0.ffn.0.weight_scale"] = torch.ones(1)


def _blockwise(file):
    _fp8(file)
    file["blocks.0.ffn.0.comfy_quant"] = golden._json_tensor({"format": "int8_blockwise"})


def _no_json(file):
    file["blocks.0.ffn.0.comfy_quant"] = torch.tensor([1, 2, 3], dtype=torch.uint8)


def _e8m0(file):
    file["blocks.0.ffn.0.weight"] = file["blocks.0.ffn.0.weight"].to(torch.float8_e8m0fnu)


def _int8_without_scale(file):
    file["blocks.0.ffn.0.weight"] = file["blocks.0.ffn.0.weight"].to(torch.int8)


def _scale_alone(file):
    file["blocks.0.ffn.0.weight_scale"] = torch.ones(1)
    del file["blocks.0.ffn.0.weight"]


@pytest.mark.parametrize(
    "change, word",
    [
        (_rotated, "convrot"),
        (_blockwise, "int8_blockwise"),
        (_no_json, "comfy_quant"),
        (_e8m0, "F8_E8M0"),
        (_int8_without_scale, "I8"),
        (_scale_alone, "no weight"),
    ],
)
def test_storages_that_are_not_read_are_refused(tmp_path, parts, change, word):
    path = damaged(parts, change).save(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=word):
        recognise(open_raw(path))


def test_a_config_that_does_not_fit_is_refused(model, parts):
    config = json.loads((model / "transformer" / "config.json").read_text())
    with pytest.raises(TensorMismatch, match=r"missing, the first is blocks\.2\."):
        recognise(open_raw(model / "transformer"), config | {"num_layers": 3}).check()
    del config["ffn_dim"]
    with pytest.raises(CheckpointError, match="ffn_dim"):
        recognise(open_raw(model / "transformer"), config)


def test_rows_are_read_alone_from_every_storage(tmp_path, parts):
    tensors = parts["text_encoder"]
    names = golden.llama_names(list(tensors))
    values = golden.write_gguf(tmp_path / "x.gguf", tensors, names, "Q8_0", "t5encoder")
    source = recognise(open_raw(tmp_path / "x.gguf"))
    with WeightReader(source) as reader:
        rows = reader.read_rows("shared.weight", 3, 9, torch.float32)
    assert torch.equal(rows, values["shared.weight"][3:9])
