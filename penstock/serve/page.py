"""The page at ``/``: plain files of the package, which speak to ``/v1/`` alone."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from fastapi import APIRouter, Body, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from penstock.serve.guard import COOKIE
from penstock.serve.settings import ServeSettings

STATIC = Path(str(files("penstock"))) / "serve" / "static"

_KINDS: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)

_FRESH = {"cache-control": "no-cache"}
"""A browser asks again each time: the server may be another version by now."""


def page_router(settings: ServeSettings) -> APIRouter:
    """Return the routes of the page: its files, and where it leaves the server's key."""
    router = APIRouter(include_in_schema=False)
    known = {path.name: path for path in STATIC.iterdir() if path.suffix in _KINDS}

    @router.get("/")
    async def index() -> Response:
        return _file(known["index.html"])

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in known:  # never a path that a client made
            raise HTTPException(404, "the page has no such file")
        return _file(known[name])

    @router.post("/page/key")
    async def key(key: str = Body(embed=True, max_length=1000)) -> Response:
        wanted = settings.api_key or ""
        if not secrets.compare_digest(key.strip().encode(), wanted.encode()):
            raise HTTPException(401, "that is not the key")
        answer = Response("{}", media_type="application/json")
        answer.set_cookie(COOKIE, wanted, httponly=True, samesite="strict")
        return answer

    return router


def _file(path: Path) -> FileResponse:
    return FileResponse(path, media_type=_KINDS[path.suffix], headers=_FRESH)
