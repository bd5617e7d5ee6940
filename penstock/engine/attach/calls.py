"""A network's call as plain data: what it was asked in a digest, what it gave in tensors and JSON.

Only tensors, plain values and containers of them are told: an object may hold a state of its own
(a cache of keys and values), which an answer from a record would not bring forward.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penstock.engine.packs.file import running_digest
from penstock.engine.store.sealed import TENSOR_TYPES, raw_bytes
from penstock.errors import JournalError

_PLAIN = (bool, int, float, str, type(None))
_SPECIAL = (torch.dtype, torch.device, torch.Size)
_SPREAD = 4
"""Memory that a kept tensor may span, in numbers of its elements: its strides are kept so far."""

_DEEPEST = 32


class NotPlain(Exception):  # noqa: N818 - no error: the call is computed, and not kept
    """A value that cannot be told; its kind is the argument."""


@dataclass(frozen=True)
class Asked:
    """What a call was asked.

    Attributes:
        form: names, types, shapes and plain values.
        values: a checksum of all tensors' bytes (XXH3-128), in hex.
    """

    form: str
    values: str


def asked(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Asked:
    """Tell what a call is asked.

    Raises:
        NotPlain: something else than tensors and plain values.
    """
    values, form = running_digest(), running_digest()
    for part in _told([list(args), dict(kwargs)], 0):
        if isinstance(part, Tensor):
            form.update(f"{part.dtype} {tuple(part.shape)};".encode())
            values.update(raw_bytes(part))
        else:
            form.update(f"{part};".encode())
    return Asked(form.hexdigest(), values.hexdigest())


def _told(value: Any, depth: int) -> Iterator[Tensor | str]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in _PLAIN or isinstance(value, _SPECIAL):
        yield repr(value)
    elif isinstance(value, Mapping) and depth < _DEEPEST:
        yield f"{type(value).__name__} of {len(value)}"
        for name, each in value.items():
            yield repr(name)
            yield from _told(each, depth + 1)
    elif type(value) in (list, tuple) and depth < _DEEPEST:
        yield f"{type(value).__name__} of {len(value)}"
        for each in value:
            yield from _told(each, depth + 1)
    else:
        raise NotPlain(type(value).__name__)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors that a call is given.

    Raises:
        NotPlain: something else than tensors and plain values.
    """
    return [part for part in _told(value, 0) if isinstance(part, Tensor)]


@dataclass(frozen=True)
class Given:
    """What a call gave, taken apart.

    Attributes:
        tensors: in the order in which they come, as they are.
        form: JSON-ready; says how they lie together.
    """

    tensors: tuple[Tensor, ...]
    form: Any

    def copied(self) -> dict[str, Tensor]:
        """Return copies in host memory, by number."""
        return {
            str(number): torch.empty(tuple(each.shape), dtype=each.dtype).copy_(each.detach())
            for number, each in enumerate(self.tensors)
        }


def apart(value: Any) -> Given:
    """Take apart what a call gave: tensors, plain values, and tuples, lists, dicts and the outputs
    of diffusers and transformers that are made of these.

    Raises:
        NotPlain: something else.
    """
    tensors: list[Tensor] = []
    form = _apart(value, tensors, 0)
    return Given(tuple(tensors), form)


def _apart(value: Any, tensors: list[Tensor], depth: int) -> Any:
    if isinstance(value, Tensor):
        if str(value.dtype) not in TENSOR_TYPES:
            raise NotPlain(str(value.dtype))
        tensors.append(value)
        return ["tensor", value.device.type == "cpu", _strides(value)]
    if type(value) in _PLAIN:
        return ["plain", value]
    if depth < _DEEPEST and type(value) in (list, tuple):
        return [type(value).__name__, [_apart(each, tensors, depth + 1) for each in value]]
    if depth < _DEEPEST and isinstance(value, dict) and all(type(name) is str for name in value):
        kind = "dict" if type(value) is dict else type(value).__name__
        parts = [[name, _apart(each, tensors, depth + 1)] for name, each in value.items()]
        return [kind, parts]
    raise NotPlain(type(value).__name__)


def _strides(tensor: Tensor) -> list[int] | None:
    """Return how it lies in memory, which sums may round by; None: in one row, or too far
    apart."""
    if tensor.is_contiguous() or _span(tensor.shape, tensor.stride()) > _SPREAD * tensor.numel():
        return None
    return list(tensor.stride())


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def together(
    form: Any, tensors: Mapping[str, Tensor], network: nn.Module, device: torch.device
) -> Any:
    """Put together what `apart` took apart. Classes are looked up among the names of the module
    that ``network``'s class stands in, and must be a library's output.

    Args:
        tensors: by number, in host memory.
        device: of those that were not there.

    Raises:
        JournalError: ``form`` is none of `apart`'s, or of other tensors.
    """
    left = [tensors.get(str(number)) for number in reversed(range(len(tensors)))]
    try:
        made = _together(form, left, network, device, 0)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise JournalError("not what a call gave", found=str(error)) from error
    if left:
        raise JournalError("not what a call gave", found=f"{len(left)} tensors more")
    return made


def _together(
    form: Any, left: list[Tensor | None], network: nn.Module, device: torch.device, depth: int
) -> Any:
    if depth > _DEEPEST:
        raise ValueError("too deep")
    if form[0] == "tensor":
        _, is_on_cpu, strides = form
        tensor = left.pop()
        if tensor is None:
            raise ValueError("tensors of other names")
        return _laid(tensor, strides).to("cpu" if is_on_cpu else device)
    kind, parts = form
    if kind == "plain":
        if type(parts) not in _PLAIN:
            raise TypeError(f"a plain {type(parts).__name__}")
        return parts
    if kind in ("list", "tuple"):
        made = [_together(each, left, network, device, depth + 1) for each in parts]
        return tuple(made) if kind == "tuple" else made
    own = {name: _together(each, left, network, device, depth + 1) for name, each in parts}
    return own if kind == "dict" else _output_class(kind, network)(**own)


def _laid(tensor: Tensor, strides: list[int] | None) -> Tensor:
    if strides is None:
        return tensor
    if len(strides) != tensor.ndim or any(type(each) is not int or each < 0 for each in strides):
        raise ValueError(f"strides {strides}")
    if _span(tensor.shape, strides) > _SPREAD * tensor.numel():
        raise ValueError(f"strides {strides} of {tuple(tensor.shape)}")
    made = torch.empty_strided(tuple(tensor.shape), tuple(strides), dtype=tensor.dtype)
    return made.copy_(tensor)


def _output_class(name: str, network: nn.Module) -> Any:
    from diffusers.utils import BaseOutput
    from transformers.utils import ModelOutput

    for kind in type(network).__mro__:
        found = getattr(sys.modules.get(kind.__module__), name, None)
        if isinstance(found, type) and issubclass(found, BaseOutput | ModelOutput):
            return found
    raise ValueError(f"no output called {name:.80}")


def form_text(form: Any) -> str:
    """Return a form as text."""
    return json.dumps(form, allow_nan=True, separators=(",", ":"))


def form_of(text: str) -> Any:
    """Read a form's text.

    Raises:
        JournalError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise JournalError("not what a call gave", found=str(error)) from error


def output_bytes(given: Given) -> int:
    """Return the bytes of all its tensors."""
    return sum(each.nbytes for each in given.tensors)


def largest_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the largest of some tensors; 0: there are none."""
    return max((each.nbytes for each in tensors), default=0)
