"""What the transformer is trained on: how clips are drawn, and where their loss counts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from training.models import build_tokenizer
from training.settings import DIT
from training.train_dit import Shards, flow_loss

CAPTIONS = (
    ("a red star turns clockwise", "a red star moves up"),
    ("a red bar spins clockwise", "a red bar bounces"),
)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Two scenes of two motions; the latents of scene s and motion m are 10 s + m in one place."""
    ids = [
        build_tokenizer()(list(row), padding="max_length", max_length=12, return_tensors="pt")
        for row in CAPTIONS
    ]
    latents = torch.zeros(2, 2, 16, 5, 2, 2)
    latents[..., 1, 0, 1] = torch.tensor([[0.0, 1.0], [10.0, 11.0]])[..., None]
    tensors = {
        "latents": latents,
        "condition": torch.zeros(2, 16, 5, 2, 2),
        "pixels": torch.zeros(2, 3, 4, 4),
        "ids": torch.stack([row.input_ids for row in ids]).int(),
    }
    save_file(tensors, tmp_path / "0.safetensors")
    found = Shards(tmp_path)
    found.refresh()
    found.refresh()  # what is known is not taken up twice
    assert len(found.groups) == 1
    return found


def drawn(shards: Shards, turns: float) -> list[float]:
    batch = shards.draw(torch.Generator().manual_seed(0), 400, turns)
    return batch["latents"][:, 0, 1, 0, 1].tolist()


def test_turns_are_drawn_as_often_as_asked_and_those_of_symmetric_shapes_more(
    shards: Shards,
) -> None:
    chance = drawn(shards, 0.0)
    assert all(70 < chance.count(clip) < 130 for clip in (0.0, 1.0, 10.0, 11.0))
    turning = drawn(shards, 1.0)
    assert turning.count(0.0) + turning.count(10.0) == 400
    assert turning.count(0.0) / turning.count(10.0) == pytest.approx(3, rel=0.3)


def test_focus_weighs_the_places_that_the_motions_of_a_picture_change(shards: Shards) -> None:
    varies = shards.groups[0]["varies"]
    assert varies.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1])
    assert (varies > 0).sum(dim=(1, 2, 3)).tolist() == [1, 1]
    batch = shards.draw(torch.Generator().manual_seed(0), 4, 0.0)
    of = {focus: float(loss(batch, focus)) for focus in (0.0, 0.5, 1.0)}
    assert of[0.5] == pytest.approx((of[0.0] + of[1.0]) / 2)
    # Nothing is predicted but at the one place that varies, where the prediction is off by 1.
    assert of[1.0] == pytest.approx(1.0, rel=1e-5)
    assert of[0.0] == pytest.approx(1 / 20, rel=1e-5)


def loss(batch: dict[str, Tensor], focus: float) -> Tensor:
    """Of a model that knows the velocity, but for 1 at the place that varies."""

    def velocity(given: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        weight = (timestep / 1000).view(-1, 1, 1, 1, 1)
        clean = batch["latents"]
        noise = (given[:, :16] - (1 - weight) * clean) / weight
        return (noise - clean + (batch["varies"] > 0)[:, None].float(),)

    model = SimpleNamespace(
        encode_text=lambda ids: (torch.zeros(len(ids), 12, 128), None),
        encode_image=lambda pixels: torch.zeros(len(pixels), 17, 96),
    )
    rng = torch.Generator().manual_seed(1)
    run = replace(DIT, focus=focus)
    return flow_loss(model, SimpleNamespace(text_bias=None), batch, rng, run, velocity)  # type: ignore[arg-type]
