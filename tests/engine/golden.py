"""Files as other projects name and store them, made from one tiny model.

Names are written out here once more, independently of the package's own tables: for transformer and
VAE they are the inverse of diffusers' converters, for UMT5 and CLIP spelled out from the modules of
the project that wrote them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file, save_file

from penstock.engine.families.wan.tiny import write_tiny_model
from tests.quanto_python import python_unpack

SIZES = {
    "transformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "ffn_dim": 512,
        "num_layers": 2,
        "freq_dim": 64,
        "text_dim": 64,
        "rope_max_seq_len": 1024,
        "added_kv_proj_dim": 256,
    },
    "vae": {"base_dim": 8, "num_res_blocks": 2},
    "text": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "image": {
        "hidden_size": 80,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 32,
        "patch_size": 8,
    },
}
PARTS = ("transformer", "vae", "text_encoder", "image_encoder")


def write_model(folder: Path, *, image_to_video: bool = True) -> Path:
    """A tiny model whose head widths are the official ones, so that shapes tell its config."""
    sizes = {key: dict(value) for key, value in SIZES.items()}
    if not image_to_video:
        del sizes["transformer"]["added_kv_proj_dim"]
    return write_tiny_model(folder, image_to_video=image_to_video, dtype=torch.bfloat16, **sizes)


def load(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """All tensors of a component under the names the network itself has."""
    tensors = {}
    for path in sorted((folder / part).glob("*.safetensors")):
        tensors |= load_file(path)
    strip = "vision_model."
    tensors = {name.removeprefix(strip): tensor for name, tensor in tensors.items()}
    tensors.pop("encoder.embed_tokens.weight", None)
    return tensors


def original_names(part: str, names: list[str]) -> dict[str, str]:
    """The original author's key of each of ``names``."""
    makers = {"transformer": _transformer, "vae": _vae, "text_encoder": _text}
    return makers[part](names)


def _inverse(converter, candidates: list[str]) -> dict[str, str]:
    handles = {key: SimpleNamespace(key=key) for key in candidates}
    return {name: handle.key for name, handle in converter(handles).items()}


def _transformer(names: list[str]) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    layers = 1 + max(int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name)))
    pair = ("weight", "bias")
    outer = ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
             "time_embedding.2", "time_projection.1", "head.head", *(f"img_emb.proj.{i}" for i in
             (0, 1, 3, 4)))  # fmt: skip
    keys = [f"{name}.{end}" for name in outer for end in pair] + ["head.modulation"]
    inner = [f"{a}.{n}" for a in ("self_attn", "cross_attn") for n in "qkvo"]
    inner += ["cross_attn.k_img", "cross_attn.v_img", "norm3", "ffn.0", "ffn.2"]
    norms = [f"{a}.norm_{n}.weight" for a in ("self_attn", "cross_attn") for n in "qk"]
    norms += ["cross_attn.norm_k_img.weight", "modulation"]
    for layer in range(layers):
        keys += [f"blocks.{layer}.{name}.{end}" for name in inner for end in pair]
        keys += [f"blocks.{layer}.{name}" for name in norms]
    table = _inverse(convert_wan_transformer_to_diffusers, keys)
    return {name: table[name] for name in names}


def _vae(names: list[str]) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    residual = [f"residual.{i}.{e}" for i in (2, 6) for e in ("weight", "bias")]
    residual += ["residual.0.gamma", "residual.3.gamma", "shortcut.weight", "shortcut.bias"]
    resample = [f"{n}.{e}" for n in ("resample.1", "time_conv") for e in ("weight", "bias")]
    keys = [f"conv{i}.{e}" for i in (1, 2) for e in ("weight", "bias")]
    for half, blocks, count in (("encoder", "downsamples", 11), ("decoder", "upsamples", 15)):
        keys += [f"{half}.{n}.{e}" for n in ("conv1", "head.2") for e in ("weight", "bias")]
        keys += [f"{half}.head.0.gamma", f"{half}.middle.1.norm.gamma"]
        keys += [f"{half}.middle.1.{n}.{e}" for n in ("to_qkv", "proj") for e in ("weight", "bias")]
        keys += [f"{half}.middle.{i}.{n}" for i in (0, 2) for n in residual]
        for place in range(count):
            ends = resample if half == "decoder" and place % 4 == 3 else residual
            if half == "encoder" and place % 3 == 2:
                ends = resample
            keys += [f"{half}.{blocks}.{place}.{n}" for n in ends]
    table = _inverse(convert_wan_vae_to_diffusers, keys)
    return {name: table[name] for name in names}


