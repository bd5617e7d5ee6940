"""The text encoder and the VAEs from single files under ComfyUI's names: recognised, their configs
told by shapes, every parameter where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3, AutoencoderKLMiniMaxH3Audio
from safetensors.torch import save_file

from penstock.engine.families.minimax_h3.sound import kind as sound_kind
from penstock.engine.families.minimax_h3.sound import tiny as sound_tiny
from penstock.engine.families.minimax_h3.text import config as text_config
from penstock.engine.families.minimax_h3.text import kind as text_kind
from penstock.engine.families.minimax_h3.text import tiny as text_tiny
from penstock.engine.families.minimax_h3.video_vae import kind as video_kind
from penstock.engine.files.keys import ComponentSource, recognise
from penstock.engine.files.reader import WeightReader
from penstock.engine.files.source import open_raw

_VISION = {
    "depth": 24, "hidden_size": 64, "intermediate_size": 40, "num_heads": 16,
    "out_hidden_size": 24, "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
_TEXT = {"hidden_size": 24, "head_dim": 128, "num_hidden_layers": 50, "rope_parameters": {
    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}}  # fmt: skip


def recognised(path: Path, tensors: Mapping[str, torch.Tensor], author: str) -> ComponentSource:
    save_file({name: each.clone().contiguous() for name, each in tensors.items()}, path)
    source = recognise(open_raw(path))
    source.check()
    assert source.naming == author
    return source


def values(source: ComponentSource) -> dict[str, torch.Tensor]:
    with WeightReader(source) as reader:
        return {name: reader.read(name, torch.float32) for name in source.weights}


def equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return text_tiny.encoder(_TEXT, _VISION)


def test_the_text_encoder(tmp_path: Path, encoder: Any) -> None:
    wanted = {
        name: each
        for name, each in encoder.state_dict().items()
        if name in text_kind.shapes(encoder.config.to_dict())
    }
    theirs = {
        name.removeprefix("model.")
        if name.startswith("model.visual.")
        else name.replace("model.language_model.", "model."): each
        for name, each in wanted.items()
    }
    source = recognised(tmp_path / "comfy.safetensors", theirs, "ComfyUI")
    equal(values(source), wanted)
    told, meant = source.config, encoder.config.to_dict()
    assert text_config.language(told) == text_config.language(meant) | {
        "vocab_size": len(text_tiny.vocabulary()), "num_hidden_layers": 50,
    }  # fmt: skip
    assert text_config.vision(told) == text_config.vision(meant) | {
        "num_heads": 16, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    parts = text_kind.components(source)
    assert [len(parts[name].blocks) for name in ("text_encoder", "vision")] == [50, 24]
    assert not parts["text_encoder"].rest.places
    outside = {name for name in wanted if name.startswith("model.visual.")}
    assert set(parts["vision"].rest.places) == {
        name for name in outside if not name.startswith(text_kind.TOWER)
    }


def test_a_language_model_alone(tmp_path: Path, encoder: Any) -> None:
    """As llama.cpp has it: there is no tower, and what it has besides is not read."""
    inverse = {new: old for old, new in text_kind._GGUF.items()}
    wanted, theirs = (
        {},
        {"output_norm.weight": torch.zeros(24), "output.weight": torch.zeros(3, 24)},
    )
    for name in text_kind.shapes(encoder.config.to_dict()):
        each = encoder.state_dict()[name]
        if name == text_kind.EMBEDDING:
            theirs["token_embd.weight"] = wanted[name] = each
        elif name.startswith(text_kind.LAYER):
            number, _, local = name.removeprefix(text_kind.LAYER).partition(".")
            path, _, end = local.rpartition(".")
            theirs[f"blk.{number}.{inverse[path]}.{end}"] = wanted[name] = each
    theirs["blk.50.attn_q.weight"] = torch.zeros(2, 2)
    source = recognised(tmp_path / "cpp.safetensors", theirs, "llama.cpp")
    equal(values(source), wanted)
    assert list(text_kind.components(source)) == ["text_encoder"]


def test_the_video_vae(tmp_path: Path) -> None:
    model = AutoencoderKLMiniMaxH3(
        block_out_channels=(32, 32, 64, 64, 64, 64), layers_per_block=1, decoder_num_layers=2,
        decoder_num_attention_heads=1,
    )  # fmt: skip
    weights, theirs, wanted = model.state_dict(), {}, {}
    inside = {new: old for old, new in video_kind._OURS.items()}
    outside = {new: old for old, new in video_kind._outside().items()}
    for index in range(2):  # one head: its queries, keys and values follow one another
        start = f"{video_kind.BLOCK}{index}.attn.to_"
        for end in ("weight", "bias"):
            parts = [weights.pop(f"{start}{name}.{end}") for name in "qkv"]
            weights[f"{start}qkv.{end}"] = torch.cat(parts)
    for name, each in weights.items():
        start = ""
        if name.startswith(video_kind.BLOCK):
            start = ".".join(name.split(".")[:3]) + "."
        local, table = name.removeprefix(start), inside if start else outside
        path = max((known for known in table if local.startswith(known)), key=len)
        theirs[start + table[path] + local.removeprefix(path)] = wanted[name] = each
    theirs |= {"latents_mean": torch.zeros(24), "decoder.mask_token": torch.zeros(1, 1, 64)}
    source = recognised(tmp_path / "vae.safetensors", theirs, "ComfyUI")
    equal(values(source), wanted)
    assert {**source.kind.defaults, **source.config}["fused"]
    parts = video_kind.components(source)
    assert [len(each.blocks) for each in parts.values()] == [0, 2]
    first, second = (set(each.rest.places) for each in parts.values())
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in first)
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in second)
    assert len(first) + len(second) + 2 * len(parts["vae_decoder"].blocks[0].places) == len(wanted)


def test_the_audio_vae(tmp_path: Path) -> None:
    published = {"decoder_rates", "decoder_kernel_sizes", "resblock_kernel_sizes", "sampling_rate",
                 "resblock_dilation_sizes", "encoder_rates", "latents_mean", "latents_std",
                 "decoder_dim", "latent_dim"}  # fmt: skip
    small = {name: each for name, each in sound_tiny.CONFIG.items() if name not in published}
    model = AutoencoderKLMiniMaxH3Audio(**small, decoder_dim=128, latent_dim=24)
    theirs = dict(model.state_dict())
    for name in [each for each in theirs if each.endswith(".weight_g")]:
        path = name.removesuffix("_g")
        theirs[path] = torch._weight_norm(theirs.pop(f"{path}_v"), theirs.pop(name))
    theirs |= {"latents_mean": torch.arange(6.0), "latents_std": torch.ones(6)}
    source = recognised(tmp_path / "audio.safetensors", theirs, "ComfyUI")
    wanted = {name: theirs[name] for name in source.weights}
    equal(values(source), wanted)
    assert set(theirs) - set(wanted) == {
        name for name in theirs if name.startswith(sound_kind._NEVER)
    }
    assert source.extras["latents_mean"].shape == (6,)
