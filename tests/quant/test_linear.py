"""QuantLinear: bit-equal to the reference where it must be, near it where it may differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import LedgerOverflow, TensorMismatch
from penstock.formats.formats import FORMATS, QuantFormat, get_format, writable
from penstock.formats.scaled import Scaled8
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.compute import (
    Dequant,
    Fp8Gemm,
    Int8Gemm,
    Operands,
    gemm_chunk,
    quantise_tokens,
    strategy_for,
)
from penstock.quant.linear import QuantLinear, replace_linears
from penstock.quant.paths import (
    Computing,
    Kernel,
    Path,
    Scratch,
    gemm_fixed_bytes,
    gemm_token_bytes,
    scratch_bytes,
)
from tests.meter import StorageMeter, allocated_peak
from tests.quant.calls import Calls, as_on_cuda
from tests.quant.weights import small_weight

WRITABLE = list(writable())
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


def linear(
    fmt: QuantFormat, compute: object, dtype: torch.dtype, shape: tuple[int, int] = SHAPE
) -> tuple[QuantLinear, Tensor]:
    """A layer with a bias, its tensors assigned, and its dequantised weight."""
    layer = QuantLinear(shape, fmt, compute, dtype, bias=True)  # type: ignore[arg-type]
    stored = quantise(fmt, small_weight(*shape, dtype))
    assign_buffers(layer, stored | {"bias": tokens(shape[0], dtype=dtype)})
    return layer, dequantise(fmt, stored, shape, dtype)


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


SCALES = ["none", "scalar", "one", "one_one", "row", "column"]


@pytest.mark.parametrize("scale", SCALES)
def test_fp8_products_read_every_layout_of_scale(scale: str) -> None:
    fmt = Scaled8("fp8", "F8_E4M3", "fp8", scale=scale)  # type: ignore[arg-type]
    layer, weight = linear(fmt, Fp8Gemm(), torch.float32)
    x = tokens(40, 256)
    found, wanted = layer(x) - tokens(48), F.linear(x, weight)
    assert F.cosine_similarity(found, wanted, dim=0).min() > 0.998


@pytest.mark.parametrize("scale_tag", ["F32", "BF16"])
@pytest.mark.parametrize("scale", SCALES)
def test_row_wise_fp8_products_read_every_layout_of_scale(
    scale: str, scale_tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = as_on_cuda(monkeypatch)
    fmt = Scaled8("fp8", "F8_E4M3", "fp8", scale, scale_tag)  # type: ignore[arg-type]
    layer, weight = linear(fmt, Fp8Gemm(rowwise=True), torch.bfloat16)
    x, bias = tokens(40, 256, dtype=torch.bfloat16), tokens(48).bfloat16()
    found, wanted = layer(x).float() - bias, F.linear(x.float(), weight.float())
    assert asked == ["row-wise"]
    assert F.cosine_similarity(found, wanted, dim=0).min() > 0.998


def test_a_row_wise_product_is_the_kernel_s_own_result(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = as_on_cuda(monkeypatch)
    size = gemm_token_bytes(SHAPE, "cpu", rowwise=True)
    limit = gemm_fixed_bytes(SHAPE) + 16 * size
    layer, _ = linear(get_format("fp8"), Fp8Gemm(limit, rowwise=True), torch.bfloat16)
    # Neither the layer's tokens nor their codes may come in columns.
    x = tokens(256, 40, dtype=torch.bfloat16).t()
    with Calls() as calls:
        found = layer(x)
    assert asked == 3 * ["row-wise"] and calls.after("_scaled_mm.out") == []
    codes, scale = quantise_tokens(x, torch.float8_e4m3fn)
    rows = layer.get_buffer("weight_scale").reshape(1, -1)
    wanted = torch._scaled_mm(
        codes, layer.get_buffer("weight").t(), scale, rows, layer.bias, out_dtype=torch.bfloat16
    )
    # The order of the kernel's sums may hang on how many tokens there are.
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_bf16_is_multiplied_row_wise(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = as_on_cuda(monkeypatch)
    rowwise, _ = linear(get_format("fp8"), Fp8Gemm(rowwise=True), dtype)
    unit, _ = linear(get_format("fp8"), Fp8Gemm(), dtype)
    x = tokens(40, 256, dtype=dtype)
    assert torch.equal(rowwise(x), unit(x)) and asked == ["unit", "unit"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_int8_in_chunks_is_bit_equal_to_int8_at_once(rows: int, dtype: torch.dtype) -> None:
    fmt, size = get_format("int8"), gemm_token_bytes(SHAPE, "cpu")
    limit = gemm_fixed_bytes(SHAPE) + rows * size
    assert gemm_chunk(SHAPE, size, limit) == rows
    assert gemm_chunk(SHAPE, size, limit - 1) == max(1, rows - 1)
    chunked, _ = linear(fmt, Int8Gemm(limit), dtype)
    whole, _ = linear(fmt, Int8Gemm(), dtype)
    x = tokens(50, 256, dtype=dtype)
    assert torch.equal(chunked(x), whole(x))


def test_chunks_on_a_gpu_are_thousands_of_tokens_at_the_largest_matrix() -> None:
    for shape in ((13824, 5120), (5120, 13824)):
        assert gemm_chunk(shape, gemm_token_bytes(shape, "cuda"), 128 << 20) > 1900


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48, 256), (512, 64)])
@pytest.mark.parametrize("name", ["int8", "quanto-int8"])
def test_int8_takes_the_chunk_bytes_and_no_more(
    name: str, shape: tuple[int, int], bias: bool
) -> None:
    limit = 200_000
    layer, _ = linear(get_format(name), Int8Gemm(limit), torch.bfloat16, shape)
    layer.bias = layer.bias if bias else None
    x = tokens(1000, shape[1], dtype=torch.bfloat16)
    out_bytes = layer(x).nbytes
    assert 0.95 * limit < allocated_peak(lambda: layer(x)) - out_bytes <= limit


@pytest.mark.parametrize("shape", [(48, 256), (512, 64)])
@pytest.mark.parametrize("rowwise", [False, True])
def test_fp8_takes_no_more_than_the_chunk_bytes(rowwise: bool, shape: tuple[int, int]) -> None:
    """What a CPU's kernels take for themselves is not counted: they are for trying only."""
    limit = 64 * 1024
    layer, _ = linear(get_format("fp8"), Fp8Gemm(limit, rowwise), torch.bfloat16, shape)
    x = tokens(300, shape[1], dtype=torch.bfloat16)
    layer(x)
    with StorageMeter(exclude=[x, *layer.buffers()]) as meter:
        out = layer(x)
    assert 0 < meter.peak - out.nbytes <= limit


