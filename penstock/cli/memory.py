"""What ``--ram`` is of, and what comes on top: in plans, reports and help. Free of torch."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from penstock.engine.machine.memory import overhead_told
from penstock.profiles.hardware import CPU
from penstock.profiles.plan import Plan


def memory_told(plan: Plan) -> str:
    """Return what the process takes of this machine's memory besides its buffers, and in all."""
    on_cpu = plan.machine == CPU
    held = max(each.ram_bytes + (each.vram_bytes if on_cpu else 0) for each in plan.phases)
    return overhead_told("cpu" if on_cpu else "cuda", held)


class MemoryHelp(TyperCommand):
    """A command whose help ends with what was measured of this machine."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As of any command, with that line; it is looked up now and not at import."""
        told = [f"{name}: {overhead_told(device)}." for name, device in _DEVICES]
        self.epilog = "--ram counts buffers. " + " ".join(told)
        super().format_help(ctx, formatter)


_DEVICES = (("On the CPU", "cpu"), ("With a GPU", "cuda"))
