"""Plans of MiniMax-H3 at its true shapes, without any file."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import pytest

from penstock.engine.families.minimax_h3.builtin import PRUNED, minimax_h3, minimax_h3_pruned
from penstock.engine.families.minimax_h3.config import TRANSFORMER
from penstock.engine.families.minimax_h3.structure import transformer_shapes
from penstock.engine.families.minimax_h3.terms import TEXT_TOKENS
from penstock.errors import OverBudget
from penstock.profiles.hardware import Hardware
from penstock.profiles.manifest import VideoShape
from penstock.profiles.phases import Noise, Workload
from penstock.profiles.plan import Plan
from penstock.profiles.planner import plan
from penstock.profiles.rates import Rates
from penstock.units import GIB, MIB

RATES = Rates(4e13, 1.2e10, 2e9, conv_flops=2e13, memory_bytes_per_s=3e11)
LARGE, SMALL = VideoShape(1344, 768, 124), VideoShape(864, 480, 124)


@lru_cache
def _plan(shape: VideoShape, vram: float, ram: float, pictures: int = 0) -> Plan:
    work = Workload(shape, 50, guided=False, pictures=pictures, noise=Noise("euler"))
    machine = Hardware(
        device="cuda", vram_bytes=int(vram * GIB), ram_bytes=int(ram * GIB), name="a card",
        rates=RATES,
    )  # fmt: skip
    return plan(minimax_h3("int8"), work, machine)


@pytest.mark.parametrize(
    ("shape", "vram", "pictures"), [(LARGE, 8, 2), (LARGE, 4, 0), (SMALL, 4, 2)]
)
def test_it_fits_small_cards_beside_16_gib_of_ram(
    shape: VideoShape, vram: float, pictures: int
) -> None:
    found = _plan(shape, vram, 16, pictures)
    assert found["denoise"].forwards == (49, 49)
    for phase in found.phases:
        assert phase.vram_bytes <= vram * GIB
        assert phase.ram_bytes <= 16 * GIB


def test_the_text_encoder_is_small() -> None:
    found = _plan(LARGE, 8, 16, pictures=2)
    for name in ("vision", "text"):
        assert found[name].vram_bytes <= 3 * GIB
        assert found[name].ram_bytes <= 4 * GIB


def test_what_makes_the_tables_never_streams() -> None:
    for weight_format in ("bf16", "int8"):
        spec = minimax_h3(weight_format).transformer
        streamed = sum(spec.weights.block_bytes)
        tables = sum(spec.table_block_bytes)
        if weight_format == "int8":
            tables //= 2  # as if they were in 8 bits as well
        assert streamed <= 0.62 * (streamed + tables)
    found = _plan(LARGE, 4, 16)
    assert found["context"].read_bytes >= sum(spec.table_block_bytes)
    assert found["denoise"].read_bytes < found["denoise"].forwards[1] * 1.01 * streamed


def test_a_card_too_small_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(OverBudget, match="VRAM"):
        _plan(LARGE, 1, 16)


def test_a_pruned_model_reads_no_projections() -> None:
    """Published pruned files have 532 tensors; what is missing of 33.1 B is 13.0 B in blocks."""
    whole, pruned = minimax_h3("int8").transformer, minimax_h3_pruned("int8").transformer
    assert pruned.weights == whole.weights
    assert sum(pruned.table_block_bytes) < 0.007 * sum(whole.table_block_bytes)
    config = TRANSFORMER | PRUNED
    counted = sum(map(prod, transformer_shapes(config).values()))
    assert 19.9e9 < counted < 20.2e9
    fused = ("to_k.weight", "to_v.weight")
    named = sum(not name.endswith(fused) for name in transformer_shapes(config))
    assert named + 1 == 532  # with the rotary frequencies, and q, k and v as one


def test_tables_take_what_is_said_of_them() -> None:
    spec = minimax_h3("bf16").transformer
    assert 18 * MIB < spec.table_bytes(2) < 20 * MIB
    assert 27 * MIB < spec.table_bytes(3) < 30 * MIB
    assert TEXT_TOKENS == 512
