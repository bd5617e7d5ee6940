"""Small networks on disk, as blocks of random tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.offload.checkpoint import Checkpoint
from penstock.offload.layout import BlockLayout

Block = dict[str, Tensor]


def random_blocks(count: int, seed: int = 0, width: int = 40) -> list[Block]:
    """Blocks of different sizes and types."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "weight": torch.randn(width + index, width, generator=generator).bfloat16(),
            "bias": torch.randn(width + index, generator=generator),
            "scale": torch.randn((), generator=generator),
            "codes": torch.randint(0, 255, (13 + index,), generator=generator).to(torch.uint8),
        }
        for index in range(count)
    ]


def write_blocks(path: Path, blocks: Sequence[Block]) -> list[BlockLayout]:
    """Save the blocks in one file, and lay each out."""
    save_file(
        {f"blocks.{i}.{name}": t for i, block in enumerate(blocks) for name, t in block.items()},
        path,
    )
    return layouts_of(path, len(blocks))


def layouts_of(path: Path, count: int) -> list[BlockLayout]:
    """The layouts of the blocks of a file."""
    checkpoint = Checkpoint.open(path)
    return [
        BlockLayout.from_entries(
            {
                name.removeprefix(f"blocks.{index}."): entry
                for name, entry in checkpoint.items()
                if name.startswith(f"blocks.{index}.")
            }
        )
        for index in range(count)
    ]


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Equal names, types, shapes and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(as_bytes(left[name]), as_bytes(right[name]))
        for name in left
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, 1-D."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file by hand; ``header`` is text, bytes, or an object to be written as JSON."""
    if isinstance(header, bytes):
        text = header
    else:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def aligned_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in order, the data beginning on a page, each on a multiple of 64 by named
    padding tensors: the shape of a pack."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        begin = len(data)
        data += as_bytes(tensor).numpy().tobytes()
        tag = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        header[name] = {
            "dtype": tag,
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
        short = -len(data) % 64
        if short:
            header[f"padding.{name}"] = {
                "dtype": "U8",
                "shape": [short],
                "data_offsets": [len(data), len(data) + short],
            }
            data += bytes(short)
    text = json.dumps(header)
    text += " " * (-(len(text) + 8) % 4096)
    path.write_bytes(raw_file(text, data))


def open_descriptors() -> int:
    """How many file descriptors this process has (0 where the system does not say)."""
    table = Path("/proc/self/fd")
    return len(list(table.iterdir())) if table.exists() else 0
