"""Models of true shapes with random weights, written as fast as the disk takes them, to measure on.

The values are samples, one a shape and format, each a pool of random numbers repeated from a place
of its own; each parameter gets its sample rotated by rows of its own, so that no two blocks are
alike and none is made anew: 16 GB take no longer than their writing. The file is plain safetensors
whose blocks begin on pages, as in packs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import torch
from torch import Tensor

from penstock.engine.bench.synthetic import synthetic
from penstock.engine.family.protocol import ComponentKind
from penstock.engine.files.keys import stored_name
from penstock.engine.packs.layout import PlacedTensor, Spec, header_of, place_runs
from penstock.engine.packs.plan import runs_of
from penstock.errors import UsageError
from penstock.formats.formats import QuantFormat, get_format
from penstock.formats.rows import Shape
from penstock.quant.arithmetic import quantise
from penstock.quant.policy import default_policy
from penstock.units import format_bytes

FORMATS = ("bf16", "fp16", "fp8", "int8", "nf4")
"""What `penstock bench` can make: formats whose tensors are ordered by rows."""

COMPUTE_TAG = "BF16"
FREE_BYTES = 2 << 30
"""Of the disk, left to others."""

_FILE = "diffusion_pytorch_model.safetensors"
_SIGMA = 0.02
_STRIDE = 7919  # a prime: rotations of neighbours have no common pattern
_POOL = (1 << 22) + 15
"""Random numbers that are really drawn. A prime, so that no two rows of a matrix begin at the same
place of them, whatever its columns."""


def write_synthetic(
    folder: Path,
    name: str,
    *,
    blocks: int | None = None,
    weight_format: str = "int8",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a whole model folder in diffusers' layout; returns ``folder``.

    The transformer and the VAE have their true shapes (the transformer ``blocks`` of its blocks);
    the encoders are cut to a few thin layers, their outputs as wide as the true ones'.

    Args:
        progress: called with the bytes of the transformer written and their sum.

    Raises:
        UsageError: no such model, number of blocks or format, or the disk has no room.
    """
    model = synthetic(name)
    model.write_rest(folder, seed)
    name = model.kind.name
    if (folder / name).exists():  # a small one, from the pipeline that wrote the rest
        shutil.rmtree(folder / name)
    write_streamed(
        folder / name, model.kind, model.config(blocks), weight_format, seed=seed, progress=progress
    )
    return folder


def streamed_bytes(kind: ComponentKind, config: Mapping[str, Any], weight_format: str) -> int:
    """Return the size of the file that `write_streamed` makes."""
    return _File.of(kind, config, weight_format).nbytes


