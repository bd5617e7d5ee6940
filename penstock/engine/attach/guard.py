"""What a module must be to be streamed, and what must not be done to it meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from penstock.errors import UsageError

_MOVING_HOOKS = ("group_offloading", "layerwise_casting", "tensor_parallel", "context_parallel")
"""Parts of the names of diffusers' hooks that move, cast or divide weights. Others (its caches,
layer skipping) change what is computed, and work as they do without us."""

_CHANGING = (
    "load_lora_adapter", "add_adapter", "fuse_lora", "unfuse_lora", "unload_lora",
    "fuse_qkv_projections", "unfuse_qkv_projections", "load_state_dict", "save_pretrained",
    "enable_group_offload", "enable_layerwise_casting", "enable_parallelism",
)  # fmt: skip
"""Methods of models that would change, move or save weights that are away."""


def check_runnable(module: nn.Module, name: str) -> None:
    """Refuse a module that somebody else moves or has compiled.

    Args:
        name: for messages.

    Raises:
        UsageError: names what was found and how to do without it.
    """
    if "mmgp" in sys.modules:
        raise UsageError(
            "mmgp was imported in this process",
            expected="one offloader",
            found="mmgp, which moves weights by itself and replaces how safetensors are read",
            remedy="Run penstock in a process that does not import mmgp.",
        )
    for path, inner in module.named_modules():
        place = f"{name}.{path}" if path else name
        if hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None:
            raise UsageError(
                f"{place} was compiled",
                expected="a module that runs by itself: compiled code keeps weights of its own",
                found="torch.compile",
                remedy="Load it anew, and do not compile it.",
            )
        if hasattr(inner, "_hf_hook"):
            raise UsageError(
                f"{place} is under a hook of accelerate",
                expected="a module that runs by itself",
                found=type(inner._hf_hook).__name__,
                remedy="Load the pipeline without device_map and enable_*_cpu_offload, or call "
                "accelerate.hooks.remove_hook_from_module(module, recurse=True): the budget does "
                "it.",
            )
        registry = getattr(inner, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks:
            if any(part in hook for part in _MOVING_HOOKS):
                raise UsageError(
                    f"{place} is under diffusers' {hook} hook",
                    expected="weights that nobody else moves or casts",
                    found=hook,
                    remedy="Load it without: the budget does it.",
                )


def guard(
    module: nn.Module, undo: str, stack: ExitStack, leave: Callable[[], None] | None = None
) -> None:
    """Refuse, until the end of ``stack``, what would change or move weights that are away: before
    anything of the module has changed.

    Args:
        undo: what ends it: "stream" or "attach".
        leave: gives the device's memory back until the module is used again: what a move to the
            CPU is for, which some pipelines make by themselves. None: it is refused too.
    """
    remedy = _REMEDIES[undo]

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for dtype, device in {(p.dtype, p.device) for p in module.parameters()}:
            found = tried(fn, dtype, device)
            if found == (dtype, device):
                continue
            if leave is not None and found == (dtype, torch.device("cpu")):
                leave()
                continue
            raise UsageError(
                f"a {type(module).__name__} that is streamed cannot be moved or cast",
                expected=f"{device}, {dtype}",
                found=f"{found[1]}, {found[0]}",
                remedy=remedy,
            )
        return module

    _override(module, "_apply", apply, stack)
    hooked: Any = module  # torch gives no types for it
    refused = hooked.register_state_dict_pre_hook(lambda *_: _refuse(module, "state_dict", remedy))
    stack.callback(refused.remove)
    for name in _CHANGING:
        if callable(getattr(type(module), name, None)):
            _override(module, name, _Refusal(module, name, remedy), stack)


def tried(
    fn: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[torch.dtype, torch.device]:
    """Return what would become of a tensor of that kind: an empty one is tried."""
    found = fn(torch.empty(0, dtype=dtype, device=device))
    return found.dtype, found.device


_REMEDIES = {
    "stream": "Close the stream first.",
    "attach": "Call penstock.detach(pipe) first.",
}


class _Refusal:
    """Stands in the place of a method."""

    def __init__(self, module: nn.Module, name: str, remedy: str) -> None:
        self._module, self._name, self._remedy = module, name, remedy

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refuse.

        Raises:
            UsageError: always.
        """
        _refuse(self._module, self._name, self._remedy)


def _refuse(module: nn.Module, name: str, remedy: str) -> NoReturn:
    raise UsageError(
        f"{name} of a {type(module).__name__} that is streamed cannot be called",
        expected="weights that are in the module",
        found="weights that come when they are used",
        remedy=remedy,
    )


def _override(module: nn.Module, name: str, made: Any, stack: ExitStack) -> None:
    """Set an attribute of this object alone, which hides its class's method."""
    vars(module)[name] = made
    stack.callback(vars(module).pop, name)
