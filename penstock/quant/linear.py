"""A linear layer over quantised storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import TensorMismatch
from penstock.formats.formats import QuantFormat
from penstock.formats.rows import Shape
from penstock.quant.compute import LinearPath, Operands, strategy_for
from penstock.quant.paths import Computing
from penstock.quant.values.tensors import DTYPES, dtype_tag


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with W in a `QuantFormat`.

    Its buffers bear the names of the stored tensors and lie on the meta device until views of a
    streamed block are assigned to them. A dotted name (``weight._data``) is a buffer of a child
    module, so that names in a file and names in the module agree.

    Args:
        shape: of the weight, (out features, in features).
        fmt: how it is stored.
        compute: how it is applied.
        dtype: the compute dtype.
        bias: whether there is one.
    """

    def __init__(
        self, shape: Shape, fmt: QuantFormat, compute: LinearPath, dtype: torch.dtype, *, bias: bool
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.format, self.compute = fmt, compute
        storage = fmt.storage(shape, dtype_tag(dtype))
        self._suffixes = tuple(storage)
        for suffix, (tag, dims) in storage.items():
            register(self, suffix, torch.empty(dims, dtype=DTYPES[tag], device="meta"))
        self.register_buffer(
            "bias", torch.empty(shape[0], dtype=dtype, device="meta") if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in features) -> (..., out features), in the dtype of ``x``."""
        tensors = {suffix: self._stored(suffix) for suffix in self._suffixes}
        shape = (self.out_features, self.in_features)
        bias = self._buffers["bias"]
        return self.compute(Operands(self.format, shape, tensors, bias), x)

    def _stored(self, suffix: str) -> Tensor:
        """Return what bears that name in the file, whatever `answer` says of ``weight``."""
        *parents, leaf = suffix.split(".")
        module: nn.Module = self
        for name in parents:
            module = module._modules[name]  # type: ignore[assignment]
        tensor = module._buffers[leaf]
        assert tensor is not None
        return tensor

    def answer(self, weight: Tensor) -> None:
        """Be like a plain layer to code that asks it for its dtype: ``weight`` answers as the
        layer's own would, and its first parameter (empty) is of that dtype.

        Blocks cast their activations to what they are told: to a storage's dtype, they could not
        be computed with.
        """
        mark = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        self.register_parameter("compute_dtype", mark)
        vars(self)["_weight"] = weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_weight" in vars(self):
            return vars(self)["_weight"]
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return the shape, format and path."""
        return f"{self.in_features}, {self.out_features}, {self.format.name}, {self.compute.path}"


def register(module: nn.Module, suffix: str, tensor: Tensor) -> None:
    """Make ``tensor`` a buffer called ``suffix``; a dotted name goes to a child module."""
    *parents, leaf = suffix.split(".")
    for name in parents:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.register_buffer(leaf, tensor)


def replace_linears(
    module: nn.Module,
    formats: Mapping[str, QuantFormat],
    computing: Computing,
    dtype: torch.dtype,
) -> None:
    """Put a `QuantLinear` in the place of each `nn.Linear` of ``module`` that ``formats`` names.

    For a skeleton of our own on the meta device; names are local (``attn1.to_q``).

    Raises:
        TensorMismatch: a name is no linear of the module.
        ValueError: the format cannot store the weight's shape.
    """
    for name, fmt in formats.items():
        parent_name, _, leaf = name.rpartition(".")
        linear = dict(module.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise TensorMismatch(
                f"{name} cannot be quantised", expected="a linear layer", found=str(type(linear))
            )
        shape = (linear.out_features, linear.in_features)
        if not fmt.fits(shape):
            raise ValueError(f"{fmt.name} cannot store {name} of shape {shape}")
        compute = strategy_for(computing, fmt, shape)
        quantised = QuantLinear(shape, fmt, compute, dtype, bias=linear.bias is not None)
        setattr(module.get_submodule(parent_name), leaf, quantised)
