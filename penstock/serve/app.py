"""The application: its routes behind its guard."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Response
from starlette.types import ASGIApp

from penstock._version import __version__
from penstock.serve.answers import answer_errors
from penstock.serve.api import control_router, videos_router
from penstock.serve.docs import docs_page
from penstock.serve.guard import Guard
from penstock.serve.metrics import Metrics
from penstock.serve.page import page_router
from penstock.serve.service import Service

_TOLD = "Videos by models far larger than the card. See docs/server.md."


def create_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a server."""
    app = FastAPI(
        title="penstock",
        version=__version__,
        description=_TOLD,
        docs_url=None,  # FastAPI's own page asks another host for its scripts
        redoc_url=None,
    )
    metrics = Metrics()
    metrics.watch(lambda: _gauges(service))
    answer_errors(app)
    app.include_router(videos_router(service))
    app.include_router(control_router(service))
    app.include_router(page_router(service.settings))

    @app.get("/metrics", include_in_schema=False)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(docs_page(app.openapi()), media_type="text/html; charset=utf-8")

    return Guard(app, service.settings, metrics)


def _gauges(service: Service) -> Mapping[str, Mapping[str, float]]:
    live = [service.hub.live(name) for name in service.queue.running()]
    told = [each.told for each in live if each is not None]
    return {
        "videos": dict(service.queue.counts()),
        "waiting": {"": len(service.queue.waiting())},
        "kept_bytes": {"": service.queue.kept_bytes()},
        "connections": {"": len(service.connections)},
        "worker_deaths": {"": service.crew.crashes},
        "used_bytes": {
            kind: sum(each.get(f"{kind}_bytes") or 0 for each in told) for kind in ("vram", "ram")
        },
    }
