"""Layers of plain torch on the meta device, of which families build the structure of networks.

Parameters are made without memory and never filled: weights are bound for a visit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_META = torch.device("meta")


class NetworkConfig(dict[str, Any]):
    """A network's config, whose entries are attributes as well; sequences are lists, as in JSON."""

    def __init__(self, defaults: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        for name, value in {**defaults, **config}.items():
            self[name] = list(value) if isinstance(value, tuple) else value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Unfilled:
    """A layer on the meta device whose parameters get no first values: there are none to fill."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options, device=_META)  # type: ignore[call-arg]

    def reset_parameters(self) -> None:
        """Nothing."""


class Linear(_Unfilled, nn.Linear):
    """`torch.nn.Linear`."""


class Conv2d(_Unfilled, nn.Conv2d):
    """`torch.nn.Conv2d`."""


class Conv3d(_Unfilled, nn.Conv3d):
    """`torch.nn.Conv3d`."""


class LayerNorm(_Unfilled, nn.LayerNorm):
    """`torch.nn.LayerNorm`."""


class RMSNorm(_Unfilled, nn.RMSNorm):
    """`torch.nn.RMSNorm`."""


class Embedding(_Unfilled, nn.Embedding):
    """`torch.nn.Embedding`."""


def parameter(*shape: int) -> nn.Parameter:
    """Return one of this shape, without memory."""
    return nn.Parameter(torch.empty(shape, device=_META))
