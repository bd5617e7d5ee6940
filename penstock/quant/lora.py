"""A linear layer with low-rank adapters beside it: the stored weight stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.errors import TensorMismatch
from penstock.formats.formats import plain_format
from penstock.quant.compute import strategy_for
from penstock.quant.delta import Delta
from penstock.quant.linear import QuantLinear, register
from penstock.quant.paths import Computing
from penstock.quant.values.tensors import dtype_tag


class LoraLinear(QuantLinear):
    """``y = x W^T + b``, and for each LoRA ``+ scale * (x down^T) up^T``, W in any format.

    Beside the result only the ``rank`` activations of each token are made: the products are added
    in place. The adapters' tensors are in the dtype of ``x``.

    Args:
        base: the layer as it would be without them, `QuantLinear` or `nn.Linear`.
        deltas: what is added, in this order.
        computing: how a plain weight is applied.
        dtype: the compute dtype.
    """

    def __init__(
        self,
        base: QuantLinear | nn.Linear,
        deltas: tuple[Delta, ...],
        computing: Computing,
        dtype: torch.dtype,
    ) -> None:
        shape = (base.out_features, base.in_features)
        if isinstance(base, QuantLinear):
            fmt, compute = base.format, base.compute
        else:
            fmt = plain_format(dtype_tag(dtype))
            compute = strategy_for(computing, fmt, shape)
        has_bias = isinstance(base.bias, Tensor)
        super().__init__(shape, fmt, compute, dtype, bias=has_bias)
        self.deltas = deltas
        for delta in deltas:
            for name, dims in delta.tensors(shape).items():
                register(self, name, torch.empty(dims, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in features) -> (..., out features), in the dtype of ``x``."""
        y = super().forward(x)
        rows = y.view(-1, self.out_features)
        for delta in self.deltas:
            self._add(delta, x, rows)
        return y

    def _add(self, delta: Delta, x: Tensor, rows: Tensor) -> None:
        """Into ``rows`` (tokens, out features). One pair's activations are gone before the next."""
        if delta.rank:
            inner = F.linear(x, self.get_buffer(delta.name("down"))).view(-1, delta.rank)
            up = self.get_buffer(delta.name("up"))
            up = up.roll(len(up) // 2, 0) if delta.turned else up
            # (tokens, rank) @ (rank, out), added in place: beside the result only the rank's
            # activations exist, and the weight keeps its format.
            rows.addmm_(inner, up.t(), alpha=delta.scale)
        else:
            diff = self.get_buffer(delta.name("diff"))
            rows.addmm_(x.reshape(-1, self.in_features), diff.t(), alpha=delta.scale)

    def extra_repr(self) -> str:
        """Return the shape, format, path and ranks."""
        ranks = ", ".join(str(delta.rank or "diff") for delta in self.deltas)
        return f"{super().extra_repr()}, lora {ranks}"


def add_deltas(
    module: nn.Module,
    deltas: Mapping[str, tuple[Delta, ...]],
    computing: Computing,
    dtype: torch.dtype,
) -> None:
    """Put a `LoraLinear` in the place of each linear layer of ``module`` that ``deltas`` names.

    For a skeleton of our own on the meta device, after its quantised linears are in place.

    Raises:
        TensorMismatch: a name is no linear layer of the module.
    """
    known = dict(module.named_modules())
    for name, added in deltas.items():
        base = known.get(name)
        if not isinstance(base, (QuantLinear, nn.Linear)):
            raise TensorMismatch(
                f"no LoRA can be added to {name}", expected="a linear layer", found=str(type(base))
            )
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, LoraLinear(base, added, computing, dtype))
