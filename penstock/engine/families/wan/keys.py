"""The names that each project gives to the tensors of a Wan2.1 model, and the way to diffusers' and
transformers' names.

A naming is a table of module paths; what follows the path in a key (``.weight``, ``.bias`` or the
suffix of a quantised storage) is kept. Sources: the modules of Wan2.1's own code (``model.py``,
``t5.py``, ``clip.py``, ``vae.py``), which ComfyUI, Kijai, LightX2V and the GGUF files of the
transformer keep; llama.cpp's tensor map for T5. For transformer and VAE the tables give what
diffusers' own single-file converters give; tests hold them together. They are tables of our own
because those converters take 450 MB and seconds to import, and pass unknown keys through.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from penstock.engine.family.naming import FUSED_QKV, Naming


def _attention(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{key}": f"{new}.{value}" for key, value in names.items()}


_QKV = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_IMAGE_KV = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_EMBEDDER = "condition_embedder."

_TRANSFORMER_BLOCK = {
    **_attention("self_attn", "attn1", _QKV),
    **_attention("cross_attn", "attn2", _QKV | _IMAGE_KV),
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_TRANSFORMER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": _EMBEDDER + "text_embedder.linear_1",
    "text_embedding.2": _EMBEDDER + "text_embedder.linear_2",
    "time_embedding.0": _EMBEDDER + "time_embedder.linear_1",
    "time_embedding.2": _EMBEDDER + "time_embedder.linear_2",
    "time_projection.1": _EMBEDDER + "time_proj",
    "img_emb.emb_pos": _EMBEDDER + "image_embedder.pos_embed",
    "img_emb.proj.0": _EMBEDDER + "image_embedder.norm1",
    "img_emb.proj.1": _EMBEDDER + "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": _EMBEDDER + "image_embedder.ff.net.2",
    "img_emb.proj.4": _EMBEDDER + "image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def _vae_ends() -> dict[str, str]:
    """Return what both VAEs have: first and last layers, and the middle."""
    table = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.conv1": f"{half}.conv_in", f"{half}.head.0": f"{half}.norm_out"}
        table |= {f"{half}.head.2": f"{half}.conv_out"}
        table |= {f"{half}.middle.1": f"{half}.mid_block.attentions.0"}
        for theirs, ours in ((0, 0), (2, 1)):
            name = f"{half}.mid_block.resnets.{ours}"
            table |= _attention(f"{half}.middle.{theirs}", name, _RESIDUAL)
    return table


def _vae_table(stages: int = 4, res_blocks: int = 2) -> dict[str, str]:
    """Return Wan2.1's VAE: blocks lie in two flat lists, ``res_blocks`` and one resampler a
    stage."""
    table = _vae_ends()
    for place in range(stages * (res_blocks + 1) - 1):
        old, new = f"encoder.downsamples.{place}", f"encoder.down_blocks.{place}"
        table |= _attention(old, new, _RESIDUAL | _same("resample", "time_conv"))
    for place in range(stages * (res_blocks + 2) - 1):
        stage, index = divmod(place, res_blocks + 2)
        old, new = f"decoder.upsamples.{place}", f"decoder.up_blocks.{stage}"
        if index <= res_blocks:
            table |= _attention(old, f"{new}.resnets.{index}", _RESIDUAL)
        else:
            table |= _attention(old, f"{new}.upsamplers.0", _same("resample", "time_conv"))
    return table


def _residual_vae_table(stages: int = 4, res_blocks: int = 2) -> dict[str, str]:
    """Return Wan2.2's VAE: a list in each stage's place."""
    table = _vae_ends()
    for stage in range(stages):
        old, new = f"encoder.downsamples.{stage}", f"encoder.down_blocks.{stage}"
        for index in range(res_blocks):
            table |= _attention(f"{old}.downsamples.{index}", f"{new}.resnets.{index}", _RESIDUAL)
        table |= _attention(
            f"{old}.downsamples.{res_blocks}", f"{new}.downsampler", _same("resample", "time_conv")
        )
        old, new = f"decoder.upsamples.{stage}", f"decoder.up_blocks.{stage}"
        for index in range(res_blocks + 1):
            table |= _attention(f"{old}.upsamples.{index}", f"{new}.resnets.{index}", _RESIDUAL)
        table |= _attention(
            f"{old}.upsamples.{res_blocks + 1}", f"{new}.upsampler", _same("resample", "time_conv")
        )
    return table


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SELF, _FEED = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_TEXT_BLOCK = {
    **_attention("attn", _SELF, _same("q", "k", "v", "o")),
    "pos_embedding.embedding": f"{_SELF}.relative_attention_bias",
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": f"{_FEED}.wi_0",
    "ffn.fc1": f"{_FEED}.wi_1",
    "ffn.fc2": f"{_FEED}.wo",
}
_LLAMA_BLOCK = {
    **{f"attn_{name}": f"{_SELF}.{name}" for name in "qkvo"},
    "attn_rel_b": f"{_SELF}.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": f"{_FEED}.wi_0",
    "ffn_up": f"{_FEED}.wi_1",
    "ffn_down": f"{_FEED}.wo",
}
_IMAGE_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.to_qkv": FUSED_QKV,
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_IMAGE = {
    "patch_embedding": "embeddings.patch_embedding",
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
_CLIP_REST = ("visual_projection.", "embeddings.position_ids", "head", "logit_scale", "log_scale",
              "textual.", "text_model.", "text_projection.")  # fmt: skip

NAMINGS: tuple[Naming, ...] = (
    Naming("transformer", "diffusers", ("blocks.0.attn1.", "condition_embedder.")),
    Naming("transformer", "Wan", ("blocks.0.self_attn.", "text_embedding."), "blocks.", "blocks.",
           MappingProxyType(_TRANSFORMER_BLOCK), MappingProxyType(_TRANSFORMER)),
    Naming("vae", "diffusers", ("decoder.conv_in.", "post_quant_conv.")),
    Naming("vae", "Wan2.2", ("decoder.conv1.", "decoder.upsamples.0.upsamples.", "conv2."),
           inside=MappingProxyType({}), outside=MappingProxyType(_residual_vae_table())),
    Naming("vae", "Wan", ("decoder.conv1.", "decoder.upsamples.", "conv2."),
           inside=MappingProxyType({}), outside=MappingProxyType(_vae_table())),
    Naming("text_encoder", "transformers", ("encoder.block.0.layer.0.SelfAttention.",),
           ignored=("spiece_model", "logit_scale")),
    Naming("text_encoder", "Wan", ("blocks.0.attn.", "token_embedding."),
           "blocks.", "encoder.block.", MappingProxyType(_TEXT_BLOCK),
           MappingProxyType({"token_embedding": "shared", "norm": "encoder.final_layer_norm"}),
           ignored=("spiece_model",)),
    Naming("text_encoder", "llama.cpp", ("enc.blk.0.attn_q.", "token_embd."),
           "enc.blk.", "encoder.block.", MappingProxyType(_LLAMA_BLOCK),
           MappingProxyType(
               {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"})),
    Naming("image_encoder", "transformers", ("encoder.layers.0.self_attn.", "pre_layrnorm."),
           ignored=_CLIP_REST),
    Naming("image_encoder", "Wan", ("transformer.0.attn.to_qkv.", "pre_norm."),
           "transformer.", "encoder.layers.", MappingProxyType(_IMAGE_BLOCK),
           MappingProxyType(_IMAGE), ignored=_CLIP_REST),
)  # fmt: skip
