"""Commands about files of weights: inspect, pack, verify, cache. Parse, call, print."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.layout import fitted
from penstock.cli.paths import path_argument, path_option
from penstock.cli.terminal import Screen, say, warn
from penstock.errors import OverBudget, PenstockError
from penstock.folders import cache_folder

log = logging.getLogger(__name__)

cache_app = typer.Typer(help="List and remove cached packs (a job writes the pack that it needs).")

_PANEL = "Model files"
"""Where help lists them."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Part = Annotated[
    Path | None,
    path_option("Checkpoint file, index or folder of this component.", panel=_PANEL),
]
Second = Annotated[
    Path | None,
    path_option(
        "Low-noise transformer of a model with two; --transformer is then the high-noise one.",
        panel=_PANEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Model folder (diffusers, Wan's own, ComfyUI), transformer file, or hub id.",
        rich_help_panel=_PANEL,
    ),
]
Tokenizer = Annotated[
    Path | None, path_option("Tokenizer folder or SentencePiece model.", panel=_PANEL)
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE",
        help="LoRA, as FILE[:STRENGTH][@high|low]; repeat the option for more.",
        rich_help_panel=_PANEL,
    ),
]

LoraStrict = Annotated[
    bool,
    typer.Option(
        "--lora-strict",
        help="Fail if any tensor of a LoRA has no place in the model.",
        rich_help_panel=_PANEL,
    ),
]


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors of penstock's own and of the system become one line and an exit code; others stay
    tracebacks."""
    try:
        yield
    except PenstockError as error:
        log.info("the command failed", exc_info=True)
        if debug:
            raise
        warn(f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        log.info("the system refused", exc_info=True)
        if debug:
            raise
        warn(f"error: {_told(error)}")
        raise typer.Exit(1) from error
    except (typer.Exit, typer.Abort):
        raise
    except BaseException:
        log.info("the command broke off", exc_info=True)
        raise


@contextmanager
def refusals_shown(machine: str, plain: bool) -> Iterator[None]:
    """Show a plan that does not fit as a plan is shown, in the place of an error's one line.

    Args:
        machine: its name.
        plain: leave it to the error.
    """
    from penstock.cli.plan_view import refusal_view

    try:
        yield
    except OverBudget as error:
        if plain:
            raise
        log.info("no plan fits", exc_info=True)
        screen = Screen(stderr=True)
        screen.print(refusal_view(error, machine, screen.width), soft_wrap=True)
        raise typer.Exit(error.exit_code) from error


def _told(error: OSError) -> str:
    """Return what the system refused, and for which file."""
    names = [os.fsdecode(each) for each in (error.filename, error.filename2) if each is not None]
    reason = error.strerror or str(error) or type(error).__name__
    return f"{' and '.join(map(str, names))}: {reason}" if names else reason


def inspect(
    path: Annotated[Path, path_argument("File, index or folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Describe a file or folder from its headers, and how to use it."""
    from penstock.engine.inspect import inspect as look

    with reported(debug):
        found = look(path)
    if as_json:
        say(json.dumps(asdict(found), default=str))
    else:
        width = Screen().row_width
        say("\n".join(row for line in found.lines() for row in fitted(line, width)))


def pack(
    format: Annotated[
        str, typer.Option(help="Weight format of the transformer's blocks, such as int8.")
    ],
    output: Annotated[Path, path_option("Folder to write.", "--output", "-o")],
    model: Model = None,
    transformer: Part = None,
    transformer_2: Second = None,
    text_encoder: Part = None,
    vae: Part = None,
    image_encoder: Part = None,
    audio_vae: Part = None,
    tokenizer: Tokenizer = None,
    lora: Loras = None,
    lora_strict: LoraStrict = False,
    ram: Annotated[str, typer.Option(help="RAM budget for weights being converted.")] = "2GiB",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as packs: quantised, checksummed, and laid out for streaming."""
    from penstock.cli.progress import pack_bar
    from penstock.engine.files.locate import Files, locate
    from penstock.engine.lora.file import as_loras
    from penstock.engine.packs.pack import pack as write
    from penstock.units import format_bytes, parse_bytes

    with reported(debug):
        files = Files(
            transformer, text_encoder, vae, image_encoder, tokenizer, transformer_2, audio_vae
        )  # fmt: skip
        with pack_bar(Screen(stderr=True)) as progress:
            report = write(
                locate(model, files),
                format,
                output,
                loras=as_loras(lora or [], strict=lora_strict),
                ram_bytes=parse_bytes(ram),
                progress=progress,
            )
    for notice in report.notices:
        warn(f"note: {notice}")
    if as_json:
        say(json.dumps(asdict(report), default=str))
    else:
        say(f"{report.folder}: {report.files} packs, {format_bytes(report.nbytes)}")
        place = shlex.join(["--model", str(report.folder.absolute())])
        say(f"use it: penstock generate {place}")


def verify(
    path: Annotated[Path, path_argument("Pack, or folder of packs.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify every byte of a pack; exit with 1 if any is damaged."""
    from penstock.cli.progress import pack_bar
    from penstock.engine.packs.file import verify as check
    from penstock.units import format_bytes

    with reported(debug), pack_bar(Screen(stderr=True)) as progress:
        found = check(path, lambda done, total: progress("checking", done, total))
    if as_json:
        say(json.dumps(asdict(found), default=str))
    else:
        for file, what in found.damage:
            say(f"damaged: {file}: {what}")
        say(f"{found.files} packs, {found.runs} runs, {format_bytes(found.nbytes)} checked")
    if found.damage:
        raise typer.Exit(1)


@cache_app.command("ls")
def list_cache(as_json: Json = False, debug: Debug = False) -> None:
    """List cached packs: size, and what each was made from."""
    from penstock.cli.listed import packs_table
    from penstock.engine.packs.cache import cached_packs

    with reported(debug):
        packs = cached_packs(cache_folder())
    told = [each.to_json() for each in packs]
    say(json.dumps(told) if as_json else packs_table(packs, Screen().row_width))


@cache_app.command("rm")
def remove_cached(
    name: Annotated[str, typer.Argument(help="Name of the pack, as `cache ls` shows it.")],
    debug: Debug = False,
) -> None:
    """Remove a cached pack; `generate` makes it again when needed."""
    from penstock.engine.packs.cache import remove_pack
    from penstock.units import format_bytes

    with reported(debug):
        freed = remove_pack(cache_folder(), name)
    say(f"removed {name} ({format_bytes(freed)})")
