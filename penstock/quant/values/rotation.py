"""ConvRot's rotation: each group of columns times a regular Hadamard matrix.

Source: ConvRot as comfy-kitchen has it (`tensor/int8_utils.py`): the Kronecker powers of one 4 x 4
matrix of 1 and -1, over the square root of the size. It is symmetric and its own inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rotation(x: Tensor, size: int) -> Tensor:
    """Return ``x`` (rows, columns; fp32, contiguous) times the matrix without its factor, in new
    memory.

    The factor is ``size ** -0.5``. Whole numbers stay whole: sums of 8-bit codes are exact.
    """
    # A Kronecker product, so two small products: 16 x 16 within, (size / 16) square across: that is
    # 16 + size / 16 multiplications an element instead of ``size``.
    inner = min(size, 16)
    part = (x.view(-1, inner) @ _matrix(inner, x.device)).view(-1, size // inner, inner)
    if size > inner:
        part = torch.matmul(_matrix(size // inner, x.device), part)
    return part.view(x.shape)


def _matrix(size: int, device: torch.device) -> Tensor:
    base = 1 - 2 * torch.eye(4, device=device).flip(0)
    made = torch.ones(1, 1, device=device)
    while len(made) < size:
        made = torch.kron(made, base)
    return made
