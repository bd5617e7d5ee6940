"""What stands in the place of a network in a diffusers pipeline that penstock runs.

It has no weights, answers what a pipeline asks of the network (config, dtype, device), and computes
what its forward would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from penstock.engine.attach.desk import Desk
from penstock.engine.attach.endless import EndlessStream
from penstock.engine.model.component import Component
from penstock.errors import UsageError
from penstock.offload.device import indexed


class Part(nn.Module):
    """What all parts have in common.

    Args:
        name: of the component in the pipeline.
        desk: of the pipeline.
        config: the model's.
        device: where a pipeline's tensors are; results go there, whatever device computes.
    """

    def __init__(self, name: str, desk: Desk, config: Any, device: torch.device) -> None:
        super().__init__()
        self.name, self.desk, self.config, self.device = name, desk, config, device

    @property
    def component(self) -> Component:
        """Its files."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.component.dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Stays where and what it is.

        Raises:
            UsageError: another device or dtype is asked for.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device = None if device is None else indexed(device)
        if device not in (None, self.device) or dtype not in (None, self.dtype):
            raise UsageError(
                f"the {self.name} of an attached pipeline cannot be moved or cast",
                expected=f"{self.device}, {self.dtype}",
                found=f"{device or self.device}, {dtype or self.dtype}",
                remedy="Detach the pipeline, move it, and attach it again.",
            )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: the {self.name} of an attached pipeline "
                "is run by penstock; penstock.detach(pipe) gives the model itself back"
            ) from None

    def _reset_stateful_cache(self) -> None:
        """Pipelines call this of their models when a call ends: the memory is given back."""
        self.desk.release()


def refuse_arguments(part: Part, what: Mapping[str, Any], remedy: str) -> None:
    """Refuse the first argument that is given and has no meaning here."""
    for name, value in what.items():
        if value is not None and value is not False and value != {}:
            raise UsageError(
                f"the {part.name} of an attached pipeline does not take {name}",
                found=f"{name}={value!r}"[:80],
                remedy=remedy,
            )


def desk_visits(
    desk: Desk, stream: EndlessStream, component: Component
) -> Iterator[tuple[int, Any]]:
    """Yield one pass over all blocks: each index with the block module, its weights bound
    meanwhile."""
    for index, tensors in stream.forward_pass():
        with component.bound(tensors, index) as block:
            yield index, block
