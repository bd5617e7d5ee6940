"""Qwen3-VL's states against transformers' own, under diffusers' pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.encoders import get_qwen3vl_prompt_embeds
from transformers import Qwen2VLImageProcessorPil

from penstock.engine.families.minimax_h3.pictures import patches
from penstock.engine.families.minimax_h3.text import config as configs
from penstock.engine.families.minimax_h3.text import kind, tiny
from penstock.engine.families.minimax_h3.text.encode import check_processor
from penstock.engine.families.minimax_h3.text.language import (
    embed,
    encode_layers,
    positions,
    present,
    rope,
)
from penstock.engine.families.minimax_h3.text.modules import Qwen3VLForConditionalGeneration
from penstock.engine.families.minimax_h3.text.patches import LABEL, MARKS, seen_size, tokens
from penstock.engine.families.minimax_h3.text.tower import see
from penstock.engine.family.layers import NetworkConfig
from penstock.engine.files.tokenizer import Tokenizer
from penstock.engine.model.binding import bind, unbound
from penstock.errors import CheckpointError

SIZES = ((64, 96), (128, 64))


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(0)
    return tiny.encoder()


def typed(model: Any, dtype: torch.dtype) -> Any:
    """As `from_pretrained` gives it in ``dtype``: frequencies stay in fp32."""
    made = copy.deepcopy(model)
    kept = {name: buffer.clone() for name, buffer in made.named_buffers()}
    made.to(dtype)
    for name, buffer in made.named_buffers():
        buffer.data = kept[name]
    return made


def twin(model: Any) -> Any:
    """Our modules with the weights of ``model``, all that are read."""
    config = model.config.to_dict()
    words = configs.language(config) | {"num_hidden_layers": configs.LAYERS}
    tower = configs.vision(config)
    assert tower is not None
    made = Qwen3VLForConditionalGeneration(NetworkConfig({}, words), NetworkConfig({}, tower))
    weights, wanted = model.state_dict(), kind.shapes(config)
    assert {name: tuple(weights[name].shape) for name in wanted} == wanted
    bind(made, {name: weights[name] for name in wanted})
    assert not unbound(made)
    return made.eval().requires_grad_(False)


def frames(count: int) -> list[torch.Tensor]:
    draw = np.random.default_rng(count)
    return [
        torch.from_numpy(draw.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in SIZES[:count]
    ]


class Processor:
    """What diffusers asks of a processor that cannot be built without torchvision."""

    def __init__(self) -> None:
        self.image_processor = Qwen2VLImageProcessorPil(
            **{k: v for k, v in tiny.PROCESSOR.items() if k != "image_processor_type"}
        )

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        pad = tiny.vocabulary()[MARKS[1]]
        return [[int(each == pad) for each in row] for row in rows]


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        (torch.float32, 0),
        (torch.float32, 1),
        (torch.float32, 2),
        (torch.bfloat16, 0),
        (torch.bfloat16, 2),
        (torch.float16, 1),
    ],
)
def test_states_are_those_of_layer_50_bit_for_bit(
    original: Any, dtype: torch.dtype, count: int
) -> None:
    theirs = typed(original, dtype)
    ours = twin(theirs).model
    seen = [patches(frame, tiny.PROCESSOR) for frame in frames(count)]
    tokenizer, known = tiny.tokenizer(), tiny.vocabulary()
    labels = [
        tokenizer(LABEL.format(n + 1), add_special_tokens=False)["input_ids"] for n in range(count)
    ]
    prompt = tokenizer("a red fox", add_special_tokens=False)["input_ids"]
    grids = [grid for _, grid in seen]
    begin, pad, end = (known[mark] for mark in MARKS)
    shown = present(prompt, labels, grids, (begin, pad, end))
    given = {}
    if count:
        made = Processor().image_processor(
            images=[f.numpy() for f in frames(count)], return_tensors="pt"
        )
        given = {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        assert torch.equal(torch.cat([pixels for pixels, _ in seen]), made["pixel_values"])
        assert [tuple(each[1:]) for each in made["image_grid_thw"].tolist()] == grids
    words = configs.language(theirs.config.to_dict())
    with torch.inference_mode():
        wanted = get_qwen3vl_prompt_embeds(
            theirs, Processor(), list(shown.ids), given, device="cpu", dtype=dtype
        )
        table = ours.language_model.embed_tokens.weight
        hidden = embed(shown, lambda rows: table[rows], dtype=dtype)
        features: list[torch.Tensor] = []
        if count:
            pictures = [(pixels.to(dtype), grid) for pixels, grid in seen]
            merged, features = see(ours.visual, enumerate(ours.visual.blocks), pictures)
            hidden[0, torch.tensor(shown.seen())] = merged
        waves = rope(positions(shown), words, dtype)
        layers = enumerate(ours.language_model.layers)
        found = encode_layers(layers, hidden, waves, shown.seen(), features)
    assert torch.equal(found, wanted)
    assert len(shown.tags) == len(shown.ids) == found.shape[1]
    assert sum(tag == 0 for tag in shown.tags) == sum(h * w // 4 + 2 for h, w in grids)


def test_a_picture_is_scaled_as_transformers_scales_it() -> None:
    config = tiny.PROCESSOR | {"size": {"shortest_edge": 9000, "longest_edge": 12000}}
    processor = Qwen2VLImageProcessorPil(
        **{k: v for k, v in config.items() if k != "image_processor_type"}
    )
    for size in ((64, 96), (300, 200), (100, 61)):
        frame = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        wanted = processor(images=[frame], return_tensors="pt")
        found, grid = patches(torch.from_numpy(frame), config)
        assert [1, *grid] == wanted["image_grid_thw"][0].tolist()
        assert torch.equal(found, wanted["pixel_values"])
        label = len(LABEL.format(1)) + 2
        assert tokens(*size, config) >= grid[0] * grid[1] // 4 + label


@pytest.mark.parametrize("entry", ["patch_size", "temporal_patch_size", "merge_size"])
def test_a_processor_of_another_encoder_is_refused(original: Any, entry: str) -> None:
    tower: Any = SimpleNamespace(config=original.config.to_dict())
    check_processor(tower, tiny.PROCESSOR)
    with pytest.raises(CheckpointError, match="does not suit the text encoder"):
        check_processor(tower, {**tiny.PROCESSOR, entry: 3})
    with pytest.raises(CheckpointError, match="no vision tower"):
        check_processor(None, tiny.PROCESSOR)
    assert seen_size(64, 64, {"size": {"longest_edge": 1 << 20}}) == (256, 256)


def test_texts_are_tokenised_verbatim(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    made.save_pretrained(tmp_path)
    texts = ["a red  fox\n", "  <|im_start|>x", "caf\u00e9 \u732b", ""]
    ids, marks = Tokenizer(tmp_path).verbatim(texts, MARKS)
    assert ids == [made(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert marks == [made.convert_tokens_to_ids(mark) for mark in MARKS]
    with pytest.raises(CheckpointError, match="of another model"):
        Tokenizer(tmp_path).verbatim(["a"], ["<|no such|>"])


def test_what_shapes_tell_is_the_config(original: Any) -> None:
    config = original.config.to_dict()
    wanted = kind.shapes(config)
    from penstock.engine.family.naming import ShapesOf

    words = kind.TEXT.derive(ShapesOf("x", {k: v for k, v in wanted.items() if "visual" not in k}))
    assert configs.vision(words) is None
    assert kind.shapes(words) == {k: v for k, v in wanted.items() if "visual" not in k}
    deep = original.config.to_dict()
    deep["vision_config"] |= {"depth": 27, "deepstack_visual_indexes": [8, 16, 24]}
    assert kind.shapes(kind.TEXT.derive(ShapesOf("x", kind.shapes(deep)))) == kind.shapes(deep)
    assert configs.language(kind.TEXT.derive(ShapesOf("x", wanted | kind.shapes(deep))))[
        "num_hidden_layers"
    ] == configs.LAYERS  # fmt: skip


@pytest.mark.parametrize(
    ("part", "entry", "value", "told"),
    [
        ("text_config", "num_hidden_layers", 49, "50 layers"),
        ("text_config", "head_dim", "x", "head_dim"),
        ("text_config", "num_key_value_heads", 3, "a multiple"),
        ("vision_config", "out_hidden_size", 48, "out_hidden_size 32"),
        ("vision_config", "deepstack_visual_indexes", [9], "below 4"),
    ],
)
def test_another_config_is_refused(
    original: Any, part: str, entry: str, value: Any, told: str
) -> None:
    config = original.config.to_dict()
    config[part][entry] = value
    with pytest.raises(CheckpointError, match=told):
        kind.TEXT.check("x", config)


@pytest.mark.parametrize("author", ["transformers", "ComfyUI", "llama.cpp"])
def test_names_of_each_project_become_transformers(original: Any, author: str) -> None:
    naming = next(each for each in kind.NAMINGS if each.author == author)
    wanted = kind.shapes(original.config.to_dict())
    inverse = {new: old for old, new in (naming.inside or {}).items()}
    for name in wanted:
        if author == "transformers":
            given = name
        elif name == kind.EMBEDDING:
            start = {"ComfyUI": "model.embed_tokens", "llama.cpp": "token_embd"}[author]
            given = f"{start}.weight"
        elif name.startswith(kind.LAYER):
            number, _, local = name.removeprefix(kind.LAYER).partition(".")
            path, _, end = local.rpartition(".")
            if author == "llama.cpp":
                path = inverse[path]
            given = f"{naming.block}{number}.{path}.{end}"
        elif author == "llama.cpp":
            continue
        else:
            given = name.removeprefix("model.")
        assert naming.rename(given) == name
        assert not given.startswith(naming.ignored)
    assert "lm_head.weight".startswith(naming.ignored) or author == "llama.cpp"
    assert f"{naming.block or kind.LAYER}50.x".startswith(naming.ignored)
