"""The options of a run as flags: one table, from which every command takes its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import typer

from penstock.cli.files import reported
from penstock.profiles.options import Options

Command = Callable[..., None]

NOTHING = Options()
"""The default of a command's parameter ``options``, which `with_options` always gives."""


class Flag(NamedTuple):
    """A flag: what its help says, and its name where that is not the option's."""

    help: str
    name: str | None = None


FLAGS: Mapping[str, Flag] = MappingProxyType(
    {
        "vram": Flag('VRAM budget, such as "12GiB" (what is free, less a reserve).'),
        "ram": Flag(
            "RAM budget for buffers: weights, activations, frames. The interpreter and "
            "libraries come on top."
        ),
        "device": Flag("Device: cuda, cpu or auto (auto)."),
        "profile": Flag("Profile name, or path of a .toml file (auto)."),
        "format": Flag("Weight format of the transformer's blocks, such as int8 (as stored)."),
        "compute": Flag("Matrix products: exact, or fast (8-bit where they work)."),
        "attention": Flag("Self-attention kernel: sdpa, or where it works int8 or sol (sparse)."),
        "residual": Flag("Precision of the hidden states: fp32, bf16 or auto (fp32 if it fits)."),
        "branches": Flag("CFG branches per visit of a block: 1, 2 or auto."),
        "chunk_tokens": Flag("Tokens per chunk of the transformer's forward pass, or auto."),
        "tiles": Flag('VAE tiles as ROWSxCOLUMNS, such as "2x2", or auto.'),
        "cross_kv": Flag("Where to keep cross-attention K/V: vram, ram or auto."),
        "disk": Flag(
            "Streaming blocks from disk: auto, spare (fill memory first) or never.", "--disk-use"
        ),
        "pinned_share": Flag(
            "Share of the RAM budget that may be pinned (page-locked), such as 0.5."
        ),
        "step_cache": Flag(
            "Step cache, which skips forward passes: off, budget (or "
            "budget:ERROR, such as budget:0.001) or plan:N (compute N steps).",
            "--cache",
        ),
    }
)
"""Every option; all are words, as profiles spell them."""


_PANEL = "Memory, speed and precision"
"""Where help lists them: apart from what is made, and of which files."""

_OWN = "option_"
"""Before the names of the parameters, which a command may use for something else."""


def with_options(only: Sequence[str] = tuple(FLAGS), **helps: str) -> Callable[[Command], Command]:
    """Give a command the flags of run options, in the place of its parameter ``options``.

    An illegal value ends the command as its own errors do.

    Args:
        only: the options that it takes.
        helps: what it says of an option otherwise, by the option's name.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(**given: Any) -> None:
            with reported(given.get("debug", False)):
                options = Options(**{name: given.pop(_OWN + name) for name in only})
            command(**given, options=options)

        signature = inspect.signature(command, eval_str=True)
        before, after = _around(list(signature.parameters.values()))
        flags = [_parameter(name, helps.get(name, FLAGS[name].help)) for name in only]
        vars(called)["__signature__"] = signature.replace(parameters=[*before, *flags, *after])
        called.__annotations__ = {each.name: each.annotation for each in (*before, *flags, *after)}
        return called

    return decorate


def _around(
    parameters: list[inspect.Parameter],
) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """Return the parameters before and after "options", all of them by keyword only."""
    place = [each.name for each in parameters].index("options")
    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    return keyword[:place], keyword[place + 1 :]


def _parameter(name: str, told: str) -> inspect.Parameter:
    flag = FLAGS[name].name or f"--{name.replace('_', '-')}"
    kind = Annotated[str | None, typer.Option(flag, help=told, rich_help_panel=_PANEL)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(_OWN + name, keyword, default=None, annotation=kind)
