"""The forward over the packed sequence is diffusers' module, whatever the chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine.families.minimax_h3 import modules
from penstock.engine.families.minimax_h3.forward import angles, packed_forward, refine
from penstock.engine.families.minimax_h3.layout import Layout
from penstock.engine.families.minimax_h3.sizes import Latents
from penstock.engine.families.minimax_h3.structure import transformer_shapes
from penstock.engine.families.minimax_h3.tables import StepTables, StepTimes, TablesInWork
from penstock.engine.model.binding import bind
from tests.engine.families.minimax_h3 import makers

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = Latents(7, 4, 6, 9, channels=4, sound_channels=6)
LAYOUTS = {
    "text": Layout(SIZES, (1,) * 11),
    "first": Layout(SIZES, (1, 1, 0, 0, 0, 1, 1), ("first",)),
    "both": Layout(SIZES, (1, 0, 0, 1, 0, 0, 1, 1, 1), ("first", "last")),
}
TIMES = {"start": (0.0, 0.0), "later": (0.02, 0.31), "late": (0.9995, 0.97)}


@dataclass(frozen=True)
class Made:
    """What goes into a forward."""

    text: Tensor
    video: Tensor
    sound: Tensor


def _inputs(layout: Layout, dtype: torch.dtype) -> Made:
    draw = torch.Generator().manual_seed(5)
    given = layout.given.stop - layout.given.start
    rows = given + SIZES.video_rows
    return Made(
        torch.randn(1, len(layout.tags), 32, generator=draw).to(dtype),
        torch.randn(rows, 16, generator=draw),
        torch.randn(SIZES.sound_rows, 6, generator=draw),
    )


def _theirs(model: Any, layout: Layout, made: Made, times: tuple[float, float]) -> Any:
    found = makers.packed(layout)
    distinct, rows = makers.timesteps(layout, found, *times)
    with torch.no_grad():
        video, sound = model(
            hidden_states=made.video[None], audio_hidden_states=made.sound[None],
            encoder_hidden_states=made.text, timestep=distinct, timestep_indices=rows,
            return_dict=False, **found,
        )  # fmt: skip
    return video[0, layout.given.stop - layout.given.start :], sound[0]


@torch.no_grad()
def _tables(model: Any, layout: Layout, *times: tuple[float, float]) -> list[StepTables]:
    steps = [StepTimes.of(*each, pictures=bool(layout.anchors)) for each in times]
    dtype = model.context_embedder.weight.dtype
    work = TablesInWork(model, steps, len(model.transformer_blocks), dtype, CPU)
    for index, block in enumerate(model.transformer_blocks):
        work.add(index, block)
    return work.done()


@torch.no_grad()
def _ours(
    model: Any, layout: Layout, made: Made, times: tuple[float, float], chunk: int
) -> tuple[Tensor, Tensor]:
    (tables,) = _tables(model, layout, times)
    turns = angles(model, layout.positions(), CPU, made.text.dtype)
    return packed_forward(
        model, enumerate(model.transformer_blocks), layout, refine(model, made.text), made.video,
        made.sound, tables, turns, chunk,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, Any]:
    return {dtype: makers.transformer(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_chunk_gives_the_bits_of_the_module(
    models: dict[torch.dtype, Any], dtype: torch.dtype, layout: Layout, times: tuple[float, float]
) -> None:
    made = _inputs(layout, dtype)
    video, sound = _ours(models[dtype], layout, made, times, layout.rows)
    their_video, their_sound = _theirs(models[dtype], layout, made, times)
    assert torch.equal(video, their_video)
    assert torch.equal(sound, their_sound)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chunks_change_nothing_that_matters(
    models: dict[torch.dtype, Any], layout: Layout, chunk: int
) -> None:
    made = _inputs(layout, torch.float32)
    ours = _ours(models[torch.float32], layout, made, TIMES["later"], chunk)
    for found, wanted in zip(
        ours, _theirs(models[torch.float32], layout, made, TIMES["later"]), strict=True
    ):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_what_the_projections_give_at_every_step(
    models: dict[torch.dtype, Any], dtype: torch.dtype, layout: Layout
) -> None:
    model = models[dtype]
    told = list(TIMES.values())
    for times, tables in zip(told, _tables(model, layout, *told), strict=True):
        distinct, rows = makers.timesteps(layout, makers.packed(layout), *times)
        assert torch.equal(tables.times.values, distinct)
        for run in layout.runs:
            assert set(rows[run.start : run.stop].tolist()) == {tables.times.index[run.time]}
        with torch.no_grad():
            temb = model.time_embedder(model.time_proj(distinct))
            for index, block in enumerate(model.transformer_blocks):
                wanted = list(block.adaln_proj(temb))
                wanted[1], wanted[4] = 1.0 + wanted[1], 1.0 + wanted[4]
                assert torch.equal(tables.block(index), torch.stack(wanted))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_where_the_pipeline_has_them(layout: Layout) -> None:
    theirs = makers.packed(layout)
    assert torch.equal(layout.positions(), theirs["position_ids"])
    assert theirs["text_indices"].tolist() == list(range(layout.text.stop))
    parts = (*range(layout.given.start, layout.given.stop),
             *range(layout.video.start, layout.video.stop))  # fmt: skip
    assert theirs["video_indices"].tolist() == list(parts)
    assert theirs["audio_indices"].tolist() == list(range(layout.sound.start, layout.sound.stop))
    tags = [run.tag for run in layout.runs for _ in range(run.start, run.stop)]
    assert tags == theirs["token_tags"].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_modules_here_are_those_of_diffusers(
    models: dict[torch.dtype, Any], dtype: torch.dtype
) -> None:
    theirs, layout = models[dtype], LAYOUTS["both"]
    state = theirs.state_dict()
    assert transformer_shapes(dict(theirs.config)) == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    own = modules.MiniMaxH3Transformer3DModel(**makers.TRANSFORMER)
    bind(own, state)
    made = _inputs(layout, dtype)
    ours = _ours(own, layout, made, TIMES["later"], layout.rows)
    wanted = _theirs(theirs, layout, made, TIMES["later"])
    assert all(torch.equal(*pair) for pair in zip(ours, wanted, strict=True))


def test_a_gate_that_comes_first_gates_the_rest(models: dict[torch.dtype, Any]) -> None:
    theirs, layout = models[torch.float32], LAYOUTS["text"]
    own = modules.MiniMaxH3Transformer3DModel(**makers.TRANSFORMER, gate_first=True)
    state = {
        name: torch.cat(tensor.chunk(2)[::-1]) if name.endswith("net.0.proj.weight") else tensor
        for name, tensor in theirs.state_dict().items()
    }
    bind(own, state)
    made = _inputs(layout, torch.float32)
    ours = _ours(own, layout, made, TIMES["later"], layout.rows)
    for found, wanted in zip(ours, _theirs(theirs, layout, made, TIMES["later"]), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
