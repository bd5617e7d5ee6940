"""What stands before every route: who may ask, from where, and how much.

A page of another site that a user has open can send requests to 127.0.0.1, and by rebinding its own
name to that address even read the answers. So a request must name this server as its host, and what
a browser says of its origin must be this server too. A client without a browser says nothing of
that, and is let through.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.serve.metrics import Metrics
from penstock.serve.settings import LOOPBACK, Limits, ServeSettings, is_loopback

COOKIE = "penstock_key"
"""What the page keeps the key in: a player cannot send headers."""

OPEN = ("/health", "/")
"""What is answered without a key: besides, the page's own files, and where it leaves a key."""

PAGE = "/page/"
"""What these begin with."""

SAFE = ("GET", "HEAD", "OPTIONS")

SLOWEST_BYTES_S = 4096
"""At which a body may come, after the patience that a first byte has."""

HEADERS = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' "
    "blob:; style-src 'self'; script-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'",
}
"""Of every answer: nothing of another host is asked for, and no other site shows it."""


class Guard:
    """Refuses requests before a route sees them.

    Args:
        app: what it guards.
        settings: the key, the names and the limits.
        metrics: counts and times what is answered.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._key, self._limits = settings.api_key, settings.limits
        self._hosts = frozenset(_names(settings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), [500]

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message["headers"], *_ENCODED]
            await send(message)

        try:
            await self._guarded(scope, receive, telling)
        finally:
            seconds = time.perf_counter() - began
            self._metrics.answered(scope["method"], _route(scope), status[0], seconds)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        await self._app(scope, Body(receive, self._limits).receive, send)

    def _refusal(self, scope: Scope, headers: Mapping[str, str]) -> tuple[int, str, str] | None:
        """Return why a request is not answered: status, code and message."""
        host = headers.get("host", "")
        if _name_of(host) not in self._hosts:
            return 421, "host_refused", "This server is not called by that name; see --allow-host."
        if not _is_own(scope, headers, host):
            return 403, "origin_refused", "Requests from pages of other sites are not answered."
        if not self._has_key(scope, headers):
            return 401, "key_refused", "A key is needed: Authorization: Bearer KEY."
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 15:
            return 400, "request", "content-length is no number."
        if int(length) > self._limits.body_bytes:
            return 413, "too_large", _too_large(self._limits)
        return None

    def _has_key(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        path = scope["path"]
        if self._key is None or path in OPEN or path.startswith(PAGE):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = _cookie(headers.get("cookie", ""))
        return secrets.compare_digest(given.strip().encode(), self._key.encode())


class BodyRefused(Exception):
    """A body that is not read to its end.

    Args:
        status, code, message: of the answer.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code = status, code
        super().__init__(message)


class Body:
    """A request's body, within limits of bytes and of patience.

    Args:
        receive: as ASGI has it.
        limits: both.
    """

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._taken, self._ended, self._began_s = 0, False, time.monotonic()

    async def receive(self) -> Message:
        """Return the next part.

        Raises:
            BodyRefused: it is too large, or comes too slowly.
        """
        if self._ended:  # what comes now is the client's leaving, whenever that is
            return await self._receive()
        patience_s = self._limits.body_s + self._taken / SLOWEST_BYTES_S
        try:
            with anyio.fail_after(self._began_s + patience_s - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            told = f"After {patience_s:.0f} s, {self._taken:,} bytes of the body have come."
            raise BodyRefused(408, "too_slow", told) from error
        self._taken += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._taken > self._limits.body_bytes:
            raise BodyRefused(413, "too_large", _too_large(self._limits))
        return message


def _too_large(limits: Limits) -> str:
    return f"The body is too large: expected at most {limits.body_bytes:,} bytes."


_ENCODED = [(name.encode(), value.encode()) for name, value in HEADERS.items()]


def _names(settings: ServeSettings) -> Iterable[str]:
    yield from LOOPBACK
    yield from settings.hosts
    if not is_loopback(settings.host) and settings.host not in ("0.0.0.0", "::"):
        yield settings.host


def _headers(scope: Scope) -> dict[str, str]:
    """Return the headers by name; of one that is there twice, the last, but for "host", which then
    names nothing."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        found[key] = "" if key == "host" and key in found else value.decode("latin-1")
    return found


def _name_of(host: str) -> str:
    """Return a host without its port, in lower case; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_own(scope: Scope, headers: Mapping[str, str], host: str) -> bool:
    """Return whether a request comes from this server's own pages, or from no page at all."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None:
        return urlsplit(origin).netloc.lower() == host.lower()
    if site in (None, "same-origin", "none"):
        return True
    # A link to the page from elsewhere may be followed; nothing else of other sites is answered.
    followed = headers.get("sec-fetch-mode") == "navigate" and scope["method"] in SAFE
    return followed and headers.get("sec-fetch-dest", "document") == "document"


def _cookie(text: str) -> str:
    try:
        found = SimpleCookie(text).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _route(scope: Scope) -> str:
    """Return the path as it was declared: ids do not make series of their own."""
    route = scope.get("route")
    return getattr(route, "path", "none")


async def _refuse(send: Send, status: int, code: str, message: str) -> None:
    body = json.dumps({"error": {"code": code, "message": message, "type": "refused"}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