def write_streamed(
    folder: Path,
    kind: ComponentKind,
    config: Mapping[str, Any],
    weight_format: str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a random network (weights and config.json) and return the file of its weights.

    Raises:
        UsageError: a format that is not made here, or the disk has no room.
    """
    plan = _File.of(kind, config, weight_format)
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder, plan.nbytes)
    about = dict(config) | {"_class_name": kind.made_by[1]}
    (folder / "config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    path = folder / _FILE
    samples = _Samples(get_format(weight_format), kind.blocks, seed)
    with path.open("wb", buffering=0) as file:
        _write_all(file, plan.header)
        for tensor in plan.tensors:
            _pad_to(file, plan.data_start + tensor.place.offset)
            for piece in samples.pieces(tensor):
                _write_all(file, piece)
            if progress is not None:
                progress(file.tell(), plan.nbytes)
    return path


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes + FREE_BYTES:
        raise UsageError(
            "the disk has no room for the synthetic model",
            expected=f"{format_bytes(nbytes + FREE_BYTES)} free in {folder}",
            found=format_bytes(free),
            remedy="Give fewer --blocks, or another --folder.",
        )


@dataclass(frozen=True)
class _Tensor:
    """One stored tensor, where it lies, and of which parameter (with its shape) it is a part."""

    place: PlacedTensor
    parameter: str
    of: tuple[int, ...]
    suffix: str
    quantised: bool


@dataclass(frozen=True)
class _File:
    """Where everything goes, before any of it is made."""

    tensors: tuple[_Tensor, ...]
    header: bytes

    @property
    def data_start(self) -> int:
        return len(self.header)

    @property
    def nbytes(self) -> int:
        last = self.tensors[-1].place
        return len(self.header) + last.offset + last.nbytes

    @classmethod
    def of(cls, kind: ComponentKind, config: Mapping[str, Any], weight_format: str) -> _File:
        if weight_format not in FORMATS:
            raise UsageError(
                "no synthetic weights in this format",
                expected="one of " + ", ".join(FORMATS),
                found=repr(weight_format),
            )
        fmt, shapes = get_format(weight_format), kind.shapes(config)
        chosen = set(default_policy(shapes))
        parts: dict[str, tuple[str, str, bool]] = {}  # of each stored tensor
        runs: dict[str, dict[str, Spec]] = {}
        for run, names in runs_of(kind, shapes).items():
            runs[run] = {}
            for name in names:
                quantised = name in chosen and fmt.fits(_matrix(shapes[name]))
                stored = (
                    fmt.storage(_matrix(shapes[name]), COMPUTE_TAG)
                    if quantised
                    else {"weight": (COMPUTE_TAG, shapes[name])}
                )
                for suffix, spec in stored.items():
                    full = stored_name(name, suffix)
                    runs[run][full], parts[full] = spec, (name, suffix, quantised)
        placed = [tensor for run in place_runs(runs) for tensor in run.tensors]
        tensors = []
        for place in placed:
            name, suffix, quantised = parts[place.name]
            tensors.append(_Tensor(place, name, shapes[name], suffix, quantised))
        return cls(tuple(tensors), header_of(placed, {"format": "pt"}))


def _matrix(shape: tuple[int, ...]) -> Shape:
    return shape[0], shape[1]


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _pad_to(file: IO[bytes], position: int) -> None:
    _write_all(file, bytes(position - file.tell()))


@dataclass
class _Samples:
    """Stored tensors of random parameters, made once a shape, kind and format."""

    format: QuantFormat
    blocks: str
    seed: int
    _made: dict[tuple[object, ...], dict[str, memoryview]] = field(default_factory=dict)

    def pieces(self, tensor: _Tensor) -> tuple[memoryview, memoryview]:
        """Return the bytes of ``tensor``, in two pieces: a sample, rotated by whole rows."""
        in_block = tensor.parameter.startswith(self.blocks)
        data = self._sample(tensor, keep=in_block)[tensor.suffix]
        rows = tensor.of[0] if tensor.quantised else math.prod(tensor.of)
        if len(data) % rows:  # one scale for all rows: nothing to rotate
            rows = 1
        cut = _rotation(tensor.parameter, self.blocks) % rows * (len(data) // rows)
        return data[cut:], data[:cut]

    def _sample(self, tensor: _Tensor, *, keep: bool) -> dict[str, memoryview]:
        kind = _kind(tensor.parameter)
        key = (kind, tensor.of, tensor.quantised)
        if key in self._made:
            return self._made[key]
        values = self._values(tensor.of, crc32(repr(key).encode()) % _POOL)
        if kind == "norm":
            values = values.mul_(5).add_(1)
        stored = {"weight": values}
        if tensor.quantised:
            stored = quantise(self.format, values, tensor.parameter)
        made = {suffix: _as_memory(each) for suffix, each in stored.items()}
        if keep:
            self._made[key] = made
        return made

    def _values(self, shape: Sequence[int], begin: int) -> Tensor:
        """Return the pool over and over, from ``begin`` on, in new memory."""
        count = math.prod(shape)
        return self._pool.roll(-begin).repeat(-(-count // _POOL))[:count].view(*shape)

    @cached_property
    def _pool(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randn(_POOL, generator=draw, dtype=torch.bfloat16).mul_(_SIGMA)


def _kind(parameter: str) -> str:
    return "norm" if "norm" in parameter and parameter.endswith("weight") else "plain"


def _rotation(parameter: str, blocks: str) -> int:
    """Return a number of rows that differs from block to block, and within a block from name to
    name."""
    if not parameter.startswith(blocks):
        return crc32(parameter.encode())
    number, _, local = parameter.removeprefix(blocks).partition(".")
    return _STRIDE * (int(number) + 1) + sum(local.encode())


def _as_memory(tensor: Tensor) -> memoryview:
    flat: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat
