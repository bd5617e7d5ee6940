"""optimum-quanto without its C++ kernels, which take minutes to compile on first use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def python_unpack() -> Iterator[None]:
    """Packed tensors are unpacked by quanto's own Python code."""
    packed = importlib.import_module("optimum.quanto.tensor.packed")

    def unpack(self: Any) -> Tensor:
        kernel = torch.ops.quanto.unpack.default._op_dk
        python = torch._C.DispatchKey.CompositeExplicitAutograd
        return kernel(python, self._data, self._bits)[: self.shape[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed.PackedTensor, "unpack", unpack)
        yield
