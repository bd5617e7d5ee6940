"""uvicorn's HTTP, with limits on how long a client may keep a connection waiting.

uvicorn waits without end for the headers of a request, and for a client to read its answer. h11
rather than httptools: it bounds the bytes of headers as well.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.serve.settings import Limits


def protocol(limits: Limits, connections: set[object]) -> type[H11Protocol]:
    """Return the protocol that ends a connection whose client is slower than ``limits`` have it.

    Args:
        limits: of clients.
        connections: has each one in it while it is there.
    """

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.add(self)
            self._wait(limits.header_s)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()  # a request is there: its body is the guard's to wait for
            elif self._timer is None:
                self._wait(limits.header_s)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(limits.body_s)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            connections.discard(self)
            self._stop()

        def _wait(self, seconds: float) -> None:
            self._stop()
            self._timer = self.loop.call_later(seconds, self._give_up)

        def _stop(self) -> None:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()

        def _give_up(self) -> None:
            self._timer = None
            self.transport.abort()

    return Patient
