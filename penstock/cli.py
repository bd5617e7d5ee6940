"""The command line: parse, call, print. No logic lives here."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from penstock._version import __version__
from penstock.errors import PenstockError

app = typer.Typer(
    name="penstock",
    help="Runs video models far larger than the card, inside a byte budget you choose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class SamplerName(str, Enum):
    """Samplers by the name that users know."""

    UNIPC = "unipc"
    DPMPP = "dpm++"
    EULER = "euler"


Json = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Vram = Annotated[str | None, typer.Option(help='Ceiling on VRAM, such as "12GiB".')]
Ram = Annotated[str | None, typer.Option(help="Ceiling on host memory for weights and frames.")]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
Force = Annotated[bool, typer.Option(help="Replace an existing output.")]
