"""Blocks like one that was seen are not run again in a rehearsal, and nothing of it changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock.engine.attach.foreign import modules_of
from penstock.engine.attach.rehearsal import Rehearsed, rehearse
from penstock.engine.attach.repeats import Repeats
from tests.engine.attach.tiny_ltx2 import ltx2, made
from tests.versions import TRANSFORMERS_4

NEW = pytest.mark.skipif(TRANSFORMERS_4, reason="LTX-2 is newer")


class _Block(nn.Module):
    """Runs are counted; what a subclass does beside is in `more`."""

    runs = 0

    def __init__(self, wide: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, wide), nn.Linear(wide, 8)

    def forward(self, x: Tensor, store: list[Tensor] | None = None) -> Any:
        type(self).runs += 1
        return self.more(x, self.down(torch.relu(self.up(x))), store)

    def more(self, x: Tensor, out: Tensor, store: list[Tensor] | None) -> Any:
        return x + out


class _Keeps(_Block):
    def more(self, x: Tensor, out: Tensor, store: list[Tensor] | None) -> Any:
        if store is not None:
            store.append(out * 2)
        return x + out


class _Looks(_Block):
    def more(self, x: Tensor, out: Tensor, store: list[Tensor] | None) -> Any:
        return x + out if int(torch.arange(3).sum()) else x


class _Views(_Block):
    def more(self, x: Tensor, out: Tensor, store: list[Tensor] | None) -> Any:
        return x.add_(out).view(x.shape)


class _Passes(_Block):
    def more(self, x: Tensor, out: Tensor, store: list[Tensor] | None) -> Any:
        return x.add_(out)


class _List(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(blocks)
        self.shared: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, self.shared) if self.shared is not None else block(x)
        return x


def _both(
    monkeypatch: pytest.MonkeyPatch, networks: dict[str, nn.Module], call: Callable[[], Any]
) -> tuple[Rehearsed, Rehearsed]:
    """With repeats remembered, and with each block run."""
    found = rehearse(networks, call)
    with monkeypatch.context() as patch:
        patch.setattr(Repeats, "watched", lambda self: nullcontext())
        return found, rehearse(networks, call)


@NEW
def test_a_whole_pipeline_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ltx2()
    remembered, run = _both(monkeypatch, modules_of(pipe), lambda: made(pipe))
    assert remembered == run


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        ([_Block(), _Block(), _Block(), _Block()], 1),
        ([_Block(), _Block(64), _Block(), _Block(64)], 2),
        ([_Passes(), _Passes(), _Passes()], 1),
        ([_Looks(), _Looks(), _Looks()], 3),
        ([_Views(), _Views(), _Views()], 3),
    ],
    ids=["alike", "two widths", "in place", "looks at values", "a view of what is given"],
)
def test_what_is_a_function_of_shapes_is_run_once(
    monkeypatch: pytest.MonkeyPatch, blocks: list[_Block], runs: int
) -> None:
    kind = type(blocks[0])
    network = _List(*blocks)
    kind.runs = 0
    networks: dict[str, nn.Module] = {"network": network}
    remembered, run = _both(monkeypatch, networks, lambda: network(torch.zeros(1000, 8)))
    assert remembered == run
    assert kind.runs == runs + len(blocks)
    assert not any("forward" in vars(block) for block in blocks)


def test_what_keeps_a_tensor_is_run_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a cache of keys and values does; its memory counts for each block."""
    network = _List(*(_Keeps() for _ in range(4)))
    _Keeps.runs = 0

    def call() -> None:
        network.shared = []
        network(torch.zeros(1000, 8))
        network.shared = None

    remembered, run = _both(monkeypatch, {"network": network}, call)
    assert remembered == run and _Keeps.runs == 8


def test_another_setting_is_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [_Block() for _ in range(4)]
    for number, block in enumerate(blocks):
        block.layer_idx, block.window = number, number // 2
    network = _List(*blocks)
    _Block.runs = 0
    remembered, run = _both(
        monkeypatch, {"network": network}, lambda: network(torch.zeros(1000, 8))
    )
    assert remembered == run and _Block.runs == 2 + 4


def _vae() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=32,
    )  # fmt: skip


def test_what_goes_over_the_limit_is_tiled() -> None:
    """It is as if tiling had been on from the start; under the limit frames stay whole."""
    latent = torch.zeros(1, 4, 64, 64)
    vae = _vae()
    whole = rehearse({"vae": vae}, lambda: vae.decode(latent), limit=1 << 40)
    assert not whole.tiled and not vae.use_tiling
    found = rehearse({"vae": vae}, lambda: vae.decode(latent), limit=whole.peak_bytes - 1)
    assert found.tiled == ("vae",) and vae.use_tiling and "decode" not in vars(vae)
    tiled = _vae()
    tiled.enable_tiling()
    want = rehearse({"vae": tiled}, lambda: tiled.decode(latent))
    assert (found.visits, found.uses, found.peak_bytes) == (want.visits, want.uses, want.peak_bytes)
    assert found.peak_bytes < whole.peak_bytes
    at_limit = rehearse({"vae": _vae()}, lambda: None, limit=0)
    assert not at_limit.tiled


@NEW
@pytest.mark.parametrize("batch", [None, 2])
def test_a_mask_that_is_made_at_once_has_the_shape_of_theirs(batch: int | None) -> None:
    from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as theirs

    from penstock.engine.attach.rehearsal import _causal_mask

    block = theirs.HunyuanVideo15AttnBlock
    given = (3, 4, torch.bfloat16, "cpu", batch)
    want, found = block.prepare_causal_attention_mask(*given), _causal_mask(*given)
    assert (found.shape, found.stride(), found.dtype) == (want.shape, want.stride(), want.dtype)
