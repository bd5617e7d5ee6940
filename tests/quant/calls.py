"""What is asked of torch: the operations by name, and `_scaled_mm` as demanding as a GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = {"view", "view.dtype", "t", "slice.Tensor", "detach"}


class Calls(TorchDispatchMode):
    """The operations inside it, in order, but for views; "mul.out" writes where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default").removesuffix(".Tensor")
        if str(func).removeprefix("aten.").removesuffix(".default") not in _VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def after(self, name: str) -> list[str]:
        """Those that follow the last of that name."""
        last = len(self.names) - self.names[::-1].index(name)
        return self.names[last:]


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes `torch._scaled_mm` refuse what CUDA's kernels would; gives the kinds of scales that
    are asked for, as they come."""
    kernel, asked = torch._scaled_mm, []

    def strict(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor,
        bias: Tensor | None = None, out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert a.is_contiguous() and b.t().is_contiguous()
        assert a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0
        asked.append("unit" if scale_a.numel() == scale_b.numel() == 1 else "row-wise")
        for scale, shape in ((scale_a, (len(a), 1)), (scale_b, (1, b.shape[1]))):
            assert scale.dtype == torch.float32 and scale.is_contiguous()
            assert asked[-1] == "unit" or scale.shape == shape
        if asked[-1] == "row-wise":
            assert out_dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16)
            assert out is None or (out.is_contiguous() and out.dtype == torch.bfloat16)
        kwargs = {} if out is None else {"out": out}
        return kernel(
            a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=out_dtype, **kwargs
        )

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    return asked
