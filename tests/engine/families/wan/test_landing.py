"""Decoded pieces on their way to RAM: the same bytes, one piece later, from buffers that hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from penstock.engine.families.wan.builtin import wan21_i2v_14b
from penstock.engine.families.wan.landing import Landing, landing
from penstock.engine.families.wan.plan import Tiled
from penstock.engine.families.wan.terms import LANDING_BUFFERS, landing_bytes
from penstock.engine.families.wan.vae_decode import Piece, to_uint8
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import Case, Workload
from penstock.profiles.policy import Limits, Policy
from penstock.profiles.rates import Rates
from penstock.profiles.tiling import Window

PICTURES = [torch.rand(3, 4, 5 + at % 2, generator=torch.Generator().manual_seed(at)) * 2 - 1
            for at in range(7)]  # fmt: skip


class Queue:
    """What a device is given, in order."""

    def __init__(self) -> None:
        self.issued: list[str] = []

    def event(self) -> Queue:
        return self

    def record(self) -> None:
        self.issued.append("copy")

    def synchronize(self) -> None:
        self.issued.append("wait")

    def pieces(self) -> Iterator[Piece]:
        for at, pixels in enumerate(PICTURES):
            self.issued.append("decode")
            yield Piece(at // 4, 2, at % 4, Window.whole(4, pixels.shape[2]), pixels)


def test_pieces_land_one_later_with_the_same_bytes() -> None:
    queue = Queue()
    buffers = tuple(torch.zeros(100, dtype=torch.uint8) for _ in range(LANDING_BUFFERS))
    landed = Landing(buffers, queue.event)
    found = []
    for piece in landed.pieces(queue.pieces()):
        queue.issued.append(f"took {piece.tile}/{piece.frame}")
        found.append(piece.pixels.clone())
    assert all(torch.equal(a, to_uint8(b)) for a, b in zip(found, PICTURES, strict=True))
    # The next piece is decoded, and its copy issued, before the one before it is waited for
    assert queue.issued[:8] == [
        "decode", "copy", "decode", "copy", "wait", "took 0/0", "decode", "copy",
    ]  # fmt: skip
    assert queue.issued[-4:] == ["wait", "took 1/1", "wait", "took 1/2"]
    landed.settle()
    assert queue.issued[-1] == "wait"


def test_in_ram_they_are_there_at_once() -> None:
    queue = Queue()
    with landing(torch.device("cpu"), 1) as landed:
        for piece, pixels in zip(landed.pieces(queue.pieces()), PICTURES, strict=True):
            assert torch.equal(piece.pixels, to_uint8(pixels))
            assert len(queue.issued) == 4 * piece.tile + piece.frame + 1


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_the_plan_has_room_for_the_buffers_on_a_card(device: str, expected: bool) -> None:
    work = Workload(VideoShape(1280, 720, 81), 1, guided=False)
    case = Case(wan21_i2v_14b("int8"), work, Rates(1e12, 1e10, 1e9), Policy(tiles=(3, 3)), device)
    found = Tiled("decode", case).best(Limits(1 << 50, 1 << 50))
    assert found is not None
    rows, columns = 8 * 30, 8 * 54  # 90 x 160 latents in 3x3 tiles
    wanted = landing_bytes(3 * rows * columns) if expected else None
    assert dict(found[0].ram_work).get("frames being copied") == wanted
