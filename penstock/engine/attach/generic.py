"""Any pipeline of diffusers under one budget: its modules stay, their weights come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from penstock.engine.attach.fileweights import FileWeights
from penstock.engine.attach.foreign import ForeignModule, modules_of
from penstock.engine.attach.guard import check_runnable
from penstock.engine.attach.shared import SharedBudget
from penstock.engine.attach.surgery import check_unstreamed
from penstock.errors import OverBudget, UsageError
from penstock.formats.formats import QuantFormat
from penstock.offload.tiers import release_cached
from penstock.profiles.hardware import Hardware
from penstock.profiles.plan import Items
from penstock.units import format_bytes

DENOISERS = ("transformer", "unet")
"""What the names of the components begin with that a `format` is meant for."""


def check_attachable(pipe: Any) -> None:
    """Refuse what is no pipeline of torch modules, or whose modules others move.

    Raises:
        UsageError: names the reason.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    if not isinstance(pipe, DiffusionPipeline | ModularPipeline):
        raise UsageError(
            f"a {type(pipe).__name__} cannot be attached",
            expected="a DiffusionPipeline or a ModularPipeline of diffusers",
            remedy="penstock.stream takes any module with a list of blocks.",
        )
    modules = modules_of(pipe)
    if not any(any(True for _ in each.parameters()) for each in modules.values()):
        raise UsageError(
            f"a {type(pipe).__name__} cannot be attached",
            expected="components that are torch modules with weights",
            found=", ".join(modules) or "none",
            remedy="Load its components first.",
        )
    for name, module in modules.items():
        check_runnable(module, name)
        check_unstreamed(module)
        _check_upcast(name, module)


def _check_upcast(name: str, module: nn.Module) -> None:
    """Pipelines cast such a VAE to fp32 and back in the middle of a call."""
    config: Any = getattr(module, "config", None)
    half = getattr(module, "dtype", None) == torch.float16
    if half and getattr(config, "force_upcast", False):
        raise UsageError(
            f"{name} is in fp16 and asks to be cast to fp32 while the pipeline runs",
            expected="a VAE in the dtype that it computes in",
            found="force_upcast",
            remedy=f"Call pipe.{name}.to(torch.float32) before attaching.",
        )


def open_modules(
    pipe: Any,
    hardware: Hardware,
    fmt: QuantFormat | None,
    work_bytes: int | Mapping[str, int],
    folder: Path,
    stack: ExitStack,
    returns: Callable[[], bool],
    files: Mapping[str, FileWeights] = MappingProxyType({}),
) -> tuple[SharedBudget, int]:
    """Let the weights of all modules go to ``folder``; ``stack`` undoes it.

    Args:
        fmt: store the linear layers of the denoisers' blocks in it.
        work_bytes: of VRAM, left to what the pipeline computes: all the time, or by module.
        files: where the weights of modules lie that have none.
        returns: whether the weights are wanted back in the end.

    Returns:
        The budget, and the bytes of the packs.

    Raises:
        UsageError: weights that cannot be streamed.
        OverBudget: not even one block of each module fits.
        StorageError: the disk is full or fails.
    """
    budget, guests, fixed = guests_of(pipe, hardware, fmt, work_bytes, files)
    check_budget(hardware, fixed, guests)
    budget.reserve(fixed)
    stack.callback(release_cached, torch.device(hardware.place))
    for guest in guests:
        guest.empty(folder, stack, returns)
    budget.tenants.extend(guests)
    stack.callback(budget.close)
    for module in modules_of(pipe).values():
        _end_with_calls(module, budget, stack)
    return budget, sum(each.file_bytes for each in guests)


def guests_of(
    pipe: Any,
    hardware: Hardware,
    fmt: QuantFormat | None,
    work_bytes: int | Mapping[str, int],
    files: Mapping[str, FileWeights],
) -> tuple[SharedBudget, list[ForeignModule], Items]:
    """Return the networks of ``pipe`` as they will share a budget, and what they hold to the end.

    Raises:
        UsageError: weights that cannot be streamed.
    """
    budget = SharedBudget(hardware)
    taken: set[int] = set()
    guests = []
    for name, module in modules_of(pipe).items():
        if not any(True for _ in module.parameters()):
            continue
        wanted = fmt if name.startswith(DENOISERS) else None
        own = 0 if isinstance(work_bytes, int) else work_bytes.get(name, 0)
        guests.append(ForeignModule(name, module, budget, wanted, taken, files.get(name), own))
        taken |= {id(p) for p in module.parameters()}
    always = work_bytes if isinstance(work_bytes, int) else 0
    fixed: Items = (*(item for each in guests for item in each.fixed), ("activations", always))
    return budget, guests, fixed


def check_budget(hardware: Hardware, fixed: Items, guests: list[ForeignModule]) -> None:
    """Refuse budgets in which some network does not run.

    Raises:
        OverBudget: names the least that is enough.
    """
    held = sum(nbytes for _, nbytes in fixed)
    largest = max(guests, key=lambda each: each.least_vram_bytes)
    need = held + largest.least_vram_bytes
    if need > hardware.vram_bytes:
        items = (*fixed, (f"{largest.name}: one block, and what is in none",
                          largest.least_vram_bytes))  # fmt: skip
        raise OverBudget(
            "VRAM", need, hardware.vram_bytes, items,
            f"Give vram={need} ({format_bytes(need)}) or more",
        )  # fmt: skip
    largest = max(guests, key=lambda each: each.least_ram_bytes)
    need = largest.least_ram_bytes
    if need > hardware.ram_bytes:
        raise OverBudget(
            "RAM", need, hardware.ram_bytes, ((f"{largest.name}: one block", need),),
            f"Give ram={need} ({format_bytes(need)}) or more",
        )  # fmt: skip


def _end_with_calls(module: nn.Module, budget: SharedBudget, stack: ExitStack) -> None:
    """Pipelines call this of their modules when a call ends: the memory is given back."""
    own: Callable[[], None] | None = getattr(module, "_reset_stateful_cache", None)

    def reset() -> None:
        if own is not None:
            own()
        budget.release()

    vars(module)["_reset_stateful_cache"] = reset
    stack.callback(vars(module).pop, "_reset_stateful_cache")
