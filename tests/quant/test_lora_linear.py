"""Low-rank adapters beside a weight in any format, against the sum of both as one weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import TensorMismatch
from penstock.formats.formats import FORMATS
from penstock.quant.arithmetic import dequantise, quantise
from penstock.quant.delta import Delta
from penstock.quant.linear import QuantLinear, replace_linears
from penstock.quant.lora import LoraLinear, add_deltas
from penstock.quant.paths import Computing, Scratch
from tests.meter import StorageMeter

ROWS, COLUMNS = 128, 64
DELTAS = (Delta(0, 4, 0.5), Delta(1, 9, -2.0), Delta(1, 0, 0.25))


class _Net(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        with torch.device("meta"):
            self.inner = nn.ModuleDict({"proj": nn.Linear(COLUMNS, ROWS, bias=bias)})


def _tensors(deltas: tuple[Delta, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {k: s for delta in deltas for k, s in delta.tensors((ROWS, COLUMNS)).items()}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def _bind(layer: LoraLinear, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        layer.get_submodule(owner)._buffers[leaf] = tensor


def _whole(weight: Tensor, tensors: dict[str, Tensor], deltas: tuple[Delta, ...]) -> Tensor:
    total = weight.double()
    for delta in deltas:
        if delta.rank:
            up, down = tensors[delta.name("up")], tensors[delta.name("down")]
            total = total + delta.scale * (up.double() @ down.double())
        else:
            total = total + delta.scale * tensors[delta.name("diff")].double()
    return total


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["fp32", "int8", "fp8", "nf4", "gguf-q8_0"])
def test_it_is_the_sum_of_the_stored_weight_and_the_adapters(name: str, bias: bool) -> None:
    fmt, draw = FORMATS[name], torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    stored = quantise(fmt, weight)
    offset = torch.randn(ROWS, generator=draw)
    net, computing = _Net(bias=bias), Computing(Scratch(4 * ROWS * COLUMNS, "cpu"))
    if name != "fp32":
        replace_linears(net, {"inner.proj": fmt}, computing, torch.float32)
    add_deltas(net, {"inner.proj": DELTAS}, computing, torch.float32)
    layer = net.inner["proj"]
    assert isinstance(layer, LoraLinear)
    added = _tensors(DELTAS, torch.float32)
    _bind(layer, stored | added | ({"bias": offset} if bias else {}))
    value = dequantise(fmt, stored, (ROWS, COLUMNS), torch.float32)
    for shape in ((5, COLUMNS), (1, 7, COLUMNS), (2, 3, COLUMNS)):
        x = torch.randn(shape, generator=draw)
        expected = F.linear(
            x.double(), _whole(value, added, DELTAS), offset.double() if bias else None
        )
        assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_ranks_activations_are_made_beside_the_result(dtype: torch.dtype) -> None:
    net, deltas = _Net(bias=True), (Delta(0, 16, 0.5), Delta(1, 24, 1.0))
    add_deltas(net, {"inner.proj": deltas}, Computing(Scratch(0, "cpu")), dtype)
    layer = net.inner["proj"]
    assert isinstance(layer, LoraLinear)
    weight, offset = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    tensors = _tensors(deltas, dtype) | {"weight": weight, "bias": offset}
    _bind(layer, tensors)
    x = torch.randn(1, 100, COLUMNS).to(dtype)
    with torch.no_grad(), StorageMeter([*tensors.values(), x]) as meter:
        layer(x)
    assert meter.peak <= 100 * (ROWS + 24) * dtype.itemsize


def test_only_linear_layers_take_adapters() -> None:
    net, computing = _Net(bias=True), Computing(Scratch(0, "cpu"))
    for name in ("inner", "nothing"):
        with pytest.raises(TensorMismatch, match=f"no LoRA can be added to {name}"):
            add_deltas(net, {name: DELTAS}, computing, torch.float32)
    assert isinstance(net.inner["proj"], nn.Linear)
    add_deltas(net, {"inner.proj": DELTAS}, computing, torch.float32)
    assert "lora 4, 9, diff" in repr(net.inner["proj"])
    assert issubclass(LoraLinear, QuantLinear)
