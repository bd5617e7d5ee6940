"""What stands in a module for a weight whose bytes are elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penstock.errors import UsageError


class AwayWeight(Tensor):
    """Shape, dtype and device of a weight, without its bytes.

    Code that only asks what a weight is like is answered; what would compute with it, copy it or
    print its values is refused.

    Args:
        like: the weight.
        device: where it is when it is there.
        name: for messages.
    """

    _name: str

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, name: str) -> AwayWeight:
        made: AwayWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, dtype=like.dtype, device=device, requires_grad=False
        )
        made._name = name
        # What makes `isinstance(weight, nn.Parameter)` true for a class of its own.
        made._is_param = True  # type: ignore[attr-defined]
        return made

    def __init__(self, like: Tensor, device: torch.device, name: str) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse.

        Raises:
            UsageError: always; names the weight.
        """
        name = next((each._name for each in args if isinstance(each, cls)), "a weight")
        if torch.is_grad_enabled():
            raise UsageError(
                f"{name} is not on the device now ({func} was asked for), and streamed blocks "
                "cannot be trained: their weights are there for a moment only",
                expected="a forward pass under torch.no_grad() or torch.inference_mode()",
                found="one that records gradients",
            )
        raise UsageError(
            f"{name} is not on the device now ({func} was asked for)",
            expected="a weight that is asked of its module when it is used",
            found="one that was kept while another block was used, or all weights at once",
            remedy="Close the stream to move, copy or save the module.",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return what it stands for."""
        return f"AwayWeight({self._name}, shape={tuple(self.shape)}, dtype={self.dtype})"
