"""QuantLinear: bit-equal to the reference where it must be, near it where it may differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import LedgerOverflow, TensorMismatch
from penstock.quant.compute import (
    Dequant,
    Fp8Gemm,
    Int8Gemm,
    Operands,
    gemm_chunk_rows,
    quantise_tokens,
)
from penstock.quant.format import FORMATS, QuantFormat, get_format
from penstock.quant.linear import QuantLinear, replace_linears
from penstock.quant.paths import Computing, Scratch, scratch_bytes
from penstock.quant.scaled import Scaled8
from tests.meter import StorageMeter
from tests.quant.weights import small_weight

WRITABLE = [name for name in FORMATS if not name.startswith("gguf") or name == "gguf-q8_0"]
SHAPE = (48, 256)


def tokens(*dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*dims, generator=generator).to(dtype)


def assign_buffers(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What a streamed slot does: views take the place of the meta buffers, by name."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        assert module.get_submodule(parent)._buffers[leaf].shape == tensor.shape  # type: ignore[union-attr]
        module.get_submodule(parent)._buffers[leaf] = tensor


def linear(fmt: QuantFormat, compute: object, dtype: torch.dtype) -> tuple[QuantLinear, Tensor]:
    """A layer with a bias, its tensors assigned, and its dequantised weight."""
    layer = QuantLinear(SHAPE, fmt, compute, dtype, bias=True)  # type: ignore[arg-type]
    stored = fmt.quantise(small_weight(*SHAPE, dtype))
    assign_buffers(layer, stored | {"bias": tokens(48, dtype=dtype)})
    return layer, fmt.dequantise(stored, SHAPE, dtype)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dequant_path_is_bit_equal_to_a_plain_linear(name: str, dtype: torch.dtype) -> None:
    layer, weight = linear(get_format(name), Dequant(Scratch(4 * 48 * 256, "cpu")), dtype)
    x = tokens(2, 9, 256, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, weight, tokens(48, dtype=dtype)))


def test_layers_share_one_scratch_buffer() -> None:
    scratch = Scratch(4 * 48 * 256, "cpu")
    first, first_weight = linear(get_format("int8"), Dequant(scratch), torch.float32)
    second, second_weight = linear(get_format("nf4"), Dequant(scratch), torch.float32)
    x = tokens(5, 256)
    wanted = F.linear(x, first_weight, tokens(48)), F.linear(x, second_weight, tokens(48))
    for _ in range(2):
        assert torch.equal(first(x), wanted[0]) and torch.equal(second(x), wanted[1])


def test_a_scratch_that_is_too_small_says_what_it_needs() -> None:
    layer, _ = linear(get_format("int8"), Dequant(Scratch(1000, "cpu")), torch.float32)
    with pytest.raises(LedgerOverflow, match="49,152"):
        layer(tokens(5, 256))


def test_a_plain_weight_in_the_compute_dtype_needs_no_scratch() -> None:
    layer, weight = linear(get_format("bf16"), Dequant(Scratch(0, "cpu")), torch.bfloat16)
    x = tokens(5, 256, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, weight, tokens(48, dtype=torch.bfloat16)))


GEMMS = {"fp8": Fp8Gemm, "int8": Int8Gemm, "quanto-fp8": Fp8Gemm, "quanto-int8": Int8Gemm}


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_products_are_near_the_reference(name: str, dtype: torch.dtype) -> None:
    layer, weight = linear(get_format(name), GEMMS[name](), dtype)
    x = tokens(3, 40, 256, dtype=dtype) * torch.logspace(-3, 3, 40)[:, None].to(dtype)
    layer.bias = None
    found, wanted = layer(x), F.linear(x, weight)
    assert found.dtype == dtype and found.shape == (3, 40, 48)
    cosine = F.cosine_similarity(found.double(), wanted.double(), dim=-1)
    assert cosine.min() > {"fp8": 0.998, "int8": 0.9995}[name.removeprefix("quanto-")]


@pytest.mark.parametrize("scale", ["none", "scalar", "one", "one_one", "row", "column"])
def test_fp8_products_read_every_layout_of_scale(scale: str) -> None:
    fmt = Scaled8("fp8", "F8_E4M3", "fp8", scale=scale)  # type: ignore[arg-type]
    layer, weight = linear(fmt, Fp8Gemm(), torch.float32)
    x = tokens(40, 256)
    found, wanted = layer(x) - tokens(48), F.linear(x, weight)
    assert F.cosine_similarity(found, wanted, dim=0).min() > 0.998


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_int8_in_chunks_is_bit_equal_to_int8_at_once(rows: int) -> None:
    fmt = get_format("int8")
    assert gemm_chunk_rows(SHAPE, rows * (5 * 256 + 8 * 48)) == rows
    chunked, _ = linear(fmt, Int8Gemm(rows * (5 * 256 + 8 * 48)), torch.bfloat16)
    whole, _ = linear(fmt, Int8Gemm(), torch.bfloat16)
    x = tokens(50, 256, dtype=torch.bfloat16)
    assert torch.equal(chunked(x), whole(x))


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_temporaries_stay_within_the_chunk_bytes(name: str) -> None:
    limit = 64 * 1024
    layer, _ = linear(get_format(name), GEMMS[name](limit), torch.bfloat16)
    x = tokens(300, 256, dtype=torch.bfloat16)
    layer(x)
    with StorageMeter(exclude=[x, *layer.buffers()]) as meter:
        out = layer(x)
    assert limit // 2 < meter.peak - out.nbytes <= limit


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_token_that_is_not_finite_poisons_its_own_row_only(name: str, bad: float) -> None:
    layer, _ = linear(get_format(name), GEMMS[name](), torch.float32)
    x = tokens(20, 256)
    x[4, 100] = bad
    finite = torch.isfinite(layer(x)).all(dim=1)
    assert finite.tolist() == [row != 4 for row in range(20)]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_token_of_zeros_gives_the_bias(name: str) -> None:
    layer, _ = linear(get_format(name), GEMMS[name](), torch.float32)
    assert torch.equal(layer(torch.zeros(3, 256)), tokens(48).expand(3, 48))


def test_tokens_use_the_whole_range_of_codes() -> None:
    codes, scale = quantise_tokens(tokens(30, 256) * 5, torch.int8)
    assert codes.abs().amax(1).tolist() == [127] * 30
    assert torch.allclose(codes * scale, tokens(30, 256) * 5, atol=float(scale.max()) * 0.51)


def test_a_format_without_8_bit_operands_is_refused() -> None:
    stored = get_format("nf4").quantise(small_weight())
    with pytest.raises(TypeError, match="nf4"):
        Int8Gemm()(Operands(get_format("nf4"), SHAPE, stored, None), tokens(3, 256))


def test_exact_decodes_everything_and_fast_multiplies_where_it_can() -> None:
    scratch = Scratch(0, "cpu")
    both = frozenset(("fp8", "int8"))
    exact = Computing(scratch, "exact", both)  # type: ignore[arg-type]
    fast = Computing(scratch, "fast", both)  # type: ignore[arg-type]
    only_int8 = Computing(scratch, "fast", frozenset(("int8",)))
    fp8, int8, nf4 = get_format("fp8"), get_format("int8"), get_format("nf4")
    forbidden = Scaled8("fp8", "F8_E4M3", None)
    assert {exact.path_for(f, SHAPE) for f in FORMATS.values()} == {"dequant"}
    assert [fast.path_for(f, SHAPE) for f in (fp8, int8, nf4)] == ["fp8", "int8", "dequant"]
    assert fast.path_for(forbidden, SHAPE) == "dequant"
    assert fast.path_for(int8, (48, 250)) == fast.path_for(int8, (50, 256)) == "dequant"
    assert [only_int8.path_for(f, SHAPE) for f in (fp8, int8)] == ["dequant", "int8"]


def test_the_scratch_is_as_large_as_the_largest_weight_that_is_decoded() -> None:
    bf16, fp32, int8 = get_format("bf16"), get_format("fp32"), get_format("int8")
    weights = [(bf16, (100, 200)), (int8, (48, 256)), (fp32, (20, 20))]
    assert scratch_bytes(weights, "BF16") == 2 * 48 * 256
    assert scratch_bytes(weights, "F32") == 4 * 100 * 200
    assert scratch_bytes(weights[:1], "BF16") == 0


def test_a_linear_says_what_it_allocates() -> None:
    int8 = get_format("int8")
    exact = Computing(Scratch(0, "cpu"))
    fast = Computing(Scratch(0, "cpu"), "fast", frozenset(("int8",)), 10_000)
    assert exact.workspace_bytes(int8, SHAPE) == int8.workspace_bytes(SHAPE, "cpu")
    assert fast.workspace_bytes(int8, SHAPE) == 10_000
    assert fast.workspace_bytes(int8, (16, 16_000)) == 80_128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(256, 48)])})
        self.proj = nn.Linear(256, 48, bias=False)
        self.norm = nn.LayerNorm(256)


@pytest.mark.parametrize("name", WRITABLE)
def test_linears_of_a_skeleton_are_replaced_and_take_stored_tensors(name: str) -> None:
    with torch.device("meta"):
        block = Block()
    fmt = get_format(name)
    computing = Computing(Scratch(2 * 48 * 256, "cpu"))
    replace_linears(block, {"attn1.to_out.0": fmt, "proj": fmt}, computing, torch.bfloat16)
    suffixes = fmt.storage(SHAPE, "BF16")
    names = {name for name, _ in block.named_buffers()}
    assert names == {"attn1.to_out.0.bias"} | {
        f"{layer}.{suffix}" for layer in ("attn1.to_out.0", "proj") for suffix in suffixes
    }
    assert all(buffer.is_meta for buffer in block.buffers())
    stored = fmt.quantise(small_weight(*SHAPE, torch.bfloat16))
    assign_buffers(block, {f"proj.{suffix}": t for suffix, t in stored.items()})
    x = tokens(4, 256, dtype=torch.bfloat16)
    wanted = F.linear(x, fmt.dequantise(stored, SHAPE, torch.bfloat16))
    assert torch.equal(block.proj(x), wanted)


def test_only_linears_can_be_replaced() -> None:
    with torch.device("meta"):
        block = Block()
    computing = Computing(Scratch(0, "cpu"))
    for name in ("norm", "missing"):
        with pytest.raises(TensorMismatch, match=name):
            replace_linears(block, {name: get_format("int8")}, computing, torch.float32)
    narrow = nn.Sequential(nn.Linear(250, 4))
    with pytest.raises(ValueError, match="nf4 cannot store 0"):
        replace_linears(narrow, {"0": get_format("nf4")}, computing, torch.float32)
