"""Closed-form structure, name tables and configs against the field's own classes and converters."""

from types import SimpleNamespace

import pytest
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from penstock.engine.families.wan.keys import NAMINGS
from penstock.engine.families.wan.kinds import KINDS
from penstock.engine.family.naming import Naming, ShapesOf
from penstock.engine.files.keys import find_naming
from penstock.errors import CheckpointError, TensorMismatch
from tests.versions import bare_clip

I2V_14B = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
T2V = I2V_14B | {
    "num_attention_heads": 12,
    "in_channels": 16,
    "ffn_dim": 8960,
    "num_layers": 30,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
}
VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
}
VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
FLF2V_14B = I2V_14B | {"pos_embed_seq_len": 514}
TI2V_5B = T2V | {
    "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336,
}  # fmt: skip
VAE_48 = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "temperal_downsample": [False, True, True], "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
OFFICIAL = [
    ("transformer", TI2V_5B),
    ("vae", VAE_48),
    ("transformer", I2V_14B),
    ("transformer", FLF2V_14B),
    ("transformer", T2V),
    ("text_encoder", XXL),
    ("image_encoder", VIT_H),
    ("vae", VAE),
]


def theirs(component, config):
    """Shapes of the state dict of the library's own class, on the meta device."""
    with init_empty_weights():
        if component == "transformer":
            module = WanTransformer3DModel(**config)
        elif component == "vae":
            module = AutoencoderKLWan(**config)
        elif component == "text_encoder":
            module = UMT5EncoderModel(UMT5Config(**config))
        else:
            module = bare_clip(CLIPVisionModel(CLIPVisionConfig(**config)))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)
    return shapes


@pytest.mark.parametrize("component, config", OFFICIAL)
def test_names_and_shapes_are_the_librarys(component, config):
    assert KINDS[component].shapes(config) == theirs(component, config)


@pytest.mark.parametrize(
    "config",
    [
        VAE | {"base_dim": 8, "num_res_blocks": 1},
        VAE | {"base_dim": 8, "z_dim": 4, "temperal_downsample": [True, False, True]},
        VAE | {"base_dim": 8, "dim_mult": [1, 2, 2], "temperal_downsample": [False, True]},
    ],
)
def test_other_vaes_too(config):
    assert KINDS["vae"].shapes(config) == theirs("vae", config)


def test_sizes_are_the_published_ones():
    def parameters(component, config):
        total = 0
        for shape in KINDS[component].shapes(config).values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total

    assert len(KINDS["transformer"].shapes(I2V_14B)) == 1303
    assert len(KINDS["vae"].shapes(VAE)) == 194
    assert round(parameters("transformer", I2V_14B) / 1e9, 3) == 16.395
    assert round(parameters("text_encoder", XXL) / 1e9, 2) == 5.68
    assert round(parameters("image_encoder", VIT_H) / 1e6) == 631
    assert round(parameters("vae", VAE) / 1e6) == 127


@pytest.mark.parametrize("component, config", OFFICIAL)
def test_shapes_tell_the_config(component, config):
    found = KINDS[component].derive(ShapesOf("x", KINDS[component].shapes(config)))
    assert {key: found[key] for key in config} == config


def naming(component, author) -> Naming:
    return next(n for n in NAMINGS if (n.component, n.author) == (component, author))


def backwards(naming, names):
    """Keys of the file that ``naming`` turns into ``names``: the table read the other way."""
    inside = {new: old for old, new in (naming.inside or {}).items()}
    outside = {new: old for old, new in naming.outside.items()}
    keys = {}
    for name in names:
        head, table, local = "", outside, name
        if naming.target and name.startswith(naming.target):
            number, _, local = name[len(naming.target) :].partition(".")
            head, table = f"{naming.block}{number}.", inside
        path = local
        while path not in table:
            path = path.rpartition(".")[0]
            assert path, name
        keys[head + table[path] + local[len(path) :]] = name
    return keys


@pytest.mark.parametrize(
    "component, config, converter",
    [
        ("transformer", I2V_14B, convert_wan_transformer_to_diffusers),
        ("transformer", T2V, convert_wan_transformer_to_diffusers),
        ("vae", VAE, convert_wan_vae_to_diffusers),
    ],
)
def test_tables_agree_with_diffusers_own_converters(component, config, converter):
    table = naming(component, "Wan")
    keys = backwards(table, KINDS[component].shapes(config))
    handles = {key: SimpleNamespace(key=key) for key in keys}
    converted = {handle.key: name for name, handle in converter(handles).items()}
    assert converted == keys
    assert {key: table.rename(key) for key in keys} == keys


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "comfy_quant", "weight._data"])
def test_suffixes_of_quantised_files_come_through(suffix):
    table = naming("transformer", "Wan")
    assert (
        table.rename(f"blocks.7.cross_attn.k_img.{suffix}") == f"blocks.7.attn2.add_k_proj.{suffix}"
    )
    assert table.rename(f"head.head.{suffix}") == f"proj_out.{suffix}"


@pytest.mark.parametrize(
    "author, key",
    [
        ("Wan", "blocks.0.unheard_of.weight"),
        ("Wan", "blocks.x.self_attn.q.weight"),
        ("Wan", "vace_blocks.0.self_attn.q.weight"),
        ("Wan", ""),
    ],
)
def test_unknown_keys_stay_unknown(author, key):
    assert naming("transformer", author).rename(key) is None


def test_no_two_namings_share_their_marks():
    for component, config in OFFICIAL:
        names = list(KINDS[component].shapes(config))
        found = find_naming(names)
        assert found is not None
        assert found.kind.name == component
        for prefix in ("model.diffusion_model.", "diffusion_model.", "model."):
            found = find_naming([prefix + name for name in names])
            assert found is not None
            assert (found.kind.name, found.prefix) == (component, prefix)
    assert find_naming(["a", "b"]) is None


def test_a_missing_dimension_is_named():
    shapes = KINDS["transformer"].shapes(T2V)
    del shapes["proj_out.weight"]
    with pytest.raises(TensorMismatch, match="proj_out.weight"):
        KINDS["transformer"].derive(ShapesOf("x", shapes))


@pytest.mark.parametrize(
    "component, config, word",
    [
        ("transformer", T2V | {"in_channels": 24}, "Wan2.2"),
        ("transformer", T2V | {"in_channels": 52}, "Wan2.2 Fun Control"),
        ("vae", VAE | {"z_dim": 32}, "Wan2.2"),
        ("transformer", T2V | {"attention_head_dim": 100}, "config.json"),
        ("image_encoder", VIT_H | {"hidden_size": 1024}, "config.json"),
    ],
)
def test_what_is_built_alike_and_is_not_run_is_refused(component, config, word):
    with pytest.raises(CheckpointError, match=word):
        KINDS[component].derive(ShapesOf("x", KINDS[component].shapes(config)))
