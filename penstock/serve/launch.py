"""Runs a server until it is told to end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from penstock.errors import JobLocked, UsageError
from penstock.serve.app import create_app
from penstock.serve.crew import Worker
from penstock.serve.protocol import protocol
from penstock.serve.service import Service
from penstock.serve.settings import ServeSettings
from penstock.serve.workers import Crowd

_KEEP_ALIVE_S = 5
_GRACE_S = 3
"""For answers that are being sent when the server ends."""

_BACKLOG = 512


def serve(settings: ServeSettings, say: Callable[[str], None], crowd: Crowd | None = None) -> None:
    """Answer until SIGINT or SIGTERM; jobs that run by then are gone on with by the next server.

    Args:
        settings: of the server; its options are those of each worker.
        say: told where it listens, once it does.
        crowd: who does the jobs; None: one worker.

    Raises:
        UsageError: the address is taken, another server has the folder, or a worker has no place.
        PenstockError: a model cannot be opened.
    """
    with bound(settings) as listener:
        crowd = crowd or Crowd()
        with crowd.workers(settings.models, settings.options, settings.cache) as workers:
            asyncio.run(_serve(settings, listener, workers, say))


async def _serve(
    settings: ServeSettings,
    listener: socket.socket,
    workers: Sequence[Worker],
    say: Callable[[str], None],
) -> None:
    try:
        service = Service(settings, workers)
    except JobLocked as error:
        raise UsageError(
            "another server is using this folder",
            expected="a folder of its own for each",
            found=f"{settings.folder}, {error.found}",
            remedy="Give --folder another one, or end that server.",
        ) from error
    try:
        await service.open()
        # What is there by now stays: looking through it for garbage would hold answers up
        gc.collect()
        gc.freeze()
        names, (host, port) = ", ".join(settings.models), listener.getsockname()[:2]
        say(f"{names} at http://{f'[{host}]' if ':' in host else host}:{port}")
        await server_of(service).serve(sockets=[listener])
    finally:
        await service.close()


def server_of(service: Service) -> uvicorn.Server:
    """Return what answers for a service, on the loop that it was opened on."""
    limits = service.settings.limits
    config = uvicorn.Config(
        create_app(service),
        http=protocol(limits, service.connections),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    return _Server(config, service)


class _Server(uvicorn.Server):
    """uvicorn raises the signal again when it has ended, which would leave nobody to clean up; and
    it waits for streams of events, which end by themselves only when they are told."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams first: what waits for the grace to pass is cut off in the middle."""
        self._service.hub.close()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals let the server end, no more; off the main thread there are none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def bound(settings: ServeSettings) -> Iterator[socket.socket]:
    """Provide a socket that listens where the settings say.

    Raises:
        UsageError: it cannot.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With its protocol said, unlike `socket.create_server`: asyncio turns Nagle's delay off only
    # where that is TCP by name, and an answer of two parts waits 40 ms for the client otherwise.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one address
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"{settings.host}:{settings.port} cannot be listened on",
            expected="a free port of this machine",
            found=error.strerror,
            remedy="Choose another --port, or stop what uses it.",
        ) from error
    with listener:
        yield listener
