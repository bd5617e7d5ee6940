"""Modules without weights, and the weights put into them and taken out again.

A skeleton is a module of diffusers or transformers whose parameters live on torch's meta device: it
has names, shapes and code, but no bytes. Streamed tensors are bound to it for one visit and unbound
after it, so that one skeleton serves all blocks and keeps none of them alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penstock.errors import TensorMismatch
from penstock.formats.formats import QuantFormat
from penstock.offload.checkpoint import torch_dtype
from penstock.quant.delta import Delta
from penstock.quant.linear import replace_linears
from penstock.quant.lora import add_deltas
from penstock.quant.paths import Computing

_UNFILLED = (torch.empty, torch.rand, torch.randn)
"""What classes of diffusers and transformers make parameters with that wait for a checkpoint."""


class _Weightless(TorchFunctionMode):
    """New parameters are made on the meta device, and no random number is drawn.

    On this thread only: accelerate's `init_empty_weights` replaces a method of every module of the
    process, and torch's random state is the process's too. Other threads may be at work.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _UNFILLED:
            options["device"] = "meta"
        return func(*args, **options)


def skeleton(model_class: Any, config: Any) -> Any:
    """Return an instance of ``model_class`` in eval mode whose weights are on the meta device.

    Buffers that no checkpoint carries (rotary tables, position ids) are real and on the CPU, as the
    class computes them.

    Args:
        model_class: an `nn.Module` class, of a whole model or of one block.
        config: a mapping of constructor arguments (diffusers' own private entries are allowed for
            its models), or the config object of a transformers model.
    """
    with _Weightless():
        if not isinstance(config, Mapping):
            module = model_class(config)
        elif hasattr(model_class, "from_config"):
            module = model_class.from_config(config)
        else:
            module = model_class(**config)
    unbind(module)
    return module.eval().requires_grad_(False)


def bind(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors`` the parameters and buffers of ``module`` that carry their names, uncopied.

    Names are those of the module's state dict; those that are not given keep what they have. Any
    dtype goes; shapes must be the module's. Nothing is bound if one tensor does not fit.

    Raises:
        TensorMismatch: the first name that the module lacks or whose shape differs, and the count.
    """
    slots = {name: _slot(module, name) for name in tensors}
    _check(module, tensors, slots)
    for name, tensor in tensors.items():
        owner, leaf = slots[name] or (module, name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def unbind(module: nn.Module) -> None:
    """Put all weights of ``module`` back on the meta device, so that it keeps no memory alive.

    Buffers that no checkpoint carries stay.
    """
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owner._parameters[leaf] = nn.Parameter(_on_meta(parameter), requires_grad=False)
        for leaf in owner._buffers.keys() - owner._non_persistent_buffers_set:
            buffer = owner._buffers[leaf]
            if buffer is not None and not buffer.is_meta:
                owner._buffers[leaf] = _on_meta(buffer)


@contextmanager
def bound(module: Any, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Provide ``module`` with ``tensors`` bound inside the block, and unbound whatever happens.

    Raises:
        TensorMismatch: as `bind` does.
    """
    bind(module, tensors)
    try:
        yield module
    finally:
        unbind(module)


def unbound(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the state dict that still have no bytes."""
    return tuple(name for name, tensor in module.state_dict().items() if tensor.is_meta)


def _slot(module: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the sub-module and its own name for the tensor called ``name``; None if there is
    none."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    if owner._parameters.get(leaf) is not None:
        return owner, leaf
    persistent = leaf not in owner._non_persistent_buffers_set
    return (owner, leaf) if owner._buffers.get(leaf) is not None and persistent else None


def _check(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    slots: Mapping[str, tuple[nn.Module, str] | None],
) -> None:
    wrong: list[tuple[str, str, str]] = []
    for name, slot in slots.items():
        found = str(tuple(tensors[name].shape))
        if slot is None:
            wrong.append((name, "no tensor of this name", found))
        elif (shape := getattr(*slot).shape) != tensors[name].shape:
            wrong.append((name, str(tuple(shape)), found))
    if wrong:
        name, expected, shape_found = wrong[0]
        raise TensorMismatch(
            f"{len(wrong)} of {len(tensors)} tensors do not fit {type(module).__name__}, "
            f"the first of them {name!r}",
            expected=expected,
            found=f"shape {shape_found}",
            remedy="The files do not belong to this config; check that the model folder is whole",
        )


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def equip(
    module: Any,
    formats: Mapping[str, QuantFormat],
    deltas: Mapping[str, tuple[Delta, ...]],
    computing: Computing,
    tag: str,
) -> None:
    """Put quantised linears and LoRAs into ``module``.

    Args:
        module: a block, or a network.
        formats: of its quantised linears, by local name.
        deltas: what LoRAs add, by local name.
        computing: how they compute.
        tag: safetensors tag of the dtype they compute in.
    """
    dtype = torch_dtype(tag)
    replace_linears(module, formats, computing, dtype)
    add_deltas(module, deltas, computing, dtype)
