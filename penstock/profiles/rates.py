"""What a machine computes and moves a second, and where measured figures are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from penstock.errors import ProfileError
from penstock.folders import config_folder
from penstock.profiles.attending import INT8, SDPA, Attending
from penstock.regular import read_regular

TINY_CHUNK, SMALL_CHUNK = 2, 32
"""Tokens of the chunks whose overheads are measured."""


@dataclass(frozen=True)
class Rates:
    """Attainable rates, not peaks of a data sheet.

    Attributes:
        flops: operations a second of matrix products in the compute dtype.
        copy_bytes_per_s: pinned host memory to device.
        read_bytes_per_s: disk to host memory.
        attention_flops: of attention; None: as matrix products.
        int8_attention_flops: of self-attention in 8 bits; None: as ``attention_flops``.
        sol_attention_flops: of sparse self-attention, counted as if it attended to all; None: as
            ``attention_flops``.
        conv_flops: of the VAE's convolutions; None: as matrix products.
        conv_element_s: of one element that they read: its norm and activation, and its copies;
            None: ``conv_flops`` is the rate of all that the VAE does.
        conv_pixel_s: of one pixel that they make, however many its channels: its norm, and what a
            kernel computes beside few channels; None: not counted.
        conv_call_s: of one convolution, however small: its operations' own; None: not counted.
        eight_bit_flops: of int8 matrix products; None: the device has none that are faster.
        fp8_flops: of fp8 matrix products; None: the device has none.
        nvfp4_flops, mxfp8_flops: of products in these formats; None: the device has none.
        memory_bytes_per_s: the device's own memory; decoding of weights runs at it (None: not
            counted).
        overhead_s: of one chunk of `SMALL_CHUNK` tokens or more in one block, besides its tokens.
        tiny_overhead_s: the same of one of `TINY_CHUNK` tokens, for which products do less in vain;
            None: as of larger ones.
        tiny_key_s: of one element of the hidden states that a chunk of `TINY_CHUNK` tokens attends
            to: its key and value are read for few queries; None: not counted.
        element_s: of one element of the hidden states in one block: norms, rotations, activations.
        video_pixels_per_s: into H.264.
    """

    flops: float
    copy_bytes_per_s: float
    read_bytes_per_s: float
    attention_flops: float | None = None
    int8_attention_flops: float | None = None
    sol_attention_flops: float | None = None
    conv_flops: float | None = None
    conv_element_s: float | None = None
    conv_pixel_s: float | None = None
    conv_call_s: float | None = None
    eight_bit_flops: float | None = None
    fp8_flops: float | None = None
    nvfp4_flops: float | None = None
    mxfp8_flops: float | None = None
    memory_bytes_per_s: float | None = None
    overhead_s: float = 2e-4
    tiny_overhead_s: float | None = None
    tiny_key_s: float | None = None
    element_s: float = 1e-13
    video_pixels_per_s: float = 2.5e7

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ProfileError(
                    f"a machine's {field.name} must be positive",
                    expected="a rate above 0",
                    found=str(value),
                )

    def self_attention_flops(self, attention: str) -> float:
        """Return the rate of the transformer's self-attention by that word; as torch's own where
        that rate is unknown."""
        name = Attending.of(attention).backend.rate
        own: float | None = None if name is None else getattr(self, name)
        return own or self.attention_flops or self.flops

    def self_attention_s(self, attention: str, dense: float = 0.0) -> float:
        """Return the seconds of one operation of self-attention by that word, the mean of a job of
        which torch attends to the share ``dense`` of the steps."""
        asked, torchs = (1 / self.self_attention_flops(word) for word in (attention, SDPA))
        return asked if not dense else (1 - dense) * asked + dense * torchs

    def requantise_s(self, attention: str, elements: int, itemsize: int) -> float:
        """Return the seconds in which attention in 8 bits quantises a block's keys and values,
        once: every chunk does. Values are read twice, as each channel of all tokens has one scale.

        Args:
            elements: of the keys, and of the values as many.
            itemsize: of the compute dtype.
        """
        if attention != INT8 or self.memory_bytes_per_s is None:
            return 0.0
        return elements * (3 * itemsize + 2) / self.memory_bytes_per_s

    def product_flops(self, path: str) -> float | None:
        """Return the rate of the matrix products of a compute path; None: the device has none of
        them."""
        found = {
            "fp8": self.fp8_flops, "int8": self.eight_bit_flops,
            "nvfp4": self.nvfp4_flops, "mxfp8": self.mxfp8_flops,
        }  # fmt: skip
        return found.get(path, self.flops)

    def chunk_overhead_s(self, tokens: int, attended: int = 0) -> float:
        """Return the seconds of a chunk besides its tokens: between two sizes, by the logarithm.

        Args:
            tokens: of the chunk.
            attended: elements of the hidden states whose keys and values it reads.
        """
        if self.tiny_overhead_s is None:
            return self.overhead_s
        place = math.log(max(tokens, 1) / TINY_CHUNK) / math.log(SMALL_CHUNK / TINY_CHUNK)
        share = min(1.0, max(0.0, place))
        tiny_s = self.tiny_overhead_s + attended * (self.tiny_key_s or 0.0)
        return share * self.overhead_s + (1 - share) * tiny_s


def stored_rates(machine: str, folder: Path | None = None) -> Rates | None:
    """Return the rates measured on ``machine``, or None.

    Raises:
        ProfileError: the file is damaged.
    """
    known = _read(_file(folder)).get(machine)
    return None if known is None else _from_json(known, _file(folder))


def store_rates(machine: str, rates: Rates, folder: Path | None = None) -> Path:
    """Keep ``rates`` for ``machine``; returns the file they are in."""
    path = _file(folder)
    known = _read(path) | {machine: asdict(rates)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return path


def _file(folder: Path | None) -> Path:
    return (config_folder() if folder is None else folder) / "rates.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, type(value).__name__)
    return value


def _from_json(value: Mapping[str, Any], path: Path) -> Rates:
    try:
        return Rates(**value)
    except TypeError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, found: str) -> ProfileError:
    return ProfileError(
        f"{path} cannot be used",
        expected="the rates that penstock doctor stores",
        found=found,
        remedy="Delete it and run penstock doctor again.",
    )
