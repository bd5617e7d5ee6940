"""The modules of plain torch against the classes whose names they bear: names, shapes, bits."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from penstock.engine.families.wan import clip, modules, umt5
from penstock.engine.families.wan.kinds import KINDS
from penstock.engine.families.wan.networks import build
from penstock.engine.families.wan.vae_decode import decode_frames
from penstock.engine.families.wan.vae_encode import encode_tiled
from penstock.engine.families.wan.vae_layers import levels_of
from penstock.engine.model.binding import bind, unbound
from penstock.profiles.tiling import TileGrid, Window
from tests.engine.families.wan.tiny_vae import tiny_vae
from tests.tiny_transformer import TINY, inputs, lean, tiny_transformer
from tests.versions import bare_clip

TEXT = {"vocab_size": 64, "d_model": 40, "d_kv": 8, "d_ff": 72, "num_layers": 2, "num_heads": 6}
IMAGE = {
    "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
VAE = {"base_dim": 4, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def twin(made: Any, original: nn.Module) -> Any:
    """A module of ours with the weights of ``original``, all of them."""
    weights = dict(original.state_dict())
    weights.pop("encoder.embed_tokens.weight", None)  # UMT5's is tied
    bind(made, weights)
    assert not unbound(made)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_transformer(dtype: torch.dtype, pictures: int) -> None:
    places = {"pos_embed_seq_len": 10} if pictures == 2 else {}
    theirs = tiny_transformer(image_dim=6 if pictures else None, dtype=dtype, freq_dim=9, **places)
    if pictures == 2:
        theirs.condition_embedder.image_embedder.pos_embed.data.normal_()
    ours = twin(modules.WanTransformer3DModel(**dict(theirs.config)), theirs)
    ours.rope.to(dtype)  # as `tiny_transformer` does
    latents, text, image = inputs(theirs, (3, 4, 6), dtype, image_tokens=10 if places else 5)
    timestep = torch.tensor([731])
    for found, wanted in zip(
        lean(ours, latents, [text, text * 2], image, timestep, 7),
        lean(theirs, latents, [text, text * 2], image, timestep, 7),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_a_transformer_without_norms_across() -> None:
    theirs = tiny_transformer(cross_attn_norm=False, eps=1e-3)
    ours = twin(modules.WanTransformer3DModel(**dict(theirs.config)), theirs)
    latents, text, _ = inputs(theirs, (1, 4, 4), torch.float32)
    run = (latents, [text], None, torch.tensor([5]), 3)
    assert torch.equal(lean(ours, *run)[0], lean(theirs, *run)[0])


@pytest.mark.parametrize("gate", ["gated-gelu", "gated-silu", "gated-relu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_text_encoder(dtype: torch.dtype, gate: str) -> None:
    torch.manual_seed(3)
    config = TEXT | {
        "feed_forward_proj": gate, "relative_attention_num_buckets": 9,
        "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-3,
    }  # fmt: skip
    theirs = UMT5EncoderModel(UMT5Config(**config)).eval().to(dtype)
    ours = twin(modules.UMT5EncoderModel(**config), theirs)
    states = torch.randn(1, 60, 40, dtype=dtype)
    for norm in (ours.encoder.final_layer_norm, theirs.encoder.final_layer_norm):
        norm.weight.data = torch.linspace(0.5, 2, 40).to(dtype)
    with torch.no_grad():
        found, wanted = (
            umt5.finish(
                model.encoder.final_layer_norm,
                umt5.encode_layers(enumerate(model.encoder.block), [states.clone()], [50])[0],
                50,
            )
            for model in (ours, theirs)
        )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "act", ["gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_image_encoder(dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(4)
    config = IMAGE | {"hidden_act": act, "layer_norm_eps": 1e-3}
    theirs = bare_clip(CLIPVisionModel(CLIPVisionConfig(**config)).eval().to(dtype))
    ours = twin(modules.CLIPVisionModel(**config), theirs)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        found, wanted = (
            clip.encode_layers(
                enumerate(model.encoder.layers),
                clip.embed_pixels(model.embeddings, model.pre_layrnorm, pixels),
            )
            for model in (ours, theirs)
        )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperal_downsample": [True, False, True], "num_res_blocks": 1},
        {"dim_mult": [1, 3, 2], "temperal_downsample": [False, True]},
    ],
)
def test_the_vae(more: dict[str, Any]) -> None:
    theirs = tiny_vae(torch.float32, **more)
    ours = twin(modules.AutoencoderKLWan(**dict(theirs.config)), theirs)
    factor = 1 << len(theirs.config.dim_mult) - 1
    temporal = 1 << sum(theirs.config.temperal_downsample)
    clip_of = torch.randn(1, 3, 1 + temporal, 2 * factor, 4 * factor).clamp(-1, 1)

    def pixels(frame: int, window: Window) -> torch.Tensor:
        rows, cols = window.inside(Window.whole(*clip_of.shape[-2:]))
        return clip_of[:, :, frame : frame + 1, rows, cols]

    size = tuple(clip_of.shape[2:])
    found, wanted = (encode_tiled(vae, pixels, size, TileGrid(1, 2)) for vae in (ours, theirs))
    assert torch.equal(found, wanted)
    found, wanted = (decode_frames(vae, wanted, TileGrid(1, 2)) for vae in (ours, theirs))
    assert torch.equal(found, wanted)


def test_defaults_are_those_of_the_libraries() -> None:
    for ours, made in (
        (modules.TRANSFORMER, WanTransformer3DModel), (modules.VAE, AutoencoderKLWan),
    ):  # fmt: skip
        theirs = inspect.signature(made.__init__).parameters
        for name, value in ours.items():
            default = theirs[name].default
            assert value == (tuple(default) if isinstance(default, list) else default), name
        assert set(ours) == set(theirs) - {"self"}
    for ours, config in ((modules.TEXT, UMT5Config()), (modules.IMAGE, CLIPVisionConfig())):
        assert {name: getattr(config, name) for name in ours} == dict(ours)


@pytest.mark.parametrize(
    ("component", "config"),
    [
        ("transformer", TINY | {"num_layers": 1, "patch_size": [1, 2, 2], "cross_attn_norm": True}),
        ("text_encoder", TEXT | {"num_layers": 1, "relative_attention_num_buckets": 32}),
        ("image_encoder", IMAGE | {"num_hidden_layers": 1, "num_channels": 3}),
        ("vae", dict(modules.VAE) | VAE),
    ],
)
def test_a_skeleton_has_the_tensors_that_the_closed_forms_state(
    component: str, config: dict[str, Any]
) -> None:
    module, _ = build(component, config)
    found = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert found == KINDS[component].shapes(config)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_vae_whose_config_says_nothing_is_wan21s() -> None:
    module, _ = build("vae", {})
    levels = levels_of(module)
    assert (levels.factor, module.config.latents_std) == (8, list(modules.VAE["latents_std"]))
