"""Activation memory of MiniMax-H3's transformer at its true shapes, without its weights.

As `benchmarks.fake_dit`: fake tensors have shapes and storages but no bytes. Counted is every
storage that an operation makes, weights excepted: of our forward, and of diffusers' own.

The last line on stdout is JSON, in GiB.

    python -m benchmarks.fake_h3 [--blocks 2] [--chunk 2048]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.engine.attention.kernels import Attention, attention
from penstock.engine.families.minimax_h3.config import MODALITIES, OURS, TRANSFORMER
from penstock.engine.families.minimax_h3.forward import angles, packed_forward
from penstock.engine.families.minimax_h3.layout import Layout
from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.tables import StepTables, StepTimes
from penstock.profiles.manifest import VideoShape
from penstock.units import GIB
from tests.meter import StorageMeter

DTYPE = torch.bfloat16
SHAPES = {
    "1344x768x124": (VideoShape(1344, 768, 124), 200, ()),
    "1344x768x124, two pictures": (VideoShape(1344, 768, 124), 2250, ("first", "last")),
    "864x480x124": (VideoShape(864, 480, 124), 200, ()),
    "1344x768x345": (VideoShape(1344, 768, 345), 200, ()),
}


@dataclass(frozen=True)
class Peak:
    """Of one forward.

    Attributes:
        nbytes: above the weights and what is given.
        given: the inputs: rows, text, tables, rotation.
    """

    nbytes: int
    given: int


def layout_of(name: str) -> Layout:
    """Of one of `SHAPES`."""
    shape, text, anchors = SHAPES[name]
    return Layout(Latents.of(shape), (1,) * text, anchors)


def _model(blocks: int) -> Any:
    config = {name: value for name, value in TRANSFORMER.items() if name not in OURS}
    model = MiniMaxH3Transformer3DModel(**(config | {"num_layers": blocks}))
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(DTYPE)
    return model.eval().requires_grad_(False)


def _rows(layout: Layout) -> tuple[Tensor, Tensor]:
    given = layout.given.stop - layout.given.start
    sizes = layout.latents
    return torch.empty(given + sizes.video_rows, 96), torch.empty(sizes.sound_rows, 32)


def lean_bytes(layout: Layout, chunk: int, blocks: int, attend: Attention = attention) -> Peak:
    """Peak of our forward."""
    times = StepTimes.of(0.5, 0.7, pictures=bool(layout.anchors))
    positions = layout.positions()
    width = TRANSFORMER["hidden_size"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _model(blocks)
        video, sound = _rows(layout)
        text = torch.empty(1, len(layout.tags), width, dtype=DTYPE)
        rows = MODALITIES * len(times.values)
        tables = StepTables(
            times,
            torch.empty(blocks, 6, rows, width, dtype=DTYPE),
            torch.empty(2, len(times.values), width, dtype=DTYPE),
        )
        turns = angles(model, torch.empty(positions.shape, dtype=torch.float64), text.device, DTYPE)
        given = (video, sound, text, tables.blocks, tables.out, turns.cos, turns.sin)
        weights = [*model.parameters(), *model.buffers()]
        with StorageMeter([*weights, *given]) as meter:
            packed_forward(
                model, enumerate(model.transformer_blocks), layout, text, video, sound, tables,
                turns, chunk, attend,
            )  # fmt: skip
    return Peak(meter.peak, sum(tensor.nbytes for tensor in given))


def diffusers_bytes(layout: Layout, blocks: int) -> Peak:
    """Peak of diffusers' own forward."""
    given = layout.given.stop - layout.given.start
    runs = layout.rows, len(layout.tags)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _model(blocks)
        video, sound = _rows(layout)
        inputs = {
            "hidden_states": video[None], "audio_hidden_states": sound[None],
            "encoder_hidden_states": torch.empty(1, runs[1], 5120, dtype=DTYPE),
            "timestep": torch.empty(3 if given else 2),
            "timestep_indices": torch.empty(runs[0], dtype=torch.long),
            "token_tags": torch.empty(runs[0], dtype=torch.long),
            "position_ids": torch.empty(runs[0], 3, dtype=torch.float64),
            "video_indices": torch.empty(len(video), dtype=torch.long),
            "audio_indices": torch.empty(len(sound), dtype=torch.long),
            "text_indices": torch.empty(runs[1], dtype=torch.long),
        }  # fmt: skip
        weights = [*model.parameters(), *model.buffers()]
        with StorageMeter([*weights, *inputs.values()]) as meter:
            model(**inputs)
    return Peak(meter.peak, sum(tensor.nbytes for tensor in inputs.values()))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--blocks", type=int, default=2)
    arguments.add_argument("--chunk", type=int, default=2048)
    options = arguments.parse_args()
    report: dict[str, Any] = {
        "benchmark": "fake_h3",
        "unit": "GiB",
        "blocks": options.blocks,
        "chunk": options.chunk,
    }
    for name in SHAPES:
        layout = layout_of(name)
        theirs = diffusers_bytes(layout, options.blocks)
        ours = lean_bytes(layout, options.chunk, options.blocks)
        report[name] = {
            "rows": layout.rows,
            "diffusers": round(theirs.nbytes / GIB, 3),
            "lean": round(ours.nbytes / GIB, 3),
            "share": round(ours.nbytes / theirs.nbytes, 3),
        }
        print(name, report[name])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