LAYERS = [
    (Fp8Gemm(), torch.float32),
    (Fp8Gemm(rowwise=True), torch.bfloat16),
    (Int8Gemm(), torch.float32),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("compute", "dtype"), LAYERS)
def test_a_token_that_is_not_finite_poisons_its_own_row_only(
    compute: Fp8Gemm | Int8Gemm, dtype: torch.dtype, bad: float
) -> None:
    layer, _ = linear(get_format(compute.path), compute, dtype)
    x = tokens(20, 256, dtype=dtype)
    x[4, 100] = bad
    finite = torch.isfinite(layer(x)).all(dim=1)
    assert finite.tolist() == [row != 4 for row in range(20)]


@pytest.mark.parametrize(("compute", "dtype"), LAYERS)
def test_a_token_of_zeros_gives_the_bias(compute: Fp8Gemm | Int8Gemm, dtype: torch.dtype) -> None:
    layer, _ = linear(get_format(compute.path), compute, dtype)
    bias = tokens(48, dtype=dtype)
    assert torch.equal(layer(torch.zeros(3, 256, dtype=dtype)), bias.expand(3, 48))


@pytest.mark.parametrize(("name", "kernel"), [("int8", "_int_mm"), ("fp8", "_scaled_mm")])
def test_a_product_is_scaled_in_two_passes(name: str, kernel: str) -> None:
    layer, _ = linear(get_format(name), GEMMS[name](), torch.bfloat16)
    x = tokens(20, 256, dtype=torch.bfloat16)
    with Calls() as calls:
        layer(x)
    assert calls.after(kernel) == ["mul.out", "addcmul.out"]
    layer.bias = None
    with Calls() as calls:
        layer(x)
    assert calls.after(kernel) == ["mul.out", "mul.out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_tokens_in_fp32(dtype: torch.dtype) -> None:
    x = tokens(30, 256, dtype=dtype) * torch.logspace(-3, 3, 30)[:, None].to(dtype)
    x[3] = 0
    for kind, largest in ((torch.int8, 127), (torch.float8_e4m3fn, 448)):
        with Calls() as calls:
            codes, scale = quantise_tokens(x, kind)
        wanted = x.float().abs().amax(1, keepdim=True) / largest
        wanted[3] = 1
        quotients = x.float() / wanted
        if kind == torch.int8:
            quotients = quotients.round()
        assert torch.equal(scale, wanted) and torch.equal(codes.float(), quotients.to(kind).float())
        passes = {torch.int8: ["div", "round_", "copy_"], torch.float8_e4m3fn: ["div.out"]}
        assert calls.after("empty.memory_format") == passes[kind]


def test_tokens_use_the_whole_range_of_codes() -> None:
    codes, scale = quantise_tokens(tokens(30, 256) * 5, torch.int8)
    assert codes.abs().amax(1).tolist() == [127] * 30
    assert torch.allclose(codes * scale, tokens(30, 256) * 5, atol=float(scale.max()) * 0.51)


def test_a_format_without_8_bit_operands_is_refused() -> None:
    stored = quantise(get_format("nf4"), small_weight())
    with pytest.raises(TypeError, match="nf4"):
        Int8Gemm()(Operands(get_format("nf4"), SHAPE, stored, None), tokens(3, 256))


def test_exact_decodes_everything_and_fast_multiplies_where_it_can() -> None:
    scratch = Scratch(0, "cpu")
    both: frozenset[Kernel] = frozenset(("fp8", "int8"))
    exact = Computing(scratch, "exact", both)
    fast = Computing(scratch, "fast", both)
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
    assert fast.workspace_bytes(int8, (16, 16_000)) == 9 * 16_000 + 8 + 8 * 16 + 4
    assert fast.workspace_bytes(int8, (16_000, 16)) == 16 + 8 * 16_000 + 8 + 8 * 16_000 + 4


def test_a_gpu_casts_in_its_kernels_and_pads_a_few_tokens() -> None:
    gpu = Computing(Scratch(0, "cuda"), "fast", frozenset(("int8",)), 10_000)
    assert gpu.workspace_bytes(get_format("int8"), (16_000, 16)) == (
        33 * (16 + 4 * 16_000 + 8) + 8 * 16_000 + 4
    )
    assert gemm_token_bytes((16, 16_000), "cuda") == 5 * 16_000 + 8
    assert gemm_token_bytes((16_000, 16), "cuda", rowwise=True) == 5 * 16 + 8


@pytest.mark.parametrize(
    ("works", "path", "compute"),
    [
        (("int8", "fp8"), "fp8", Fp8Gemm(10_000)),
        (("fp8", "fp8-rowwise"), "fp8", Fp8Gemm(10_000, rowwise=True)),
        (("fp8-rowwise", "int8"), "dequant", None),
    ],
)
def test_scales_are_left_to_the_kernel_where_that_works(
    works: tuple[Kernel, ...], path: Path, compute: Fp8Gemm | None
) -> None:
    computing = Computing(Scratch(0, "cpu"), "fast", frozenset(works), 10_000)
    found = strategy_for(computing, get_format("fp8"), SHAPE)
    assert computing.path_for(get_format("fp8"), SHAPE) == found.path == path
    assert compute is None or found == compute


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
    stored = quantise(fmt, small_weight(*SHAPE, torch.bfloat16))
    assign_buffers(block, {f"proj.{suffix}": t for suffix, t in stored.items()})
    x = tokens(4, 256, dtype=torch.bfloat16)
    wanted = F.linear(x, dequantise(fmt, stored, SHAPE, torch.bfloat16))
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
