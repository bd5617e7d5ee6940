"""``penstock serve``: from flags to a server's settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.batch import Devices, Ray
from penstock.cli.files import reported
from penstock.cli.options import NOTHING, with_options
from penstock.cli.paths import path_option
from penstock.cli.terminal import say
from penstock.errors import UsageError
from penstock.profiles.options import Options
from penstock.units import parse_bytes

_NEEDED = (
    "fastapi", "uvicorn", "sse_starlette", "prometheus_client", "python_multipart",
)  # fmt: skip
_PORT = 8730


@with_options()
def serve(
    model: Annotated[
        list[str],
        typer.Option(
            help="Model to serve: DIR or NAME=DIR; repeat for more. The first is the default."
        ),
    ],
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; one that other machines reach needs --api-key."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = _PORT,
    folder: Annotated[
        Path | None, path_option("Folder for the queue and the videos (in the data directory).")
    ] = None,
    keep_alive: Annotated[
        float,
        typer.Option(help="Idle seconds after which the model is unloaded.", min=0),
    ] = 300.0,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that every request must carry.", envvar="PENSTOCK_API_KEY"),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name that clients may also use; repeat for more.")
    ] = None,
    allow_urls: Annotated[
        bool,
        typer.Option(
            "--allow-urls", help="Let requests name images by http(s) address, and fetch them."
        ),
    ] = False,
    lora_dir: Annotated[
        list[Path] | None, path_option("Folder of LoRAs that requests may name; repeat for more.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Most videos that may wait in the queue.", min=1)
    ] = 1000,
    max_kept: Annotated[
        str | None, typer.Option(help='Most bytes of finished videos to keep, such as "100GiB".')
    ] = None,
    max_upload: Annotated[
        str, typer.Option(help="Most bytes of a request, its images included.")
    ] = "32MiB",
    max_pixels: Annotated[int, typer.Option(help="Most pixels of an image.", min=1)] = 40_000_000,
    devices: Devices = None,
    ray: Ray = None,
    options: Options = NOTHING,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Serve videos over HTTP (/v1/videos): planned before they are queued, kept across restarts."""
    with reported(debug):
        _check_installed()
        from penstock.serve.launch import serve as launch
        from penstock.serve.settings import Limits, ServeSettings, named_models
        from penstock.serve.workers import Crowd

        crowd = Crowd.of(devices, ray)

        limits = Limits(
            body_bytes=parse_bytes(max_upload),
            pixels=max_pixels,
            waiting=max_waiting,
            kept_bytes=None if max_kept is None else parse_bytes(max_kept),
        )
        own = {} if folder is None else {"folder": folder}
        settings = ServeSettings(
            models=named_models(model),
            options=crowd.shared_out(options),
            host=host,
            port=port,
            keep_alive_s=keep_alive,
            api_key=api_key,
            allow_urls=allow_urls,
            lora_folders=tuple(lora_dir or ()),
            hosts=tuple(name.lower() for name in allow_host or ()),
            limits=limits,
            **own,
        )
        launch(settings, say, crowd)


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            "the server's packages are not installed",
            found=f"no {', '.join(missing)}",
            remedy='pip install "penstock[serve]"',
        )