def _text(names: list[str]) -> dict[str, str]:
    table = {"shared.weight": "token_embedding.weight"}
    table["encoder.final_layer_norm.weight"] = "norm.weight"
    for layer in range(SIZES["text"]["num_layers"]):
        new, old = f"encoder.block.{layer}.layer.", f"blocks.{layer}."
        for letter in "qkvo":
            table[f"{new}0.SelfAttention.{letter}.weight"] = f"{old}attn.{letter}.weight"
        bias = f"{new}0.SelfAttention.relative_attention_bias.weight"
        table[bias] = f"{old}pos_embedding.embedding.weight"
        table[f"{new}0.layer_norm.weight"] = f"{old}norm1.weight"
        table[f"{new}1.layer_norm.weight"] = f"{old}norm2.weight"
        table[f"{new}1.DenseReluDense.wi_0.weight"] = f"{old}ffn.gate.0.weight"
        table[f"{new}1.DenseReluDense.wi_1.weight"] = f"{old}ffn.fc1.weight"
        table[f"{new}1.DenseReluDense.wo.weight"] = f"{old}ffn.fc2.weight"
    return {name: table[name] for name in names}


def llama_names(names: list[str]) -> dict[str, str]:
    """llama.cpp's tensor names of a T5 encoder."""
    table = {"shared.weight": "token_embd.weight"}
    table["encoder.final_layer_norm.weight"] = "enc.output_norm.weight"
    for layer in range(SIZES["text"]["num_layers"]):
        new, old = f"encoder.block.{layer}.layer.", f"enc.blk.{layer}."
        for letter in "qkvo":
            table[f"{new}0.SelfAttention.{letter}.weight"] = f"{old}attn_{letter}.weight"
        table[f"{new}0.SelfAttention.relative_attention_bias.weight"] = f"{old}attn_rel_b.weight"
        table[f"{new}0.layer_norm.weight"] = f"{old}attn_norm.weight"
        table[f"{new}1.layer_norm.weight"] = f"{old}ffn_norm.weight"
        table[f"{new}1.DenseReluDense.wi_0.weight"] = f"{old}ffn_gate.weight"
        table[f"{new}1.DenseReluDense.wi_1.weight"] = f"{old}ffn_up.weight"
        table[f"{new}1.DenseReluDense.wo.weight"] = f"{old}ffn_down.weight"
    return {name: table[name] for name in names}


def open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The image encoder as Wan's own ``clip.py`` names it: fused q, k, v, batched embeddings."""
    keys = {
        "patch_embedding.weight": tensors["embeddings.patch_embedding.weight"],
        "cls_embedding": tensors["embeddings.class_embedding"][None, None],
        "pos_embedding": tensors["embeddings.position_embedding.weight"][None],
        "head": torch.zeros(80, 16),
    }
    for old, new in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm")):
        keys |= {f"{old}.{end}": tensors[f"{new}.{end}"] for end in ("weight", "bias")}
    for layer in range(SIZES["image"]["num_hidden_layers"]):
        new, old = f"encoder.layers.{layer}.", f"transformer.{layer}."
        for end in ("weight", "bias"):
            fused = [tensors[f"{new}self_attn.{n}_proj.{end}"] for n in "qkv"]
            keys[f"{old}attn.to_qkv.{end}"] = torch.cat(fused)
            keys[f"{old}attn.proj.{end}"] = tensors[f"{new}self_attn.out_proj.{end}"]
            for theirs, ours in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                                 ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):  # fmt: skip
                keys[f"{old}{theirs}.{end}"] = tensors[f"{new}{ours}.{end}"]
    return keys


def is_block_matrix(name: str, tensor: torch.Tensor) -> bool:
    """What every author quantises: the matrices of the blocks."""
    return tensor.ndim == 2 and "block" in name and "relative" not in name and "norm" not in name


class Stored:
    """A file being made: its tensors, its header metadata, and the values it stands for."""

    def __init__(self) -> None:
        self.file: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {"format": "pt"}
        self.values: dict[str, torch.Tensor] = {}

    def save(self, path: Path) -> Path:
        tensors = {key: tensor.contiguous().clone() for key, tensor in self.file.items()}
        save_file(tensors, path, self.metadata)
        return path


FP8 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


def scaled(
    weight: torch.Tensor, dtype: torch.dtype, per_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit weight and fp32 scale, ``(rows, 1)`` or a scalar."""
    largest = {FP8: 448.0, E5M2: 57344.0, torch.int8: 127.0}[dtype]
    amax = weight.float().abs().amax(dim=1, keepdim=True)
    scale = (amax if per_row else amax.max()) / largest
    small = weight.float() / scale
    return (small.round() if dtype == torch.int8 else small).to(dtype), scale


def make(tensors, names, spelling: str, prefix: str = "") -> Stored:
    """A safetensors file of ``tensors`` under ``names`` in one project's ``spelling``."""
    stored = Stored()
    layers = {}
    for name, tensor in tensors.items():
        key = prefix + names[name]
        if spelling in ("bf16", "fp16", "fp32") or not is_block_matrix(name, tensor):
            plain = {"fp16": torch.float16, "fp32": torch.float32}.get(spelling, torch.bfloat16)
            everything = spelling == "everything fp8"
            stored.file[key] = tensor.to(FP8 if everything else plain)
            stored.values[name] = stored.file[key].float()
            continue
        layer = key.removesuffix(".weight")
        extra, value = _store(tensor, spelling, layer)
        stored.file |= extra
        stored.values[name] = value
        layers[layer] = {"format": "float8_e4m3fn"}
    if spelling == "comfy old":
        stored.file[prefix + "scaled_fp8"] = torch.zeros(0, dtype=FP8)
    if spelling == "comfy old e5m2":
        stored.file[prefix + "scaled_fp8"] = torch.zeros(0, dtype=E5M2)
    if spelling == "comfy old exact":
        stored.file[prefix + "scaled_fp8"] = torch.zeros(2, dtype=FP8)
    if spelling == "comfy metadata":
        stored.metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    return stored


def _json_tensor(value) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _store(tensor, spelling, layer):
    one = torch.tensor(1.0)
    if spelling in ("raw fp8", "everything fp8", "raw e5m2"):
        small = tensor.to(E5M2 if "e5m2" in spelling else FP8)
        return {f"{layer}.weight": small}, small.float()
    if spelling in ("comfy nvfp4", "comfy mxfp8"):
        return _micro(tensor, spelling.removeprefix("comfy "), layer)
    if spelling.startswith("torchao"):
        return _torchao(tensor, spelling, layer)
    if spelling.startswith("bitsandbytes"):
        return _bitsandbytes(tensor, layer, nested=spelling.endswith("nested"))
    if spelling == "quanto int4":
        return _quanto_int4(tensor, layer)
    dtype = torch.int8 if "int8" in spelling else E5M2 if "e5m2" in spelling else FP8
    per_row = spelling.startswith(("lightx2v", "quanto")) or spelling == "comfy int8 rows"
    small, scale = scaled(tensor, dtype, per_row)
    value = small.float() * scale
    if spelling.startswith("quanto"):
        scale = scale.to(torch.bfloat16)
        extra = {f"{layer}.weight._data": small, f"{layer}.weight._scale": scale}
        extra |= {f"{layer}.input_scale": one, f"{layer}.output_scale": one}
        return extra, small.float() * scale.float()
    if spelling.startswith("comfy old"):
        extra = {f"{layer}.weight": small, f"{layer}.scale_weight": scale.reshape(())}
        return extra | {f"{layer}.scale_input": one}, value
    extra = {f"{layer}.weight": small, f"{layer}.weight_scale": scale}
    if spelling.startswith("comfy new"):
        kind = "float8_e5m2" if dtype == E5M2 else "float8_e4m3fn"
        extra |= {f"{layer}.comfy_quant": _json_tensor({"format": kind})}
        extra |= {f"{layer}.input_scale": one}
    if spelling.startswith("comfy convrot"):
        size = int(spelling.rpartition(" ")[2])
        base = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
        turn = base / 2
        while len(turn) < size:
            turn = torch.kron(turn, base / 2)
        turned = (tensor.double().view(len(tensor), -1, size) @ turn).view(tensor.shape)
        small, scale = scaled(turned, torch.int8, True)
        back = (small.double().view(len(tensor), -1, size) @ turn).view(tensor.shape)
        config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        extra = {f"{layer}.weight": small, f"{layer}.weight_scale": scale}
        extra |= {f"{layer}.comfy_quant": _json_tensor(config)}
        return extra, back.float() * scale
    if spelling.startswith("comfy int8"):
        extra[f"{layer}.weight_scale"] = scale.reshape(-1, 1) if per_row else scale.reshape(1)
        extra |= {f"{layer}.comfy_quant": _json_tensor({"format": "int8_tensorwise"})}
    return extra, value


def _micro(tensor, name, layer):
    from comfy_kitchen import tensor as kitchen

    layout = {"nvfp4": kitchen.TensorCoreNVFP4Layout, "mxfp8": kitchen.TensorCoreMXFP8Layout}[name]
    codes, params = layout.quantize(tensor.float())
    tensors = layout.state_dict_tensors(codes, params)
    extra = {f"{layer}.weight{suffix}": value for suffix, value in tensors.items()}
    extra |= {f"{layer}.comfy_quant": _json_tensor({"format": name})}
    return extra, layout.dequantize(codes, params)


def _torchao(tensor, spelling, layer):
    small, scale = scaled(tensor, torch.int8 if "int8" in spelling else FP8, True)
    extra = {f"{layer}._weight_qdata": small, f"{layer}._weight_scale": scale}
    if "int8" in spelling:
        extra[f"{layer}._weight_zero_point"] = torch.zeros(len(small), 1, dtype=torch.int8)
    return extra, small.float() * scale


def _bitsandbytes(tensor, layer, *, nested):
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        tensor, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    said = {f"{layer}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    state.dtype = torch.float32  # what it decodes to
    value = functional.dequantize_4bit(packed, state)
    return {f"{layer}.weight": packed} | said, value


def _quanto_int4(tensor, layer):
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    scale, shift = MaxOptimizer()(tensor, qint4, axis=0, group_size=128 if tensor.shape[1] > 128
                                  else None)  # fmt: skip
    group = 128 if tensor.shape[1] > 128 else None
    weight = quantize_weight(tensor, qint4, 0, scale, shift, group_size=group, optimized=False)
    inner = {}
    weight.save_to_state_dict(inner, f"{layer}.weight.", True)
    with python_unpack():
        return inner, weight.dequantize().float()


def write_gguf(
    path: Path, tensors, names, kind: str, architecture: str, quantise=quants.quantize, said=None,
    narrow: str | None = None,
) -> dict:  # fmt: skip
    """A GGUF file as city96's converter writes it, and the values it stands for.

    Args:
        said: words in its header.
        narrow: the type of matrices whose rows are not whole blocks of ``kind``; None: as they are.
    """
    writer = GGUFWriter(path, architecture)
    for key, word in (said or {}).items():
        writer.add_string(key, word)
    writer.add_quantization_version(2)
    values = {}
    for name, tensor in tensors.items():
        data, ggml = tensor.float().numpy(), GGMLQuantizationType[kind]
        matrix = is_block_matrix(name, tensor) or name == "shared.weight"
        if matrix and narrow is not None and tensor.shape[1] % GGML_QUANT_SIZES[ggml][0]:
            ggml = GGMLQuantizationType[narrow]
        if matrix and tensor.shape[1] % GGML_QUANT_SIZES[ggml][0] == 0 and kind != "F16":
            stored = quantise(data, ggml)
            writer.add_tensor(names[name], stored, raw_dtype=ggml)
            values[name] = torch.from_numpy(np.array(quants.dequantize(stored, ggml)))
        elif tensor.ndim > 4:
            # ggml has four dimensions: the patch embedding is flattened and its shape kept aside.
            writer.add_array(f"comfy.gguf.orig_shape.{names[name]}", list(tensor.shape))
            writer.add_tensor(names[name], data.reshape(len(data), -1))
            values[name] = tensor.float()
        else:
            half = matrix and kind == "F16"
            writer.add_tensor(names[name], data.astype(np.float16) if half else data)
            values[name] = tensor.half().float() if half else tensor.float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
